"""Follow single elements of a tensor back through the graph to where they came from.

Given coordinates of a node's elements, ``pull`` says which node and which of its elements they are copies (or elementwise
functions) of. Views, transposes, slices, splits, concatenations, broadcasts and rotary embeddings are each a small map on
coordinates, so that fused, interleaved and transposed projections need no case of their own.

The walk ends at a projection (linear or matmul) or a parameter. It dies at reductions, constants, buffers and trigonometry:
the cosines of a rotary embedding are no trail. Of two operands that both lead somewhere, the first wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.fx import Node

from foreshock.patterns.ops import args, argument, op, shape, tensor

Coordinates = npt.NDArray[np.int64]  # [elements, axes]

_WEIGHT_ARGUMENT = {"linear": (1, "weight"), "matmul": (1, "other"), "addmm": (2, "mat2")}
_UNARY = frozenset(
    {"identity", "cast", "neg", "dropout", "tanh", "clamp", "clip", "normalize", "view_as_complex", "view_as_real"}
)
_UNARY |= frozenset(
    {"softmax", "log_softmax", "sigmoid", "softplus", "sqrt", "relu", "nan_to_num", "masked_fill", "exp", "log"}
)
_BINARY = frozenset({"add", "sub", "mul", "div", "where", "maximum", "minimum"})
_NORMS = {"rms_norm": 1, "layer_norm": 1}


def projection_weight(node: Node) -> Any:
    """What ``node`` multiplies its input by, if it is a linear, matmul or addmm; else None."""
    where = _WEIGHT_ARGUMENT.get(op(node))
    return None if where is None else argument(node, *where, argument(node, 1, "mat2"))


@dataclass(frozen=True)
class Trail:
    """Where elements come from. ``scales`` are 1-D parameters they were multiplied by: (node, positions, offset)."""

    node: Node
    coordinates: Coordinates
    path: tuple[Node, ...] = ()
    offset: float = 0.0
    scales: tuple[tuple[Node, Coordinates, float], ...] = ()


@dataclass
class Pull:
    """One walk over one graph. ``parameters`` are the placeholders that hold parameters; ``stops`` tells why branches died."""

    parameters: Mapping[Node, Any]
    stops: list[str] = field(default_factory=list)
    _dead: set[Node] = field(default_factory=set)

    def __call__(self, node: Any, coordinates: Coordinates) -> Trail | None:
        """The trail of the elements at ``coordinates`` of ``node``, or None."""
        if not isinstance(node, Node) or node in self._dead:
            return None
        if node in self.parameters or self._is_projection(node):
            return Trail(node, coordinates)
        trail = self._step(node, coordinates)
        if trail is None:
            self._dead.add(node)
            return None
        return replace(trail, path=(*trail.path, node))

    def _is_projection(self, node: Node) -> bool:
        source = projection_weight(node)
        sizes = shape(source)
        if sizes is None or len(sizes) != 2:
            return False
        end = self(source, np.zeros((1, 2), dtype=np.int64))
        return end is not None and end.node in self.parameters

    def _stop(self, node: Node, reason: str) -> None:
        self.stops.append(f"{node.name}: {reason}")

    def _step(self, node: Node, c: Coordinates) -> Trail | None:
        name = op(node)
        if name in _BINARY:
            return self._binary(node, name, c)
        if name in _UNARY:
            return self(args(node)[0], c)
        if name in _NORMS:
            return self._norm(node, c)
        if name in ("cat", "stack"):
            return self._cat(node, name, c)
        if name == "getitem" and isinstance(args(node)[0], Node) and shape(args(node)[0]) is None:
            return self._piece(node, c)
        rule = _RULES.get(name)
        if rule is None:
            reason = (
                "a graph input (the trail was cut by a graph break)"
                if name == "placeholder"
                else f"`{name}` is no copy"
            )
            self._stop(node, reason)
            return None
        moved = rule(node, c)
        if moved is None:
            self._stop(node, f"`{name}` with these arguments is not followed")
            return None
        return self(args(node)[0], moved)

    def _binary(self, node: Node, name: str, c: Coordinates) -> Trail | None:
        operands = args(node)[1:] if name == "where" else args(node)[:2]
        main: Trail | None = None
        scales: list[tuple[Node, Coordinates, float]] = []
        for operand in operands:
            sizes = shape(operand)
            if sizes is None:
                continue
            trail = self(operand, _broadcast(c, sizes))
            if trail is None:
                continue
            if trail.node in self.parameters and len(shape(trail.node) or ()) <= 1:
                if name == "mul":
                    scales.append((trail.node, trail.coordinates, trail.offset))
                if len([x for x in operands if isinstance(x, Node)]) == 1:
                    number = next((x for x in operands if isinstance(x, int | float)), 0.0)
                    return replace(trail, offset=trail.offset + number) if name == "add" else trail
            elif main is None:
                main = trail
        return None if main is None else replace(main, scales=(*main.scales, *scales))

    def _norm(self, node: Node, c: Coordinates) -> Trail | None:
        trail = self(args(node)[0], c)
        weight = argument(node, 2, "weight")
        if trail is None or weight not in self.parameters or len(shape(weight) or ()) != 1:
            return trail
        return replace(trail, scales=(*trail.scales, (weight, c[:, -1:], 0.0)))

    def _cat(self, node: Node, name: str, c: Coordinates) -> Trail | None:
        tensors = [x for x in argument(node, 0, "tensors") if shape(x) is not None]
        if name == "cat":
            tensors = [x for x in tensors if len(shape(x) or ()) == c.shape[1]]
        axis = argument(node, 1, "dim", 0) % (_axes(tensors[0]) + (name == "stack"))
        sizes = [1 if name == "stack" else (shape(x) or ())[axis] for x in tensors]
        ends = np.cumsum(sizes)
        which = np.searchsorted(ends, c[:, axis], side="right")
        trails: dict[int, Trail] = {}
        for part in np.unique(which):
            rows = c[which == part].copy()
            if name == "stack":
                rows = np.delete(rows, axis, axis=1)
            else:
                rows[:, axis] -= ends[part] - sizes[part]
            trail = self(tensors[part], rows)
            if trail is None:
                return None
            trails[int(part)] = trail
        first = next(iter(trails.values()))
        if any(trail.node is not first.node for trail in trails.values()):
            self._stop(node, "its parts come from different projections")
            return None
        merged = np.empty((len(c), first.coordinates.shape[1]), dtype=np.int64)
        for part, trail in trails.items():
            merged[which == part] = trail.coordinates
        return replace(first, coordinates=merged, scales=_merged_scales(which, trails))

    def _piece(self, node: Node, c: Coordinates) -> Trail | None:
        """getitem(i) of split, chunk or unbind."""
        source, index = args(node)[0], args(node)[1]
        name = op(source) if isinstance(source, Node) else ""
        whole = shape(args(source)[0]) if isinstance(source, Node) and args(source) else None
        if (
            not isinstance(source, Node)
            or whole is None
            or not isinstance(index, int)
            or name not in ("split", "chunk", "tensor_split", "unbind")
        ):
            self._stop(node, f"piece of `{name}` is not followed")
            return None
        if name == "unbind":
            axis = argument(source, 1, "dim", 0) % _axes(args(source)[0])
            return self(args(source)[0], np.insert(c, axis, index % whole[axis], axis=1))
        axis = argument(source, 2, "dim", 0) % _axes(args(source)[0])
        how = next((source.kwargs[key] for key in _HOW if key in source.kwargs), None)
        start = _start(name, argument(source, 1, "", how), index, whole[axis])
        if start is None:
            self._stop(node, f"piece of `{name}` with these arguments is not followed")
            return None
        moved = c.copy()
        moved[:, axis] += start
        return self(args(source)[0], moved)


_HOW = ("split_size_or_sections", "split_size", "chunks", "indices_or_sections", "indices", "sections")


def _start(name: str, how: Any, index: int, length: int) -> int | None:
    """Where piece ``index`` of an axis of ``length`` begins that was cut by ``name`` with argument ``how``."""
    if isinstance(how, list | tuple) and all(isinstance(part, int) for part in how):
        if name == "tensor_split":
            ends = [0, *(slice(part).indices(length)[1] for part in how)]
            return ends[index % len(ends)]
        return sum(how[: index % len(how)])
    if not isinstance(how, int):
        return None
    if name == "tensor_split":
        piece = index % how
        return piece * (length // how) + min(piece, length % how)
    step = how if name == "split" else -(-length // how)
    return (index if index >= 0 else -(-length // step) + index) * step


def _merged_scales(which: Coordinates, trails: Mapping[int, Trail]) -> tuple[tuple[Node, Coordinates, float], ...]:
    """The scales of joined parts: kept where every part was multiplied by the same parameters."""
    parts = list(trails.values())
    if len({tuple((scale, offset) for scale, _, offset in trail.scales) for trail in parts}) != 1:
        return ()
    merged = []
    for i, (scale, first, offset) in enumerate(parts[0].scales):
        positions = np.empty((len(which), first.shape[1]), dtype=np.int64)
        for part, trail in trails.items():
            positions[which == part] = trail.scales[i][1]
        merged.append((scale, positions, offset))
    return tuple(merged)


def _axes(node: Any) -> int:
    """Axes as PyTorch counts them: the last coordinate of a complex element, its real or imaginary part, is none."""
    found = tensor(node)
    return 0 if found is None else found.dim()


def _broadcast(c: Coordinates, sizes: tuple[int, ...]) -> Coordinates:
    """Coordinates of the broadcast result -> coordinates of an operand of ``sizes``."""
    kept = c[:, c.shape[1] - len(sizes) :] if len(sizes) else c[:, :0]
    return np.where(np.array(sizes, dtype=np.int64) == 1, 0, kept)


def _reshape(node: Node, c: Coordinates) -> Coordinates | None:
    out, source = shape(node), shape(args(node)[0])
    if out is None or source is None or np.prod(out) != np.prod(source):
        return None
    flat = np.ravel_multi_index(tuple(c.T), out) if out else np.zeros(len(c), dtype=np.int64)
    return (
        np.stack(np.unravel_index(flat, source), axis=1).astype(np.int64)
        if source
        else np.zeros((len(c), 0), dtype=np.int64)
    )


def _permute_by(order: list[int], c: Coordinates) -> Coordinates:
    """Output axis ``a`` is input axis ``order[a]``."""
    moved = np.empty_like(c)
    moved[:, order] = c
    return moved


def _transpose(node: Node, c: Coordinates) -> Coordinates:
    axes = _axes(node)
    order = list(range(c.shape[1]))
    first, second = argument(node, 1, "dim0") % axes, argument(node, 2, "dim1") % axes
    order[first], order[second] = order[second], order[first]
    return _permute_by(order, c)


def _permute(node: Node, c: Coordinates) -> Coordinates:
    dims = argument(node, 1, "dims")
    dims = dims if isinstance(dims, list | tuple) else args(node)[1:]
    axes = _axes(node)
    return _permute_by([*(int(dim) % axes for dim in dims), *range(axes, c.shape[1])], c)


def _matrix_transpose(node: Node, c: Coordinates) -> Coordinates:
    order, axes = list(range(c.shape[1])), _axes(node)
    order[max(axes - 2, 0) : axes] = order[max(axes - 2, 0) : axes][::-1]
    return _permute_by(order, c)


def _expand(node: Node, c: Coordinates) -> Coordinates | None:
    source = shape(args(node)[0])
    return None if source is None else _broadcast(c, source)


def _repeat_interleave(node: Node, c: Coordinates) -> Coordinates | None:
    repeats, axis = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(repeats, int) or axis is None:
        return None
    moved = c.copy()
    moved[:, axis % _axes(node)] //= repeats
    return moved


def _repeat(node: Node, c: Coordinates) -> Coordinates | None:
    source = shape(args(node)[0])
    if source is None:
        return None
    return c[:, c.shape[1] - len(source) :] % np.array(source, dtype=np.int64)


def _select(node: Node, c: Coordinates) -> Coordinates | None:
    source, axis, index = shape(args(node)[0]), argument(node, 1, "dim"), argument(node, 2, "index")
    if source is None or not isinstance(index, int):
        return None
    axis %= _axes(args(node)[0])
    return np.insert(c, axis, index % source[axis], axis=1)


def _narrow(node: Node, c: Coordinates) -> Coordinates | None:
    start = argument(node, 2, "start")
    if not isinstance(start, int):
        return None
    moved = c.copy()
    moved[:, argument(node, 1, "dim") % _axes(node)] += start
    return moved


def _getitem(node: Node, c: Coordinates) -> Coordinates | None:
    source = shape(args(node)[0])
    index = args(node)[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    if source is None or any(not (part is None or part is Ellipsis or _is_index(part)) for part in parts):
        return None
    if any(isinstance(part, list) for part in parts) and sum(isinstance(part, int | list) for part in parts) > 1:
        return None
    consumed = sum(part is not None and part is not Ellipsis for part in parts)
    axes = _axes(args(node)[0])
    fill: list[Any] = [slice(None)] * (axes - consumed)
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts = [*parts[:at], *fill, *parts[at + 1 :], *[slice(None)] * (len(source) - axes)]
    columns, out, axis = [], 0, 0
    for part in parts:
        if part is None:
            out += 1
        elif isinstance(part, int):
            columns.append(np.full(len(c), part % source[axis], dtype=np.int64))
            axis += 1
        elif isinstance(part, list):  # alone among slices, a list of positions keeps its axis in place
            columns.append(np.array(part, dtype=np.int64)[c[:, out]] % source[axis])
            out, axis = out + 1, axis + 1
        else:
            if any(isinstance(end, Node) for end in (part.start, part.stop, part.step)):
                return None
            start, _, step = part.indices(source[axis])
            columns.append(c[:, out] * step + start)
            out, axis = out + 1, axis + 1
    return np.stack(columns, axis=1)


def _is_index(part: Any) -> bool:
    if isinstance(part, list):
        return all(type(position) is int for position in part)
    return isinstance(part, int | slice)


_RULES: Mapping[str, Callable[[Node, Coordinates], Coordinates | None]] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "permute": _permute,
    "t": _matrix_transpose,
    "mT": _matrix_transpose,
    "expand": _expand,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "select": _select,
    "narrow": _narrow,
    "getitem": _getitem,
}
