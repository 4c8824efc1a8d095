"""What runs along each axis of the tensors at an attention: batch, heads, positions or channels.

All forms of attention share a frame: the axes of their logits, one of them running over keys. Each tensor at the boundary says
where an element of the frame lies in it. The frame's axes are cut into the smallest pieces that any tensor tells apart
(`[B*H, S, T]` of one and `[B, H, S, T]` of another), and each piece is named once: keys and queries by how they move the
operands; heads by the weights, for the projection's channel changes from head to head and not along a batch. Where no weight is
reached, heads stand just before the queries. The names give every tensor its layout (see `foreshock.layout`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.fx import Node

from foreshock.layout import canonical, parse
from foreshock.patterns.coordinates import Columns, Positions, flat
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import shape
from foreshock.patterns.pullback import Pull


@dataclass(frozen=True)
class Operand:
    """A tensor at the boundary: ``place`` maps an element of the frame to where it lies (0 along its own ``channels``)."""

    node: Node
    place: Callable[[Columns], Columns | None]
    channels: tuple[int, ...] = ()
    reader: Node | None = None
    sizes: tuple[int, ...] | None = None  # where they are not those of ``node``

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes or shape(self.node) or ()


class Piece(NamedTuple):
    """Part of an axis of the frame: ``size`` steps of ``stride``."""

    axis: int
    stride: int
    size: int


Moves = dict[Piece, dict[int, int]]  # how far one step of a piece moves a tensor along each of its axes


def layouts(
    view: GraphView,
    frame: tuple[int, ...],
    operands: Mapping[str, Operand],
    keys: int,
    queries: int | None = None,
) -> dict[str, str] | str:
    """The layout of every operand, or why there is none.

    ``operands`` are by role, "q" and "k" among them; ``keys`` is the axis of ``frame`` along which the softmax runs, ``queries``
    that of query positions where the form of the call tells it.
    """
    lead = [axis for axis in range(len(frame)) if axis not in (keys, queries)]
    columns = {role: [_along(operand, frame, axis) for axis in range(len(frame))] for role, operand in operands.items()}
    origins = {
        role: {
            axis: _channels(view, operands[role], columns[role][axis], frame[axis]) for axis in lead if frame[axis] > 1
        }
        for role in ("q", "k", "v")
        if role in operands
    }
    if any(c is None for of_role in columns.values() for c in of_role):
        return "the axes of its operands are not followed"
    pieces: list[Piece] = []
    for axis, size in enumerate(frame):
        places = [column for of_role in columns.values() for column in of_role[axis] or ()]
        labels = [found[axis] for found in origins.values() if axis in found]
        pieces += _pieces(axis, size, places, [label for label in labels if label is not None])
    moves = {role: {p: _steps(of_role[p.axis] or (), p.stride) for p in pieces} for role, of_role in columns.items()}
    blind = all(label is None for label in origins["q"].values())
    names = _names(pieces, moves, origins, lead, keys, queries)
    if blind:
        names |= _by_keys(view, operands["k"], frame, keys, names)
    order = _order(pieces, names, moves)
    found: dict[str, str] = {}
    for role, operand in operands.items():
        keyed = {p: name if p.axis != keys or role in ("k", "v") else "d" for p, name in names.items()}
        layout = _layout(operand, moves[role], keyed, order)
        if layout is None:
            return f"the axes of {role} {list(operand.shape)} are not understood"
        found[role] = layout
    return found


def heads_of(layout: str, sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """What a tensor of ``sizes`` comes to as ``[B, H, S, D]``."""
    batch, heads, positions, channels = canonical(torch.empty(tuple(sizes), device="meta"), layout).shape
    return batch, heads, positions, channels


def channels_of(layout: str, sizes: Sequence[int], *, first: bool = False) -> Columns:
    """Coordinates of every head's channels at the last (or ``first``) position: columns of a grid ``[heads, channels]``."""
    axes = [[(name.partition("=")[0], int(name.partition("=")[2] or 0)) for name in axis] for axis in parse(layout)]
    for joined, size in zip(axes, sizes, strict=True):
        free = next((i for i, (_, given) in enumerate(joined) if not given), 0)
        joined[free] = (
            joined[free][0],
            size // math.prod(given or 1 for i, (_, given) in enumerate(joined) if i != free),
        )
    extent = {name: size for joined in axes for name, size in joined}
    at: dict[str, Any] = {name: extent[name] - 1 if name[0] == "s" and not first else 0 for name in extent}
    for letter, grid in (("h", (-1, 1)), ("d", (1, -1))):
        names = sorted(name for name in extent if name[0] == letter)
        inner = [extent[name] for name in names]
        found = np.unravel_index(np.arange(math.prod(inner)), inner) if names else ()
        at |= {name: column.astype(np.int64).reshape(grid) for name, column in zip(names, found, strict=True)}
    return tuple(flat([at[name] for name, _ in joined], [size for _, size in joined]) for joined in axes)


