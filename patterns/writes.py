"""Writes in place as dataflow: ``copy_``, ``add_``, ``x[...] = y``, ``out=``.

Dynamo's fake tensors alias as the real ones do, so an element of any view is known by its address in memory, and a write by
the strided region it covers. No graph is changed, and nothing is eliminated: a write has no users and must stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from foreshock.patterns.coordinates import Column, Columns, Positions
from foreshock.patterns.ops import args, hint, op, schema, tensor

_NO_WRITE = frozenset({"requires_grad_", "detach_", "retain_grad_", "share_memory_"})
_OPERATORS = frozenset({"iadd", "isub", "imul", "itruediv", "imatmul", "ipow", "iand", "ior", "ixor"})


@dataclass(frozen=True, eq=False)
class Write:
    """``node`` stores into ``region``, a view of the memory written. ``source`` holds the values: the operand of a copy, or
    ``node`` itself where an op computes them in place; None where it cannot be followed."""

    node: Node
    region: torch.Tensor
    source: Any

    @staticmethod
    def storage_of(node: Node) -> int | None:
        """Identifies the memory of ``node``'s tensor."""
        fake = tensor(node)
        if fake is None or fake.layout is not torch.strided:
            return None
        try:
            return int(fake.untyped_storage()._cdata)
        except NotImplementedError:  # inside a vmap
            return None

    def locate(self, node: Node, c: Columns) -> tuple[Any, Columns]:
        """Which elements of ``node`` at ``c`` this write covers, and where in the region they lie."""
        return _decode(_address(node, c), *_lie(self.region))


def through_memory(node: Node, source: Node, c: Columns) -> Columns | None:
    """Where elements of ``node`` lie in ``source``, if it is a view of that, by whatever op; else None."""
    storage, region = Write.storage_of(node), tensor(source)
    if storage is None or region is None or Write.storage_of(source) != storage:
        return None
    inside, place = _decode(_address(node, c), *_lie(region))
    return place if np.all(inside) else None


def _address(node: Node, c: Columns) -> Positions:
    fake = tensor(node)
    assert fake is not None
    _, strides, offset = _lie(fake)
    return np.asarray(offset + sum(column * stride for column, stride in zip(c, strides, strict=True)))


def _lie(fake: torch.Tensor) -> tuple[list[int], list[int], int]:
    """Sizes, strides and offset in bytes. A complex element has a last axis of 2."""
    unit = fake.element_size()
    sizes = [hint(size) for size in fake.shape]
    strides = [hint(stride) * unit for stride in fake.stride()]
    if fake.is_complex():
        sizes, strides = [*sizes, 2], [*strides, unit // 2]
    return sizes, strides, hint(fake.storage_offset()) * unit


def _decode(address: Positions, sizes: list[int], strides: list[int], offset: int) -> tuple[Any, Columns]:
    """Whether addresses lie in a strided region, and where. In a region that overlaps itself any of the places will do."""
    rest = address - offset
    inside = rest >= 0
    found: list[Column] = [0] * len(sizes)
    for axis in sorted(range(len(sizes)), key=lambda a: -strides[a]):
        if strides[axis] > 0 and sizes[axis] > 1:
            found[axis] = np.clip(rest // strides[axis], 0, sizes[axis] - 1)
            rest = rest - found[axis] * strides[axis]
    return inside & (rest == 0), tuple(found)


def writes_of(graph: Graph) -> Mapping[int, list[Write]]:
    """By storage, every write into it in graph order."""
    found: dict[int, list[Write]] = {}
    for node in graph.nodes:
        target = _target(node)
        storage = Write.storage_of(target) if isinstance(target, Node) else None
        if storage is not None:
            found.setdefault(storage, []).append(_write(node, target))
    return found


def _target(node: Node) -> Any:
    """The tensor that ``node`` stores into, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    if "out" in node.kwargs:
        return node.kwargs["out"]
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    declared = schema(node)
    if declared is not None:
        written = [i for i, entry in enumerate(declared.arguments) if entry.alias_info and entry.alias_info.is_write]
        return args(node)[written[0]] if written and written[0] < len(node.args) else None
    in_place = (name.endswith("_") and not name.endswith("__") and name not in _NO_WRITE) or name in _OPERATORS
    in_place = in_place or name == "setitem" or node.kwargs.get("inplace") is True
    return args(node)[0] if in_place and node.args else None


def _write(node: Node, target: Any) -> Write:
    region = tensor(target)
    assert region is not None
    if op(node) == "setitem":
        return _setitem(node, region)
    if op(node) in ("copy", "::set_"):
        return Write(node, region, args(node)[1])
    if op(node) in ("fill", "zero"):
        return Write(node, region, None)
    return Write(node, region, node)


def _setitem(node: Node, whole: torch.Tensor) -> Write:
    index, value = args(node)[1], args(node)[2]
    symbolic: list[Node] = []
    map_arg(index, symbolic.append)
    if any(tensor(n) is not None for n in symbolic):
        return Write(node, whole, None)
    try:
        region = whole[map_arg(index, lambda n: n.meta["example_value"])]
    except Exception:  # an index that fake tensors cannot take: the memory is written, where is not known
        return Write(node, whole, None)
    if region.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return Write(node, whole, None)  # indexed by a list: a copy
    return Write(node, region, value)
