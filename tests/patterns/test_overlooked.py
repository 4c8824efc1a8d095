"""Attention in a form that no pattern knows is named; what is none, or a site already, is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
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
