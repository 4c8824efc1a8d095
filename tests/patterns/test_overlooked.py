"""Attention in a form that no pattern knows is named; what is none, or a site already, is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from foreshock import Watch

B, S, H, D, HIDDEN = 2, 8, 4, 8, 32


class Attention(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, H * D) for _ in range(3))
        self.table, self.call = nn.Embedding(9, D), call

    def forward(self, x: Tensor) -> Any:
        parts = [y(x).view(*x.shape[:2], H, D).transpose(1, 2) for y in (self.q, self.k, self.v)]
        return self.call(*parts, self.table(x[:, :, 0].long().clamp(0, 8)))


def summed_by_a_column_of_ones(q, k, v, table):
    out = (q @ k.mT).exp() @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return out[..., :-1] / out[..., -1:]


def gumbel(q, k, v, table):
    return functional.gumbel_softmax(q @ k.mT, dim=-1) @ v


def banded_in_place(q, k, v, table):
    """Longformer: blocks of a product are written into a band."""
    band = q.new_zeros(B, H, S, S // 2)
    product = q @ k.mT
    band[:, :, : S // 2] = product[:, :, : S // 2, : S // 2]
    band[:, :, S // 2 :] = product[:, :, S // 2 :, S // 2 :]
    p = band.softmax(-1)
    return torch.cat([p[:, :, : S // 2] @ v[:, :, : S // 2], p[:, :, S // 2 :] @ v[:, :, S // 2 :]], 2)


class Masked(torch.autograd.Function):
    """DeBERTa's and SEW-D's softmax."""

    @staticmethod
    def forward(ctx, a):
        p = a.softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        return p * (grad - (p * grad).sum(-1, keepdim=True))


def in_a_function(q, k, v, table):
    return Masked.apply(q @ k.mT) @ v


def sigmoid(q, k, v, table):
    return (q @ k.mT - 2).sigmoid() @ v


def squared_relu(q, k, v, table):
    return (q @ k.mT).relu().square() @ v


@pytest.mark.parametrize("call", [banded_in_place, gumbel, in_a_function], ids=lambda call: call.__name__)
def test_a_softmax_in_an_unknown_form_is_a_site_without_laws(call: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = Attention(call)
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        torch.compile(model, backend=watch.backend)(torch.randn(B, S, HIDDEN)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        (status,) = watch.coverage
        assert watch.coverage.unmatched == ()
        q_rms = watch.series("attention/q_rms")[1]
    site = status.site
    assert (site.pattern, site.heads, site.kv_heads, site.head_dim) == ("attention in an unknown form", H, H, D)
    assert (site.q_weight.names, site.k_weight.names) == (("q.weight",), ("k.weight",))
    assert (site.causal, site.scale, site.masked) == (None, None, True)
    assert all(status.laws.values())
    assert status.sampled == 1
    assert q_rms.shape == (1, H)


UNKNOWN = {
    summed_by_a_column_of_ones: "`exp` of a product weighs what .* a form that is not known",
    sigmoid: "`sigmoid` of a product weighs what .* an attention without a softmax",
    squared_relu: "`square` of a product weighs what .* an attention without a softmax|`relu` of a product",
}


@pytest.mark.parametrize("call", UNKNOWN, ids=lambda call: call.__name__)
def test_an_unknown_form_is_named_once(capture, call: Callable[..., Any]) -> None:
    captured = capture(Attention(call), torch.randn(B, S, HIDDEN))
    assert captured.findings.matches == ()
    (miss,) = captured.findings.misses
    assert re.search(UNKNOWN[call], miss.reason)
    assert 'test_overlooked.py", line' in str(miss)


def linear_attention(q, k, v, table):
    q, k = functional.elu(q) + 1, functional.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(2, keepdim=True).mT)


def decayed(q, k, v, table):
    """A state-space scan in chunks: a product times decays, and no function of the product."""
    decay = torch.exp(-torch.arange(S).float())
    return (q @ k.mT * decay).tril() @ v


def experts_from_a_table(q, k, v, table):
    """Rows picked by the data are experts' weights."""
    hidden = torch.einsum("bhsd,bsd->bhs", q, table).sigmoid()
    return torch.einsum("bhs,bsd->bhd", hidden, table)


def indexer(q, k, v, table):
    """A key indexer sums over heads: no values are weighed."""
    return ((q @ k.mT).relu() * v[..., :1]).sum(1)


def known(q, k, v, table):
    return (q @ k.mT).softmax(-1) @ v


def compared(q, k, v, table):
    """An auxiliary product behind an attention that is a site."""
    out = (q @ k.mT).softmax(-1) @ v
    return out, out @ out.mT