def _along(operand: Operand, frame: tuple[int, ...], axis: int) -> Columns | None:
    """Where the elements of the frame along one axis lie, the other axes at 0."""
    return operand.place(tuple(np.arange(frame[axis]) if a == axis else 0 for a in range(len(frame))))


def _channels(view: GraphView, operand: Operand, c: Columns | None, count: int) -> Positions | None:
    """Which channels of which projection an operand's elements are, as labels; None where no weight is reached."""
    if c is None or all(np.ndim(column) == 0 for column in c):
        return None
    labels: list[Positions] = []
    ends = [dict.fromkeys(operand.channels, 0), {axis: operand.shape[axis] - 1 for axis in operand.channels}]
    for end in ends:
        pull = Pull(view)
        at = tuple(end.get(axis, column) for axis, column in enumerate(c))
        trails = pull.pieces(operand.node, at, operand.reader)
        if isinstance(trails, str):
            continue
        label, seen = np.zeros(count, dtype=np.int64), 0
        for trail in trails:
            product = pull.projection(trail.view, trail.node)
            where = np.arange(count) if trail.where is None else trail.where
            if product is None:
                return None  # elements of a parameter itself: positions differ as heads do
            met, side = product
            columns = [
                x for x, letter in zip(trail.coordinates, met.result, strict=True) if letter in met.letters[side]
            ]
            rows = np.stack([np.broadcast_to(column, len(where)) for column in (*columns, 0)], axis=1)
            _, inverse = np.unique(rows, axis=0, return_inverse=True)
            label[where] = inverse.reshape(-1) + seen
            seen += len(where)
        labels.append(label)
    return None if not labels else labels[0] * count + labels[-1] if len(labels) > 1 else labels[0]


