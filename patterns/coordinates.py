"""Which element of its operand each element of a view is.

Coordinates are columns, one an axis: numbers or integer arrays that broadcast to the grid of elements followed. A column that is
the same for all elements stays a number, and one that varies with the head alone stays a column of heads, so that following
every channel of every head costs little more than following one.

A rule takes a node and coordinates of its result and gives those of its first operand, or None where it cannot tell. Complex
tensors have a last axis of 2 (see `foreshock.patterns.ops.shape`), which PyTorch does not count as an axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Node

from foreshock.patterns.ops import args, argument, hint, op, shape, tensor, value

Column = Any  # int, or an int64 array
Columns = tuple[Column, ...]
Positions = npt.NDArray[np.int64]


def number(x: Any) -> int | None:
    """An integer argument, symbolic ones as they were in the capture."""
    found = value(x) if isinstance(x, Node) else x
    if isinstance(found, bool) or found is None or not (isinstance(found, int) or hasattr(found, "node")):
        return None
    return hint(found)


def axes(node: Any) -> int:
    """Axes as PyTorch counts them."""
    found = tensor(node)
    return 0 if found is None else found.dim()


def corner(node: Node) -> Columns:
    """The last element."""
    return tuple(size - 1 for size in shape(node) or ())


def flat(c: Sequence[Column], sizes: Sequence[int]) -> Column:
    """The position of elements in row-major order."""
    position: Column = 0
    for column, size in zip(c, sizes, strict=True):
        position = position * size + column if size > 1 else position
    return position


def unflat(position: Column, sizes: Sequence[int]) -> list[Column]:
    """The inverse of `flat`."""
    found: list[Column] = []
    left = math.prod(sizes)
    for size in sizes:
        left //= size
        if size == 1:
            found.append(0)
        else:
            found.append(position // left)
            position = position % left if left > 1 else 0
    return found


def grid_of(c: Columns) -> tuple[int, ...]:
    """The grid that columns broadcast to."""
    shapes = {column.shape for column in c if not isinstance(column, int)}
    return shapes.pop() if len(shapes) == 1 else np.broadcast_shapes(*shapes)


def taken(c: Columns, grid: tuple[int, ...], rows: Positions) -> Columns:
    """The elements at flat positions ``rows`` of the grid, as columns of that length."""
    return tuple(column if isinstance(column, int) else np.broadcast_to(column, grid).reshape(-1)[rows] for column in c)


def broadcast(c: Columns, sizes: tuple[int, ...]) -> Columns:
    """Coordinates of a broadcast result -> those of an operand of ``sizes``. A single element that is listed stays listed."""
    kept = c[len(c) - len(sizes) :]
    return tuple(0 if size == 1 and np.size(x) > 1 else x for x, size in zip(kept, sizes, strict=True))


def regrouped(c: Columns, out: tuple[int, ...], source: tuple[int, ...]) -> Columns | None:
    """Coordinates under another shape of the same elements, axis by axis where the shapes allow."""
    if math.prod(out) != math.prod(source) or 0 in out:
        return None
    found: list[Column] = []
    i = j = 0
    while i < len(out) or j < len(source):
        first = i
        here, there = out[i : i + 1], source[j : j + 1]
        i, j = i + len(here), j + len(there)
        while math.prod(here) != math.prod(there):
            if math.prod(here) < math.prod(there):
                here, i = (*here, out[i]), i + 1
            else:
                there, j = (*there, source[j]), j + 1
        if here == there:
            found += c[first:i]
        else:
            found += unflat(flat(c[first:i], here), there)
    return tuple(found)


def _reshape(node: Node, c: Columns) -> Columns | None:
    out, source = shape(node), shape(args(node)[0])
    return None if out is None or source is None else regrouped(c, out, source)


def _permuted(order: Sequence[int], c: Columns) -> Columns:
    """Output axis ``a`` is input axis ``order[a]``; axes beyond those named stay."""
    moved = list(c)
    for a, b in enumerate(order):
        moved[b] = c[a]
    return tuple(moved)


def _transpose(node: Node, c: Columns) -> Columns:
    dims = axes(node)
    first, second = (
        argument(node, 1, "dim0", argument(node, 1, "axis0")) % dims,
        argument(node, 2, "dim1", argument(node, 2, "axis1")) % dims,
    )
    order = list(range(dims))
    order[first], order[second] = second, first
    return _permuted(order, c)


def _permute(node: Node, c: Columns) -> Columns:
    dims = argument(node, 1, "dims")
    dims = dims if isinstance(dims, list | tuple) else args(node)[1:]
    return _permuted([int(dim) % axes(node) for dim in dims], c)


def _movedim(node: Node, c: Columns) -> Columns:
    count = axes(node)
    source, target = (
        [int(dim) % count for dim in (dims if isinstance(dims, list | tuple) else [dims])]
        for dims in (argument(node, 1, "source"), argument(node, 2, "destination"))
    )
    order = [-1] * count
    for a, b in zip(source, target, strict=True):
        order[b] = a
    rest = iter(axis for axis in range(count) if axis not in source)
    return _permuted([next(rest) if axis < 0 else axis for axis in order], c)


def _matrix_transpose(node: Node, c: Columns) -> Columns:
    dims = axes(node)
    return _permuted([*range(dims - 2), dims - 1, dims - 2], c) if dims > 1 else c


def _expand(node: Node, c: Columns) -> Columns | None:
    source = shape(args(node)[0])
    return None if source is None else broadcast(c, source)


def _repeat_interleave(node: Node, c: Columns) -> Columns | None:
    repeats, axis = number(argument(node, 1, "repeats")), argument(node, 2, "dim")
    if repeats is None or axis is None:
        return None
    return _moved(c, axis % axes(node), lambda column: column // repeats)


def _repeat(node: Node, c: Columns) -> Columns | None:
    source = shape(args(node)[0])
    if source is None:
        return None
    return tuple(column % size for column, size in zip(c[len(c) - len(source) :], source, strict=True))


def _select(node: Node, c: Columns) -> Columns | None:
    source, index = shape(args(node)[0]), number(argument(node, 2, "index"))
    if source is None or index is None:
        return None
    axis = argument(node, 1, "dim") % axes(args(node)[0])
    return (*c[:axis], index % source[axis], *c[axis:])


def _narrow(node: Node, c: Columns) -> Columns | None:
    source, start = shape(args(node)[0]), number(argument(node, 2, "start"))
    if start is None or source is None:
        return None
    axis = argument(node, 1, "dim") % axes(node)
    return _moved(c, axis, lambda column: column + start % source[axis])


def _flip(node: Node, c: Columns) -> Columns:
    dims = argument(node, 1, "dims")
    moved, sizes = list(c), shape(node) or ()
    for dim in dims if isinstance(dims, list | tuple) else args(node)[1:]:
        moved[dim % axes(node)] = sizes[dim % axes(node)] - 1 - moved[dim % axes(node)]
    return tuple(moved)


def _roll(node: Node, c: Columns) -> Columns | None:
    shifts, dims = argument(node, 1, "shifts"), argument(node, 2, "dims")
    pairs = list(zip(*(x if isinstance(x, list | tuple) else [x] for x in (shifts, dims)), strict=False))
    if dims is None or dims == () or any(number(shift) is None for shift, _ in pairs):
        return None
    sizes = shape(node) or ()
    for shift, dim in pairs:
        axis = dim % axes(node)
        c = (*c[:axis], (c[axis] - (number(shift) or 0)) % sizes[axis], *c[axis + 1 :])
    return c


def _unfold(node: Node, c: Columns) -> Columns | None:
    step = number(argument(node, 3, "step"))
    if step is None or axes(node) != axes(args(node)[0]) + 1:
        return None
    axis = argument(node, 1, "dimension") % (axes(node) - 1)
    return _moved(c[:-1], axis, lambda column: column * step + c[-1])


def _moved(c: Columns, axis: int, rule: Callable[[Column], Column]) -> Columns:
    return (*c[:axis], rule(c[axis]), *c[axis + 1 :])


def _getitem(node: Node, c: Columns) -> Columns | None:
    source, index = shape(args(node)[0]), args(node)[1]
    return None if source is None else indexed(index, c, source, axes(args(node)[0]))


def indexed(index: Any, c: Columns, source: tuple[int, ...], dims: int) -> Columns | None:
    """Coordinates of ``x[index]`` -> those of ``x``, of shape ``source`` with ``dims`` axes to index."""
    parts = list(index) if isinstance(index, tuple) else [index]
    lists = [part for part in parts if isinstance(part, list)]
    numbers = [number(part) for part in parts if isinstance(part, int | Node)]
    if None in numbers or any(isinstance(part, bool) for part in parts):
        return None
    if lists and (len(lists) + len(numbers) > 1 or any(type(position) is not int for position in lists[0])):
        return None
    consumed = sum(part is not None and part is not Ellipsis for part in parts)
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts = [*parts[:at], *[slice(None)] * (dims - consumed), *parts[at + 1 :]]
    found: list[Column] = []
    out = 0
    for part in parts:
        axis = len(found)
        if part is None:
            out += 1
        elif isinstance(part, slice):
            ends = [None if end is None else number(end) for end in (part.start, part.stop, part.step)]
            if any(
                end is None and given is not None
                for end, given in zip(ends, (part.start, part.stop, part.step), strict=True)
            ):
                return None
            start, _, step = slice(*ends).indices(source[axis])
            found.append(c[out] if (start, step) == (0, 1) else c[out] * step + start)
            out += 1
        elif isinstance(part, list):  # alone among slices, a list of positions keeps its axis in place
            found.append(np.array(part, dtype=np.int64)[c[out]] % source[axis])
            out += 1
        else:
            position = number(part)
            if position is None:
                return None
            found.append(position % source[axis])
    return (*found, *c[out:])


RULES: Mapping[str, Callable[[Node, Columns], Columns | None]] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "permute": _permute,
    "movedim": _movedim,
    "t": _matrix_transpose,
    "mT": _matrix_transpose,
    "expand": _expand,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "select": _select,
    "narrow": _narrow,
    "flip": _flip,
    "roll": _roll,
    "unfold": _unfold,
    "getitem": _getitem,
}


def anywhere(node: Node, c: Columns) -> tuple[Columns, Columns] | None:
    """Where a tensor of indices chooses along an axis: coordinates in case it chose the first everywhere, and the last."""
    source, name = shape(args(node)[0]) if args(node) else None, op(node)
    if source is None:
        return None
    taken, given = 1, 1
    if name in ("index_select", "gather", "take_along_dim"):
        axis = argument(node, 1, "dim")
        if not isinstance(axis, int):
            return None
        axis %= axes(node)
    elif name == "getitem":
        parts = args(node)[1] if isinstance(args(node)[1], tuple) else (args(node)[1],)
        found = [i for i, part in enumerate(parts) if tensor(part) is not None]
        if len(found) != 1 or any(part != slice(None) for i, part in enumerate(parts) if i != found[0]):
            return None
        axis, given = found[0], axes(parts[found[0]])
        if getattr(tensor(parts[axis]), "dtype", None) == torch.bool:
            taken, given = given, 1
    else:
        return None
    ends = [tuple(size - 1 for size in source[axis : axis + taken]), (0,) * taken]
    first, last = ((*c[:axis], *end, *c[axis + given :]) for end in reversed(ends))
    return first, last


_PIECES = frozenset({"split", "chunk", "tensor_split", "unbind"})
_HOW = ("split_size_or_sections", "split_size", "chunks", "indices_or_sections", "indices", "sections")


def piece(source: Node, index: int, c: Columns) -> Columns | None:
    """Coordinates of result ``index`` of a split, chunk or unbind -> those of what was cut."""
    name = op(source)
    whole = shape(args(source)[0]) if args(source) else None
    if name not in _PIECES or whole is None:
        return None
    axis = argument(source, 1 if name == "unbind" else 2, "dim", 0) % axes(args(source)[0])
    if name == "unbind":
        return (*c[:axis], index % whole[axis], *c[axis:])
    how = next((source.kwargs[key] for key in _HOW if key in source.kwargs), None)
    start = _start(name, argument(source, 1, "", how), index, whole[axis])
    return None if start is None else _moved(c, axis, lambda column: column + start)


def _start(name: str, how: Any, index: int, length: int) -> int | None:
    """Where piece ``index`` of an axis of ``length`` begins that was cut by ``name`` with argument ``how``."""
    if isinstance(how, list | tuple):
        parts = [number(part) for part in how]
        if None in parts:
            return None
        if name == "tensor_split":
            ends = [0, *(slice(part).indices(length)[1] for part in parts)]
            return ends[index % len(ends)]
        return sum(part or 0 for part in parts[: index % len(parts)])
    count = number(how)
    if count is None:
        return None
    if name == "tensor_split":
        at = index % count
        return at * (length // count) + min(at, length % count)
    step = count if name == "split" else -(-length // count)
    return (index if index >= 0 else -(-length // step) + index) * step


def padded(node: Node, c: Columns) -> tuple[list[Node | None], int, list[int], Columns]:
    """Padding as a concatenation along the last axis; along others, where no channels are, the nearest element stands in."""
    x, pad = args(node)[0], list(argument(node, 1, "pad"))
    sizes, moved = shape(x) or (), list(c)
    for i in range(len(pad) // 2):
        axis, before = len(sizes) - 1 - i, number(pad[2 * i]) or 0
        if i:
            moved[axis] = np.clip(moved[axis] - before, 0, sizes[axis] - 1)
    before, after = (number(side) or 0 for side in pad[:2])
    return [None, x, None], len(sizes) - 1, [before, sizes[-1], after], tuple(moved)
