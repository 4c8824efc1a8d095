"""Ops that choose along an axis of scores: topk, argmax, max, sort, argsort, hard Gumbel softmax, comparisons with a threshold."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from foreshock.patterns.coordinates import number
from foreshock.patterns.ops import args, argument, op, shape, tensor

_COMPARISONS = {"gt": 0, "ge": 0, "lt": 1, "le": 1}  # which operand is the larger one where it holds
SELECTIONS = frozenset({"topk", "argmax", "max", "sort", "argsort", "gumbel_softmax", *_COMPARISONS})


@dataclass(frozen=True)
class Selection:
    """A choice along ``axis`` of ``scores``: ``chosen`` holds positions, or with ``mask`` whether each is taken.

    ``kind`` is "topk", "argmax", "sort" or "threshold"; ``top_k`` how many are taken, None where the number varies.
    ``inverted``: the comparison holds for what is not taken.
    """

    node: Node
    kind: str
    scores: Node
    axis: int
    chosen: Node
    top_k: int | None
    mask: bool = False
    inverted: bool = False

    @property
    def size(self) -> int:
        return (shape(self.scores) or ())[self.axis]


def selections(node: Node) -> list[Selection] | str:
    """What ``node`` may choose along, or why it chooses nothing: "" where nobody would think it did."""
    name = op(node)
    if name in _COMPARISONS:
        return _comparison(node, name)
    scores = argument(node, 0, "input")
    sizes, fake = shape(scores), tensor(scores)
    if not sizes or fake is None or not fake.is_floating_point():
        return ""
    if name == "topk":
        found = _topk(node, scores, sizes)
    elif name == "gumbel_softmax":
        axis = argument(node, 4, "dim", -1) % len(sizes)
        found = Selection(node, "argmax", scores, axis, node, 1, mask=True) if argument(node, 2, "hard", False) else ""
    elif name in ("argmax", "max"):
        found = _argmax(node, name, scores, sizes)
    else:
        found = _sort(node, name, scores, sizes)
    return found if isinstance(found, str) else [found]


def _result(node: Node, index: int) -> Node | None:
    return next((user for user in node.users if op(user) == "getitem" and args(user)[1] == index), None)


def _topk(node: Node, scores: Node, sizes: tuple[int, ...]) -> Selection | str:
    top_k, axis = number(argument(node, 1, "k")), argument(node, 2, "dim", -1) % len(sizes)
    if top_k is None:
        return "its k is not a constant"
    chosen = _result(node, 1)
    if chosen is None:
        return "the chosen indices are not used"
    taken = _first_of(chosen, axis, len(sizes)) or (chosen, top_k)
    return Selection(node, "topk", scores, axis, *taken)


def _argmax(node: Node, name: str, scores: Node, sizes: tuple[int, ...]) -> Selection | str:
    axis = argument(node, 1, "dim")
    if type(axis) is not int:
        return ""
    chosen = node if name == "argmax" else _result(node, 1)
    if chosen is None or not chosen.users:
        return ""
    return Selection(node, "argmax", scores, axis % len(sizes), chosen, 1)


def _sort(node: Node, name: str, scores: Node, sizes: tuple[int, ...]) -> Selection | str:
    axis = argument(node, 1, "dim", -1) % len(sizes)
    chosen = node if name == "argsort" else _result(node, 1)
    if chosen is None or not chosen.users:
        return "the order it sorts into is not used"
    taken = _first_of(chosen, axis, len(sizes))
    if taken is None:
        return "sorts its scores and takes no fixed number of them"
    return Selection(node, "sort", scores, axis, *taken)


def _first_of(chosen: Node, axis: int, axes: int) -> tuple[Node, int] | None:
    """Where all that is read of ``chosen`` are its entries up to some position along ``axis``, or the last ones: that slice."""
    ends: dict[Node, int] = {}
    for user in chosen.users:
        size = _slice(user, axis, axes)
        if size is None:
            return None
        ends[user] = size
    largest = max(ends, key=lambda user: ends[user], default=None)
    return None if largest is None else (largest, ends[largest])


def _slice(user: Node, axis: int, axes: int) -> int | None:
    """The length of a slice along ``axis`` alone, or None if ``user`` is something else."""
    before, after = (shape(args(user)[0]) if args(user) else None), shape(user)
    if before is None or after is None or len(before) != len(after) or op(user) not in ("getitem", "narrow"):
        return None
    if op(user) == "getitem":
        index = args(user)[1] if isinstance(args(user)[1], tuple) else (args(user)[1],)
        if any(not isinstance(part, slice) and part is not Ellipsis for part in index):
            return None
    others = [a for a in range(axes) if a != axis]
    return after[axis] if after[axis] < before[axis] and all(before[a] == after[a] for a in others) else None


def _comparison(node: Node, name: str) -> list[Selection] | str:
    """Scores above a threshold; each operand may be the scores."""
    operands, sizes = args(node)[:2], shape(node)
    if not sizes or len(operands) < 2:
        return ""
    found = []
    for position, operand in enumerate(operands):
        fake = tensor(operand)
        if fake is None or not fake.is_floating_point() or shape(operand) != sizes:
            continue
        inverted = _COMPARISONS[name] != position
        found.append(Selection(node, "threshold", operand, len(sizes) - 1, node, None, True, inverted))
    return found or ""