def _pieces(axis: int, size: int, places: Sequence[Any], labels: Sequence[Positions]) -> list[Piece]:
    """An axis cut wherever an operand's step along it changes or labels begin to repeat, the slowest piece first."""
    marks = {size}.union(*(_bends(column) for column in places if np.ndim(column)), *map(_period, labels))
    chain = [1]
    for mark in sorted(marks):
        if mark > chain[-1] and mark % chain[-1] == 0 and size % mark == 0:
            chain.append(mark)
    return [Piece(axis, low, high // low) for low, high in zip(chain[-2::-1], chain[:0:-1], strict=True)]


def _bends(column: Positions) -> set[int]:
    """After how many elements a place first moves, and after how many it no longer moves by the same step."""
    size, changes = len(column), np.flatnonzero(np.diff(column))
    if not len(changes):
        return set()
    stride = int(changes[0]) + 1
    marks = {stride}
    if size % stride:
        return marks
    steps = np.diff(column[::stride])
    bends = np.flatnonzero(steps != steps[0])
    if len(bends):
        length = stride * (int(bends[0]) + 1)
        marks.add(length)
        if size % length == 0 and length < size:
            marks |= {length * mark for mark in _bends(column[::length])}
    return marks


def _period(labels: Positions) -> set[int]:
    """After how many elements labels first change, and after how many they repeat."""
    size, changes = len(labels), np.flatnonzero(np.diff(labels))
    if not len(changes):
        return set()
    stride = int(changes[0]) + 1
    lengths = (n for n in range(2 * stride, size, stride) if size % n == 0)
    return {stride, *itertools.islice((n for n in lengths if (labels.reshape(-1, n) == labels[:n]).all()), 1)}


def _steps(c: Columns, stride: int) -> dict[int, int]:
    moved = {axis: int(column[stride] - column[0]) for axis, column in enumerate(c) if np.ndim(column)}
    return {axis: step for axis, step in moved.items() if step}


def _names(
    pieces: list[Piece],
    moves: Mapping[str, Moves],
    origins: Mapping[str, Mapping[int, Positions | None]],
    lead: Sequence[int],
    keys: int,
    queries: int | None,
) -> dict[Piece, str]:
    """The class of each piece: s of positions, h of heads, b of all else."""
    known = {p: "s" for p in pieces if p.axis in (keys, queries)}
    rest = [p for p in pieces if p not in known]
    labels = [(axis, label) for found in origins.values() for axis, label in found.items() if label is not None]
    heads = {p for p in rest if any(axis == p.axis and label[p.stride] != label[0] for axis, label in labels)}
    blind = all(label is None for label in origins["q"].values())
    alone = [p for p in rest if moves["q"][p] and not moves["k"][p]]
    if queries is None:
        still = [p for p in alone if p not in heads]
        if blind:  # of several that move the queries alone, the innermost are positions
            still = [p for p in still if p.axis == max(other.axis for other in still)]
        known |= dict.fromkeys(still, "s")
        heads |= {p for p in alone if p not in still}
    shared = [p for p in rest if p not in alone]
    if blind and queries is not None and len(lead) > 1:  # the call says where its heads are
        heads |= {p for p in rest if p.axis == lead[-1]}
    elif blind and not heads and shared:
        outside = [axis for axis in lead if axis not in {p.axis for p in alone}]
        inner = [p for p in shared if p.axis == outside[-1]]
        heads |= set(inner if len(outside) > 1 else inner[-1:] if len(inner) > 1 else ())
    return {p: known.get(p, "h" if p in heads else "b") for p in pieces}


def _by_keys(
    view: GraphView, operand: Operand, frame: tuple[int, ...], keys: int, names: Mapping[Piece, str]
) -> dict[Piece, str]:
    """What the last key tells where no weight is reached from the queries: the same elements again beside other heads are heads
    repeated, and the same channels of other tokens are a batch."""
    found: dict[Piece, str] = {}
    for p in (p for p, name in names.items() if name != "s" and p.axis != keys):
        beside = any(name == "h" for other, name in names.items() if other.axis == p.axis and other is not p)
        if names[p] != "h" and not beside:
            continue
        at = (np.array([0, p.stride]) if a == p.axis else size - 1 if a == keys else 0 for a, size in enumerate(frame))
        ends = operand.place(tuple(at))
        if ends is None or all(np.ndim(x) == 0 for x in ends):
            continue
        trail = Pull(view)(operand.node, ends, operand.reader)
        product = None if trail is None else Pull(view).projection(trail.view, trail.node)
        if trail is None or product is None:
            continue
        met, side = product
        moved = {letter for letter, x in zip(met.result, trail.coordinates, strict=True) if np.unique(x).size > 1}
        if moved and moved.isdisjoint(met.letters[side]):
            found[p] = "b"
        elif not moved and beside:
            found[p] = "h"
    return found


def _order(pieces: list[Piece], names: Mapping[Piece, str], moves: Mapping[str, Moves]) -> dict[Piece, int]:
    """The order in which pieces of one name are joined: query heads of one key head stand together."""
    ranked = sorted(pieces, key=lambda p: (names[p], names[p] == "h" and not moves["k"][p], p.axis, -p.stride))
    return {piece: position for position, piece in enumerate(ranked)}


def _layout(operand: Operand, moves: Moves, names: Mapping[Piece, str], order: Mapping[Piece, int]) -> str | None:
    sizes = operand.shape
    parts: list[list[tuple[str, int, int]]] = []  # of each axis: name, size and place in the order
    bare: list[int] = []
    for axis, size in enumerate(sizes):
        held = sorted((p for p in moves if axis in moves[p]), key=lambda p: -abs(moves[p][axis]))
        if axis in operand.channels:
            if held:
                return None
            parts.append([("d", size, axis)])
            continue
        reach = 1
        for p in reversed(held):
            if moves[p][axis] != reach:
                return None
            reach *= p.size
        if reach != size or any(len(moves[p]) > 1 for p in held):
            return None
        joined: list[tuple[str, int, int]] = []
        for p in held:
            if joined and joined[-1][0] == names[p] and order[p] == joined[-1][2] + 1:
                joined[-1] = (names[p], joined[-1][1] * p.size, order[p])
            else:
                joined.append((names[p], p.size, order[p]))
        bare += [axis] * (not held)
        parts.append(joined)
    present = {name for joined in parts for name, _, _ in joined}
    spare = [name for name in ("s", "h", *"b" * len(sizes)) if name == "b" or name not in present]
    for axis, name in zip(reversed(bare), spare, strict=False):
        parts[axis] = [(name, 1, axis - len(sizes))]
    return _written(parts)


def _written(parts: list[list[tuple[str, int, int]]]) -> str:
    """``[[("b", 2, 0), ("h", 4, 1)], [("s", ...)]]`` -> ``"(b h=4) s"``."""
    ranks = {name: sorted(rank for joined in parts for n, _, rank in joined if n == name) for name in "bhsd"}

    def spelled(name: str, rank: int) -> str:
        return name if len(ranks[name]) == 1 else f"{name}{ranks[name].index(rank)}"

    words = []
    for joined in parts:
        free = next((i for i, (name, _, _) in enumerate(joined) if name == "b"), 0)
        names = [spelled(name, rank) + ("" if i == free else f"={size}") for i, (name, size, rank) in enumerate(joined)]
        words.append(names[0] if len(names) == 1 else f"({' '.join(names)})")
    return " ".join(words)
