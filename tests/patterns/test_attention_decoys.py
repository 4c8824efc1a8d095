"""What has a softmax and products and is no attention; and attention whose queries are learned, which is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

B, S, H, D, HIDDEN, SLOTS, EXPERTS = 2, 6, 4, 8, 32, 10, 4


class Parts(nn.Module):
    """A stem, a norm, and whatever a decoy may want."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v, self.gate = (nn.Linear(HIDDEN, HIDDEN) for _ in range(5))
        self.norm, self.score = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 1)
        self.table, self.latents = nn.Parameter(torch.randn(50, HIDDEN)), nn.Parameter(torch.randn(3, HIDDEN))
        self.slots = nn.Parameter(torch.randn(HIDDEN, SLOTS))
        self.router, self.experts = nn.Linear(HIDDEN, EXPERTS), nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))

    def heads(self, x):
        return [y(x).view(B, S, H, D).transpose(1, 2) for y in (self.q, self.k, self.v)]


class LinearAttention(Parts):
    """Softmax on queries and keys separately (efficient attention)."""

    def forward(self, x):
        q, k, v = self.heads(self.norm(self.stem(x)))
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class LinearAttentionOnTheStem(Parts):
    def forward(self, x):
        q, k, v = self.heads(self.stem(x))
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class LinearAttentionByMatmul(Parts):
    def forward(self, x):
        x = self.norm(self.stem(x))
        q, k, v = (x @ y.weight for y in (self.q, self.k, self.v))
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class SoftMoE(Parts):
    def forward(self, x):
        x = self.norm(self.stem(x))
        logits = torch.einsum("bnd,ds->bns", x, self.slots)
        mixed = torch.einsum("bnd,bns->bsd", x, logits.softmax(1))
        return torch.einsum("bsd,bns->bnd", self.v(mixed), logits.softmax(2))


class SoftEmbedding(Parts):
    """Class probabilities times an embedding table."""

    def forward(self, x):
        return functional.linear(x, self.table).softmax(-1) @ self.table


class TiedSoftEmbedding(Parts):
    def forward(self, x):
        return (self.q(x) @ self.table.T).softmax(-1) @ self.table


class Codebook(Parts):
    """Soft vector quantisation: a softmax over distances to a table."""

    def forward(self, x):
        z = self.q(x)
        distance = z.square().sum(-1, keepdim=True) - 2 * (z @ self.table.T) + self.table.square().sum(-1)
        return (-distance).softmax(-1) @ self.table


class GatedPooling(Parts):
    """Weights of positions from one linear layer."""

    def forward(self, x):
        return self.score(self.stem(x)).softmax(1).mT @ self.v(x)


class GatedPoolingBySum(Parts):
    def forward(self, x):
        return (self.score(self.stem(x)).softmax(1) * self.v(x)).sum(1)


class MultipleInstances(Parts):
    def forward(self, x):
        h = self.stem(x)
        return self.score(torch.tanh(self.k(h)) * torch.sigmoid(self.gate(h))).softmax(1).mT @ h


class Mixture(Parts):
    def forward(self, x):
        made = torch.einsum("bsd,edo->bseo", x, self.experts)
        return (self.router(x).softmax(-1).unsqueeze(-1) * made).sum(2)


class SoftPosition(Parts):
    """The expected coordinate of a match (soft argmax)."""

    def forward(self, x):
        return (self.q(x) @ self.k(x).mT).softmax(-1) @ torch.arange(2.0 * S).view(S, 2)


class Sinkhorn(Parts):
    def forward(self, x):
        a = self.q(x) @ self.k(x).mT
        p = (a - a.amax(-1, keepdim=True)).exp()
        for _ in range(3):
            p = p / p.sum(-1, keepdim=True)
            p = p / p.sum(-2, keepdim=True)
        return p @ self.v(x)


class WithoutSoftmax(Parts):
    def forward(self, x):
        return (self.q(x) @ self.k(x).mT).relu() @ self.v(x)


