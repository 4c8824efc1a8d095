"""Exchanges between ranks in mid-graph, captured as any rank of a job that is not there (torch's fake process group)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from projected import HIDDEN, Attention, D, H, x
from torch import Tensor, distributed
from torch.distributed._functional_collectives import all_gather_single_autograd, all_to_all_single_autograd
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from foreshock import Site, sites

RANKS = 2


@contextmanager
def rank(number: int) -> Iterator[None]:
    distributed.init_process_group("fake", rank=number, world_size=RANKS, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def swap(y: Tensor) -> Tensor:
    return all_to_all_single_autograd(y.contiguous(), None, None, distributed.group.WORLD)


def swap_in_place(y: Tensor) -> Tensor:
    out = torch.empty_like(y.contiguous())
    distributed.all_to_all_single(out, y.contiguous())
    return out


class Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return swap_in_place(y)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> Tensor:
        return swap_in_place(y)


def found(call: Callable[[Tensor, Tensor, Tensor], Tensor], number: int) -> Site:
    """The one site of an attention that ``call`` makes of q, k and v, ``[B, heads, S, h]``, on a rank."""
    torch._dynamo.reset()  # guards hold the group of the test before
    with rank(number):
        (status,) = sites(Attention(call), x())
    return status.site


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("number", range(RANKS))
@pytest.mark.parametrize("exchange", [swap, swap_in_place, Swap.apply])
def test_heads_that_were_swapped_for_positions_are_those_of_this_rank(number: int, exchange: Any) -> None:
    def to_heads(y: Tensor) -> Tensor:  # [B, H, S, h] -> [B, H / ranks, ranks * S, h]
        return exchange(y.unflatten(1, (RANKS, -1)).transpose(0, 1)).permute(1, 2, 0, 3, 4).flatten(2, 3)

    site = found(lambda q, k, v: attend(*(to_heads(y) for y in (q, k, v))), number)
    assert site.heads == H // RANKS
    assert {name: site.facts[name] for name in ("head_offset", "heads_of", "kv_head_offset", "kv_heads_of")} == {
        "head_offset": number * H // RANKS,
        "heads_of": H,
        "kv_head_offset": number * H // RANKS,
        "kv_heads_of": H,
    }
    assert site.facts["losses"] == RANKS
    assert site.q_weight is not None
    rows = site.q_weight.index.reshape(-1).tolist()
    assert rows == list(range(number * HIDDEN // RANKS, (number + 1) * HIDDEN // RANKS))


def test_a_batch_that_is_swapped_leaves_heads_what_they_are() -> None:
    site = found(lambda q, k, v: attend(*(swap(y) for y in (q, k, v))), 1)
    assert (site.heads, site.facts.get("heads_of"), site.facts.get("losses")) == (H, None, None)
    assert site.q_weight is not None
    assert site.q_weight.heads == H


def test_gathered_positions_lead_to_the_same_channels() -> None:
    def gathered(y: Tensor) -> Tensor:
        return all_gather_single_autograd(y.contiguous(), 2, distributed.group.WORLD)

    site = found(lambda q, k, v: functional.scaled_dot_product_attention(q, gathered(k), gathered(v)), 1)
    assert site.k_weight is not None
    assert site.k_weight.index.reshape(-1).tolist() == list(range(H * D))


def test_gathered_channels_are_not_this_ranks() -> None:
    """Heads of several ranks come from weights that were divided by hand: this rank's rows do not stand for another's."""

    def gathered(y: Tensor) -> Tensor:
        return all_gather_single_autograd(y.contiguous(), 1, distributed.group.WORLD)

    site = found(lambda q, k, v: attend(*(gathered(y) for y in (q, k, v))), 0)
    assert (site.heads, site.q_weight, site.k_weight) == (RANKS * H, None, None)


def test_unequal_blocks_are_not_followed() -> None:
    def to_heads(y: Tensor) -> Tensor:  # three heads, of which one goes to the other rank
        return all_to_all_single_autograd(y[0, :3].contiguous(), [2, 1], [2, 1], distributed.group.WORLD)[None]

    site = found(lambda q, k, v: attend(*(to_heads(y) for y in (q, k, v))), 1)
    assert (site.heads, site.q_weight, site.k_weight) == (3, None, None)
