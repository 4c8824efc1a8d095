"""The factors read from the weights behind an attention's queries and keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

B, S, H, G, D, HIDDEN = 2, 6, 4, 2, 8, 32
sdpa = functional.scaled_dot_product_attention


def _x() -> torch.Tensor:
    return torch.randn(B, S, HIDDEN, generator=torch.Generator().manual_seed(0))


class Returns(nn.Module):
    """Attention that also returns the q and k that enter the kernel."""

    def heads(self, y):
        return y.view(B, S, -1, D).transpose(1, 2)

    def attend(self, q, k, v):
        return sdpa(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]), q, k


class Separate(Returns):
    def __init__(self, kv_heads: int = H) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, H * D, bias=False)
        self.k, self.v = (nn.Linear(HIDDEN, kv_heads * D, bias=False) for _ in range(2))

    def forward(self, x):
        return self.attend(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))


class Grouped(Separate):
    def __init__(self) -> None:
        super().__init__(G)


class Repeated(Grouped):
    def forward(self, x):
        k, v = (self.heads(y(x)).repeat_interleave(H // G, dim=1) for y in (self.k, self.v))
        return self.attend(self.heads(self.q(x)), k, v)


class Fused(Returns):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * H * D, bias=False)

    def forward(self, x):
        return self.attend(*(self.heads(y) for y in self.qkv(x).split(H * D, dim=-1)))


class FusedGrouped(Returns):
    """q heads of a group, then its key, then its value, group by group."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, (H + 2 * G) * D, bias=False)

    def forward(self, x):
        y = self.qkv(x).view(B, S, G, H // G + 2, D)
        q, k, v = y[..., :-2, :].reshape(B, S, H, D), y[..., -2, :], y[..., -1, :]
        return self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


class Conv1D(Returns):
    """GPT-2's projection: ``addmm`` with a weight ``[hidden, channels]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, 3 * H * D) * 0.1)
        self.bias = nn.Parameter(torch.zeros(3 * H * D))

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, HIDDEN), self.weight).view(B, S, 3 * H * D)
        return self.attend(*(self.heads(part) for part in y.split(H * D, dim=2)))


class Normed(Separate):
    """A gain for each channel of a head, after a root-mean-square norm (Qwen3)."""

    def __init__(self) -> None:
        super().__init__(G)
        self.gain_q, self.gain_k = (nn.Parameter(torch.rand(D) + 0.5) for _ in range(2))

    def norm(self, y, gain):
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return gain * y.to(torch.float32)

    def forward(self, x):
        q = self.norm(self.q(x).view(B, S, -1, D), self.gain_q).transpose(1, 2)
        k = self.norm(self.k(x).view(B, S, -1, D), self.gain_k).transpose(1, 2)
        return self.attend(q, k, self.heads(self.v(x)))


class NormedByModule(Normed):
    def norm(self, y, gain):
        return functional.rms_norm(y, (D,), gain)


class NormedWithOffset(Normed):
    """Gemma's ``1 + gain``."""

    def norm(self, y, gain):
        return super().norm(y, 1.0) * (1.0 + gain)


class NormedWhole(Normed):
    """A gain for every channel of every head, before heads are cut (OLMo 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain_q, self.gain_k = nn.Parameter(torch.rand(H * D) + 0.5), nn.Parameter(torch.rand(G * D) + 0.5)

    def forward(self, x):
        q, k = self.norm(self.q(x), self.gain_q), self.norm(self.k(x), self.gain_k)
        return self.attend(self.heads(q), self.heads(k), self.heads(self.v(x)))


@pytest.mark.parametrize("model", [Separate, Fused, Conv1D, Grouped, Repeated, FusedGrouped])
def test_factors_reproduce_the_layers_logits(capture, model: type[Returns]) -> None:
    torch.manual_seed(0)
    layer, x = model(), _x()
    captured = capture(layer, x)
    _, q, k = (y.detach() for y in captured.result)
    k = k.repeat_interleave(H // k.shape[1], dim=1)
    q_view, k_view = (captured.match.weights[f"{role}_weight"] for role in "qk")
    for head, key in enumerate(k_view.read_by(H)):
        logits = x @ (q_view.factor(head) @ k_view.factor(key).T) @ x.mT
        torch.testing.assert_close(logits, q[:, head] @ k[:, head].mT, rtol=1e-5, atol=1e-5)
    assert k_view.heads == captured.match.facts["kv_heads"]


@pytest.mark.parametrize("model", [Normed, NormedByModule, NormedWithOffset, NormedWhole])
def test_gains_of_query_and_key_norms_are_folded_into_the_factors(capture, model: type[Normed]) -> None:
    torch.manual_seed(0)
    layer = model()
    match = capture(layer, _x()).match
    for role, heads in (("q", H), ("k", G)):
        view = match.weights[f"{role}_weight"]
        assert view.names == (f"{role}.weight", f"gain_{role}")
        gain = getattr(layer, f"gain_{role}").detach() + (1.0 if model is NormedWithOffset else 0.0)
        gain = gain.expand(heads, D) if gain.numel() == D else gain.view(heads, D)
        weight = getattr(layer, role).weight.detach().view(heads, D, HIDDEN)
        torch.testing.assert_close(view.factors(), weight.transpose(1, 2) * gain[:, None])


def test_gains_keep_their_place_through_a_partial_rotary_embedding(capture) -> None:
    class Partial(Normed):
        def turn(self, y):
            turned, kept = y[..., :4], y[..., 4:]
            angle = torch.arange(S * 4, dtype=torch.float32).view(S, 4)
            half = torch.cat((-turned[..., 2:], turned[..., :2]), dim=-1)
            return torch.cat([turned * angle.cos() + half * angle.sin(), kept], dim=-1)

        def forward(self, x):
            q, k = self.norm(self.heads(self.q(x)), self.gain_q), self.norm(self.heads(self.k(x)), self.gain_k)
            return self.attend(self.turn(q), self.turn(k), self.heads(self.v(x)))

    layer = Partial()
    view = capture(layer, _x()).match.weights["q_weight"]
    assert view.names == ("q.weight", "gain_q")
    expected = layer.q.weight.detach().view(H, D, HIDDEN).transpose(1, 2) * layer.gain_q.detach()
    torch.testing.assert_close(view.factors(), expected)


def test_a_view_outlives_nothing(capture) -> None:
    layer = Separate()
    view = capture(layer, _x()).match.weights["q_weight"]
    assert view.resolve() is layer.q.weight
    torch._dynamo.reset()
    del layer
    __import__("gc").collect()
    with pytest.raises(LookupError, match="no longer exists"):
        view.factors()