class Contrast(Parts):
    def forward(self, x):
        return functional.cross_entropy(self.q(x).mean(1) @ self.k(x).mean(1).T, torch.arange(B))


DECOYS = {
    LinearAttention: ("keys, `q.weight`", "queries, `k.weight`"),
    LinearAttentionOnTheStem: ("keys, `q.weight`", "queries, `k.weight`"),
    LinearAttentionByMatmul: ("keys, `q.weight`", "its keys and values are no projections|its keys are no projection"),
    SoftMoE: ("its keys and values are the same", "keys, `slots`"),
    SoftEmbedding: ("keys, `table`",),
    TiedSoftEmbedding: ("are a constant or a parameter",),
    Codebook: ("are a constant or a parameter",),
    GatedPooling: ("queries, `score.weight`, are a parameter that projects one input",),
    GatedPoolingBySum: ("queries, `score.weight`",),
    MultipleInstances: ("queries, `score.weight`",),
    Mixture: ("keys, `router.weight`",),
    SoftPosition: ("its values",),
    Sinkhorn: ("a form that is not known",),
    WithoutSoftmax: ("an attention without a softmax",),
    Contrast: (),
}


@pytest.mark.parametrize("decoy", DECOYS)
def test_a_decoy_is_no_site_and_says_why(capture, decoy: type[Parts]) -> None:
    captured = capture(decoy(), torch.randn(B, S, HIDDEN))
    assert [match for match in captured.findings.matches if match.kind == "attention"] == []
    assert len(captured.reasons) == len(DECOYS[decoy])
    for reason, expected in zip(captured.reasons, DECOYS[decoy], strict=True):
        assert any(part in reason for part in expected.split("|")), reason


class ProjectedQuery(Parts):
    """Perceiver, attention pooling: queries from latents."""

    def forward(self, x):
        h = self.norm(self.stem(x))
        return (self.q(self.latents) @ self.k(h).mT * 0.1).softmax(-1) @ self.v(h)


class BareQuery(Parts):
    def forward(self, x):
        h = self.norm(self.stem(x))
        return (self.latents @ self.k(h).mT * 0.1).softmax(-1) @ self.v(h)


class ExpandedQuery(Parts):
    def forward(self, x):
        q = self.q(self.latents.expand(B, -1, -1))
        return (q @ self.k(x).mT * 0.1).softmax(-1) @ self.v(x)


class Memory(Parts):
    """Keys and values are projections of what is learned: persistent memory."""

    def forward(self, x):
        return (self.q(x) @ self.k(self.latents).mT * 0.1).softmax(-1) @ self.v(self.latents)


class Slots(Parts):
    """The first decoder layer of a DETR: all three are made from learned queries."""

    def forward(self, x):
        h = self.latents.expand(B, -1, -1) + torch.zeros_like(x[:, :3])
        return (self.q(h) @ self.k(h).mT * 0.1).softmax(-1) @ self.v(h)


@pytest.mark.parametrize("model", [Memory, Slots])
def test_projections_of_what_is_learned_are_keys_and_values(capture, model: type[Parts]) -> None:
    match = capture(model(), torch.randn(B, S, HIDDEN)).match
    assert (match.weights["q_weight"].names, match.weights["k_weight"].names) == (("q.weight",), ("k.weight",))


@pytest.mark.parametrize("model", [ProjectedQuery, BareQuery, ExpandedQuery])
def test_learned_queries_over_projected_keys_are_attention(capture, model: type[Parts]) -> None:
    match = capture(model(), torch.randn(B, S, HIDDEN)).match
    assert match.weights["k_weight"].names == ("k.weight",)
    assert ("q_weight" in match.weights) == (model is not BareQuery)
    assert match.facts.items() >= {"heads": 1, "head_dim": HIDDEN, "scale": 0.1}.items()
    assert set(match.operands) == {"q", "k", "v"}
    assert set(match.laws.values()) == {""}
