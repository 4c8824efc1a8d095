"""From a tensor at a boundary back to the parameter that made it."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import op, shape
from foreshock.patterns.pullback import Coordinates, Pull, Trail, projection_weight
from foreshock.records import WeightView


@dataclass(frozen=True)
class Origin:
    """Which projection made each channel: ``index[group, channel]`` on ``axis`` of ``parameter`` (a placeholder)."""

    parameter: Node
    index: np.ndarray[Any, np.dtype[np.int64]]
    axis: int
    head_map: tuple[int, ...]
    projection: Node
    path: tuple[Node, ...]
    scale: tuple[Node, np.ndarray[Any, np.dtype[np.int64]], float] | None = None

    @property
    def sources(self) -> tuple[Node, ...]:
        """The placeholders that hold the weight and, if there is one, the scale."""
        return (self.parameter, self.scale[0]) if self.scale else (self.parameter,)


@dataclass(frozen=True)
class Untraced:
    """Falsy: no parameter was reached, and why."""

    reason: str

    def __bool__(self) -> bool:
        return False


def head_axis(view: GraphView, node: Node) -> int:
    """Which of axes 1 and 2 of a 4-D tensor holds heads: the one along which the projection's channel changes."""
    sizes = shape(node) or ()
    for axis in (1, 2):
        if len(sizes) != 4 or sizes[axis] < 2:
            continue
        ends = np.array([[0, 0, 0, 0], [0, 0, 0, 0]], dtype=np.int64)
        ends[1, axis] = 1
        trail = Pull(view.parameters)(node, ends)
        if trail is not None and trail.coordinates[0, -1] != trail.coordinates[1, -1]:
            return axis
    return 1


def trace_heads(view: GraphView, node: Node, axis: int) -> Origin | Untraced:
    """The origin of ``[B, H, S, h]`` (``axis=1``) or ``[B, S, H, h]`` (``axis=2``): every head's channels at the last position."""
    sizes = shape(node)
    if sizes is None or len(sizes) != 4:
        return Untraced(f"{node.name} is not 4-D")
    heads, channels = sizes[axis], sizes[3]
    c = np.zeros((heads, channels, 4), dtype=np.int64)
    c[..., 3 - axis] = sizes[3 - axis] - 1
    c[..., axis] = np.arange(heads)[:, None]
    c[..., 3] = np.arange(channels)
    return _origin(view, node, c.reshape(-1, 4), heads)


def trace_features(view: GraphView, node: Node) -> Origin | Untraced:
    """The origin of the last axis of ``node`` (router logits or scores ``[..., E]``)."""
    sizes = shape(node)
    if not sizes:
        return Untraced(f"{node.name} is no tensor with axes")
    c = np.zeros((sizes[-1], len(sizes)), dtype=np.int64)
    c[:, -1] = np.arange(sizes[-1])
    return _origin(view, node, c, 1)


def _origin(view: GraphView, node: Node, c: Coordinates, heads: int) -> Origin | Untraced:
    pull = Pull(view.parameters)
    trail = pull(node, c)
    if trail is None:
        return Untraced(pull.stops[-1] if pull.stops else f"{node.name} leads nowhere")
    if trail.node in view.parameters:
        return Untraced(f"{trail.node.name}: a parameter used without a projection")
    weight = _projection_weight(view, trail)
    if isinstance(weight, Untraced):
        return weight
    parameter, axis, positions = weight
    rows = positions.reshape(heads, -1)
    distinct, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    scale = None
    if len(trail.scales) == 1:
        gain, where, offset = trail.scales[0]
        scale = (gain, where[:, -1].reshape(heads, -1)[np.sort(first)], offset)
    return Origin(
        parameter,
        distinct[order],
        axis,
        tuple(int(rank[i]) for i in inverse.reshape(-1)),
        trail.node,
        trail.path,
        scale,
    )


def _projection_weight(view: GraphView, trail: Trail) -> tuple[Node, int, Coordinates] | Untraced:
    """The parameter behind a projection, the axis that holds output channels, and each element's position on it."""
    projection = trail.node
    channel = trail.coordinates[:, -1]
    source, outputs_first = projection_weight(projection), op(projection) == "linear"
    sizes = shape(source)
    if sizes is None or len(sizes) != 2:
        return Untraced(f"{projection.name}: multiplies by {getattr(source, 'name', source)}, which is no matrix")
    inputs = sizes[1 if outputs_first else 0]
    ends = []
    for hidden in (0, inputs - 1):
        pair = np.stack([channel, np.full_like(channel, hidden)], axis=1)
        end = Pull(view.parameters)(source, pair if outputs_first else pair[:, ::-1])
        if end is None or end.node not in view.parameters:
            return Untraced(f"{projection.name}: its weight {getattr(source, 'name', source)} is no parameter")
        if end.coordinates.shape[1] != 2:
            return Untraced(f"{projection.name}: its weight {end.node.name} has {end.coordinates.shape[1]} axes, not 2")
        ends.append(end)
    low, high = ends
    moved = (low.coordinates != high.coordinates).any(axis=0)
    axis = int(moved[0]) if inputs > 1 else int(not outputs_first)
    return low.node, axis, low.coordinates[:, axis]


def weight_view(view: GraphView, origin: Origin | Untraced) -> WeightView | None:
    """The `WeightView` of an origin, bound to the live parameter."""
    if isinstance(origin, Untraced):
        return None
    gain = None if origin.scale is None else (view.names[origin.scale[0]], origin.scale[1], origin.scale[2])
    return WeightView(
        names=tuple(itertools.chain([view.names[origin.parameter]], [gain[0]] if gain else [])),
        index=origin.index,
        axis=origin.axis,
        head_map=origin.head_map,
        parameter=_reference(view, origin.parameter),
        scale=gain,
        scale_parameter=None if origin.scale is None else _reference(view, origin.scale[0]),
    )


def _reference(view: GraphView, placeholder: Node) -> weakref.ref[torch.Tensor] | None:
    held = view.parameters[placeholder]
    return weakref.ref(held) if isinstance(held, torch.Tensor) else None
