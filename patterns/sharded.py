"""Tensor parallelism: tensors of which each rank has a part (`DTensor`), as graphs see them.

A `DTensor` in a graph has the sizes of the whole, and elements are followed in the whole's coordinates: what moves it between
ranks changes no element. Where a graph takes the part of this rank out (``to_local``), or makes one of such parts
(``from_local``), coordinates move by where the part begins. At the end of a trail the positions on a weight become those on
this rank's part of it, so that nothing is ever gathered to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.fx import Node

from foreshock.patterns.coordinates import Columns, Positions, flat, unflat
from foreshock.patterns.ops import args, shape, value
from foreshock.records import Stage


@dataclass(frozen=True, slots=True)
class Part:
    """This rank's part of a tensor of ``whole`` sizes: ``sizes`` elements along each axis, from ``start`` on."""

    whole: tuple[int, ...]
    start: tuple[int, ...]
    sizes: tuple[int, ...]

    def inside(self, c: Columns) -> Columns | None:
        """Coordinates of the whole -> of the part; None where one is another rank's."""
        moved = tuple(column - start for column, start in zip(c, self.start, strict=True))
        met = zip(moved, self.sizes, strict=True)
        return moved if all(np.all((column >= 0) & (column < n)) for column, n in met) else None


def is_sharded(node: Any) -> bool:
    """Whether ``node`` is a `DTensor`."""
    return hasattr(value(node), "placements")


def part_of(node: Node) -> Part | str:
    """Of a `DTensor`, as its mesh and placements say: torch cuts an axis into equal pieces, the last ones smaller or empty."""
    found, whole = value(node), shape(node) or ()
    start, sizes = [0] * len(whole), list(whole)
    for at, ranks, placement in zip(
        found.device_mesh.get_coordinate(), found.device_mesh.shape, found.placements, strict=True
    ):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            return f"{node.name}: laid out over ranks as {placement}"
        axis = placement.dim % len(whole)
        piece = -(-sizes[axis] // ranks)
        begin = min(at * piece, sizes[axis])
        start[axis] += begin
        sizes[axis] = min(piece, sizes[axis] - begin)
    return Part(whole, tuple(start), tuple(sizes))


def _to_local(node: Node, c: Columns) -> Columns | None:
    part = part_of(args(node)[0]) if is_sharded(args(node)[0]) else ""
    return tuple(x + at for x, at in zip(c, part.start, strict=True)) if isinstance(part, Part) else None


def _from_local(node: Node, c: Columns) -> Columns | None:
    """All but channels are exchangeable: of another rank's tokens this rank's stand for them."""
    part = part_of(node) if is_sharded(node) else ""
    if not isinstance(part, Part) or 0 in part.sizes:
        return None
    met = zip(c[:-1], part.start, part.sizes, strict=False)
    return part.inside((*(np.clip(x, at, at + n - 1) if at or n else x for x, at, n in met), *c[-1:]))


def _whole(node: Node, c: Columns) -> Columns | None:
    return c if shape(node) == shape(args(node)[0]) else None


RULES: Mapping[str, Callable[[Node, Columns], Columns | None]] = {
    "to_local": _to_local,
    "from_local": _from_local,
    "redistribute": _whole,
    "full_tensor": _whole,
}


def on_this_rank(stage: Stage, weight: Node, gains: Sequence[Node]) -> Stage | str:
    """``stage``, made for whole parameters, for this rank's parts of them; or why these do not hold what it reads."""
    moved = _moved(stage.index, weight, stage.axes)
    found = []
    for gain, (positions, offset) in zip(gains, stage.gains, strict=True):
        of_gain = _moved(positions, gain, tuple(range(len(shape(gain) or ()))))
        if isinstance(of_gain, str):
            return of_gain
        found.append((of_gain, offset))
    return moved if isinstance(moved, str) else replace(stage, index=moved, gains=tuple(found))


def _moved(index: Positions, node: Node, axes: tuple[int, ...]) -> Positions | str:
    """Positions on the flattened ``axes`` of a parameter -> on those of this rank's part of it; the other axes must be whole."""
    if not is_sharded(node):
        return index
    part = part_of(node)
    if isinstance(part, str):
        return part
    if any(n != whole for a, (n, whole) in enumerate(zip(part.sizes, part.whole, strict=True)) if a not in axes):
        return f"{node.name}: a rank has a part of each row"
    c: list[Any] = [0] * len(part.whole)
    for axis, column in zip(axes, unflat(index, [part.whole[a] for a in axes]), strict=True):
        c[axis] = column
    own = Part(*(tuple(of[a] for a in axes) for of in (part.whole, part.start, part.sizes)))
    inside = own.inside(tuple(c[a] for a in axes))
    if inside is None:
        return f"{node.name}: its rows are on another rank"
    return np.array(np.broadcast_to(flat(inside, own.sizes), index.shape))


def among_all(weight: Node, axes: tuple[int, ...], pieces: int) -> tuple[int, int] | None:
    """Of ``pieces`` (heads, experts) that this rank's part of ``weight`` holds: the number of the first in the whole, and how many
    the whole has. None for a tensor that is no `DTensor`, and where pieces are cut."""
    part = part_of(weight) if is_sharded(weight) else ""
    if not isinstance(part, Part):
        return None
    cut = [a for a in axes if part.sizes[a] != part.whole[a]]
    if not cut:
        return 0, pieces
    (axis, *more) = cut
    each, left = divmod(part.sizes[axis], pieces)
    if more or left or not each or part.start[axis] % each or part.whole[axis] % each:
        return None
    return part.start[axis] // each, part.whole[axis] // each