@pytest.mark.parametrize("call", [linear_attention, decayed, experts_from_a_table, indexer, known, compared])
def test_what_is_none_or_known_is_not_named(capture, call: Callable[..., Any]) -> None:
    assert capture(Attention(call), torch.randn(B, S, HIDDEN)).reasons == []


def powers_of_two(q, k, v, table):
    p = (q @ k.mT).exp2()
    return (p / p.sum(-1, keepdim=True)) @ v


def powers_of_a_number(q, k, v, table):
    p = 2 ** (q @ k.mT)
    return (p / p.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("call", [powers_of_two, powers_of_a_number], ids=lambda call: call.__name__)
def test_other_exponentials_are_named(capture, call: Callable[..., Any]) -> None:
    (reason,) = capture(Attention(call), torch.randn(B, S, HIDDEN)).reasons
    assert re.match("`(exp2|pow)` of a product weighs what `.*` sums: an attention in a form that is not known", reason)


def distances(q, k, v, table):
    return (-torch.cdist(q, k)).softmax(-1) @ v


def squared_distances(q, k, v, table):
    return (-(q[:, :, :, None] - k[:, :, None]).square().sum(-1)).softmax(-1) @ v


def inner_products(q, k, v, table):
    return torch.linalg.vecdot(q[:, :, :, None], k[:, :, None]).softmax(-1) @ v


def mean_of_products(q, k, v, table):
    return ((q @ k.mT).softmax(-1)[..., None] * v[:, :, None]).mean(-2)


COMPARED = [distances, squared_distances, inner_products, mean_of_products]


@pytest.mark.parametrize("call", COMPARED, ids=lambda call: call.__name__)
def test_queries_and_keys_may_be_compared_by_other_means(capture, call: Callable[..., Any]) -> None:
    match = capture(Attention(call), torch.randn(B, S, HIDDEN)).match
    assert match.pattern == "attention in an unknown form"
    assert (match.facts["heads"], match.facts["kv_heads"], match.facts["head_dim"]) == (H, H, D)
    assert (match.weights["q_weight"].names, match.weights["k_weight"].names) == (("q.weight",), ("k.weight",))
    assert all(match.laws.values())


def prototypes(q, k, v, table):
    """Distances to rows of a table."""
    return (-torch.cdist(q, table[0])).softmax(-1) @ table[0]


def test_distances_to_a_table_are_none(capture) -> None:
    assert capture(Attention(prototypes), torch.randn(B, S, HIDDEN)).findings.matches == ()


# -- what a graph break cuts ---------------------------------------------------------------------------------------------


def _ledger(model: nn.Module, **given: Tensor) -> tuple[list[str], int]:
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        output = torch.compile(model, backend=watch.backend)(**given)
        getattr(output, "logits", output).sum().backward()
        return list(watch.coverage.unmatched), len(watch.coverage)


def test_the_half_of_deberta_behind_its_graph_break_is_named() -> None:
    config = transformers.DebertaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=H,
        intermediate_size=HIDDEN,
        vocab_size=16,
        max_position_embeddings=S,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    tokens = torch.randint(0, 16, (B, S))
    (said,), sites = _ledger(transformers.DebertaForMaskedLM(config).train(), input_ids=tokens)
    assert sites == 0
    assert "`softmax` of what another graph made weighs what" in said
    assert "a graph break stands in its middle" in said
    assert "modeling_deberta.py" in said


def cut_after(q, k, v, table):
    p = functional.dropout((q @ k.mT).softmax(-1), 0.1)
    torch._dynamo.graph_break()
    return p @ v


def cut_before(q, k, v, table):
    logits = q @ k.mT
    torch._dynamo.graph_break()
    return logits.masked_fill(torch.ones(S, S).triu(1).bool(), -1e9).softmax(-1) @ v


@pytest.mark.parametrize("call", [cut_after, cut_before], ids=lambda call: call.__name__)
def test_a_softmax_beside_a_graph_break_is_named_once(call: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    (said,), sites = _ledger(Attention(call), x=torch.randn(B, S, HIDDEN))
    assert sites == 0
    assert "`softmax` of" in said
    assert "it is not watched" in said


def gate_from_outside(x, gate, values):
    """A mask or a gate that enters is no half of an attention where nothing is weighed that has channels of its own."""
    return (x.softmax(-1) * gate).sum(-1)


def test_a_softmax_of_an_input_that_weighs_nothing_is_not_named(capture) -> None:
    given = [torch.randn(B, H, S, S, requires_grad=True) for _ in range(2)]
    assert capture(gate_from_outside, *given, torch.randn(B)).reasons == []
