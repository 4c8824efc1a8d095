"""Context parallelism: what ranks with the same weights exchange in mid-graph, as this rank's graph sees it.

Ranks divide the positions of a sequence. Around attention they swap, so that each has all positions of some heads (an all-to-all
along the first axis: block j of the result is what rank j had in the block of this rank), or each gathers the keys of all (block j
is what rank j had). All run the same program on the same weights: at the same place in its own tensor a rank has the same channel
of another token, and tokens are exchangeable. So elements are followed into this rank's own tensor, where all that are asked for
come from one rank; channels that come from several are those of weights that were divided by hand, and the trail dies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch.fx import GraphModule, Node

from foreshock.patterns.coordinates import Columns, number
from foreshock.patterns.ops import args, op, shape

SWAP, GATHER = "_c10d_functional::all_to_all_single", "_c10d_functional::all_gather_into_tensor"
_GROUP = {SWAP: 3, GATHER: 2}
_PLACE = "place among ranks"


def note_places(module: GraphModule, place_in: Callable[[Any], tuple[int, int] | None]) -> None:
    """Take down at every exchange this rank's place in the group and its size, as ``place_in(group)`` knows them."""
    for node in (node for own in module.modules() if isinstance(own, GraphModule) for node in own.graph.nodes):
        at = _GROUP.get(op(node))
        if at is not None and len(args(node)) > at:
            node.meta[_PLACE] = place_in(args(node)[at])


def _wait(node: Node, c: Columns) -> Columns | None:
    return c


def _swap(node: Node, c: Columns) -> Columns | None:
    place, block = node.meta.get(_PLACE), _block(node)
    splits = [number(size) for of in args(node)[1:3] for size in of or ()]
    if place is None or any(size != block for size in splits) or sender(node, c) is None:
        return None
    return (place[0] * block + c[0] % block, *c[1:])


def _gather(node: Node, c: Columns) -> Columns | None:
    return None if sender(node, c) is None else (c[0] % _block(node), *c[1:])


def sender(node: Node, c: Columns) -> int | None:
    """The one rank from which the elements at ``c`` of an exchange come; None for several, and for what is no exchange."""
    block = _block(node) if op(node) in _GROUP else 0
    ranks = np.unique(np.asarray(c[0]) // block).tolist() if block else []
    return ranks[0] if len(ranks) == 1 else None


def _block(node: Node) -> int:
    """The length, along the first axis, of what one rank sends; 0 where blocks are not known to be equal."""
    whole, sent = shape(node) or (0,), shape(args(node)[0]) or (0,)
    if op(node) == GATHER:
        return sent[0]
    place = node.meta.get(_PLACE)
    return whole[0] // place[1] if place is not None and whole == sent else 0


RULES: Mapping[str, Callable[[Node, Columns], Columns | None]] = {
    "_c10d_functional::wait_tensor": _wait,
    SWAP: _swap,
    GATHER: _gather,
}


def swaps(path: Iterable[Node]) -> list[tuple[Node, int, int]]:
    """Every all-to-all on ``path``: what goes into it, this rank's place and the number of ranks."""
    met = [node for node in path if op(node) == SWAP and node.meta.get(_PLACE)]
    return [(args(node)[0], *node.meta[_PLACE]) for node in met]
