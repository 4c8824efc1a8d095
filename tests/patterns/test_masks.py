"""Masks that are made of constants are computed: causal or not, and whether more is hidden; padding that is data is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import foreshock

B, S, H, D = 2, 6, 2, 4
LAST = torch.arange(S)


class Attention(nn.Module):
    """``call(logits, padding)`` masks the logits; ``given(padding)`` is a mask for PyTorch's own call."""

    def __init__(self, call: Callable[..., Tensor] | None = None, given: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H * D, H * D) for _ in range(3))
        self.call, self.given = call, given
        self.register_buffer("lower", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = (y(x).view(*x.shape[:2], H, D).transpose(1, 2) for y in (self.q, self.k, self.v))
        if self.given is not None:
            return sdpa(q, k, v, attn_mask=self.given(padding))
        return self.call(q @ k.mT, padding).softmax(-1) @ v


def lower() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


def filled(a, padding):
    return a.masked_fill(~lower(), -math.inf)


def filled_in_place(a, padding):
    a.masked_fill_(torch.ones(S, S).triu(1).bool(), torch.finfo(a.dtype).min)
    return a


def added(a, padding):
    return a + torch.full((S, S), -math.inf).triu(1)


def chosen(a, padding):
    i = torch.arange(S)
    return torch.where(i[None] <= i[:, None], a, -1e9)


def bloom(a, padding):
    slopes = torch.pow(torch.tensor(0.5), torch.arange(1, H + 1))
    return filled(a + slopes[:, None, None] * torch.arange(S)[None, None], padding)


def padded(a, padding):
    return torch.where(lower() & padding[:, None, None].bool(), a, -1e9)


def padded_by_hiding(a, padding):
    return a.masked_fill(~(lower() & padding[:, None, None].bool()), -1e9)


def padded_the_other_way(a, padding):
    """What is hidden is joined by an and: nothing is hidden for certain."""
    return a.masked_fill(~lower() & padding[:, None, None].bool(), -1e9)


def windowed(a, padding):
    i = torch.arange(S)
    return torch.where((i[None] <= i[:, None]) & (i[None] > i[:, None] - 2), a, -1e9)


def both_ways(a, padding):
    i = torch.arange(S)
    return torch.where((i[None] - i[:, None]).abs() < 2, a, -1e9)


def nothing(a, padding):
    return a + torch.zeros(B, 1, S, S)


def by_data(a, padding):
    return a + (1.0 - padding[:, None, None]) * -1e9


WRITTEN = {
    filled: (True, False),
    filled_in_place: (True, False),
    added: (True, False),
    chosen: (True, False),
    bloom: (True, False),
    padded: (True, True),
    padded_by_hiding: (True, True),
    padded_the_other_way: (False, True),
    windowed: (True, True),
    both_ways: (False, True),
    nothing: (False, False),
    by_data: (None, True),
}


@pytest.mark.parametrize("call", WRITTEN, ids=lambda call: call.__name__)
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_a_mask_hides_is_known(call: Callable[..., Tensor], dynamic: bool) -> None:
    torch._dynamo.reset()
    if dynamic:
        with torch._dynamo.config.patch(assume_static_by_default=False):
            (status,) = foreshock.sites(Attention(call), torch.randn(B, S, H * D), torch.ones(B, S))
    else:
        (status,) = foreshock.sites(Attention(call), torch.randn(B, S, H * D), torch.ones(B, S))
    assert (status.site.causal, status.site.masked) == WRITTEN[call]


GIVEN = {
    (lambda padding: lower()): (True, False, True),
    (lambda padding: torch.zeros(S, S).masked_fill(~lower(), -math.inf)): (True, False, True),
    (lambda padding: lower() & padding[:, None, None].bool()): (True, True, False),
    (lambda padding: torch.ones(B, 1, S, S, dtype=torch.bool)): (False, False, True),
    (lambda padding: lower() & (LAST[None] < 0)): (True, True, False),
    (lambda padding: padding[:, None, None].bool()): (None, True, False),
}


@pytest.mark.parametrize("given", GIVEN)
def test_of_a_given_mask_the_law_of_mass_holds_where_no_row_is_empty(given: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    (status,) = foreshock.sites(Attention(given=given), torch.randn(B, S, H * D), torch.ones(B, S))
    assert (status.site.causal, status.site.masked, not status.laws["law/value_mass"]) == GIVEN[given]


def test_with_lengths_that_vary_a_row_may_be_empty_at_another() -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(assume_static_by_default=False):
        inputs = torch.randn(B, S, H * D), torch.ones(B, S)
        given = Attention(given=lambda padding: torch.ones(padding.shape[1], padding.shape[1], dtype=torch.bool).tril())
        (status,) = foreshock.sites(given, *inputs)
    assert (status.site.causal, status.site.masked) == (True, False)
    assert "empty whole rows" in status.laws["law/value_mass"]


def test_a_buffer_is_read_as_it_is() -> None:
    class Buffered(Attention):
        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            q, k, v = (y(x).view(*x.shape[:2], H, D).transpose(1, 2) for y in (self.q, self.k, self.v))
            mask = self.lower[: x.shape[1], : x.shape[1]]
            return torch.where(mask, q @ k.mT, torch.finfo(x.dtype).min).softmax(-1) @ v

    torch._dynamo.reset()
    (status,) = foreshock.sites(Buffered(), torch.randn(B, S, H * D), torch.ones(B, S))
    assert (status.site.causal, status.site.masked) == (True, False)


def test_with_other_lengths_nothing_is_called_causal() -> None:
    class Cross(Attention):
        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            q, k, v = (y(x).view(*x.shape[:2], H, D).transpose(1, 2) for y in (self.q, self.k, self.v))
            q = q[:, :, 2:]
            return (q @ k.mT + torch.full((S - 2, S), -math.inf).triu(3)).softmax(-1) @ v

    torch._dynamo.reset()
    (status,) = foreshock.sites(Cross(), torch.randn(B, S, H * D), torch.ones(B, S))
    assert (status.site.causal, status.site.masked) == (False, True)
