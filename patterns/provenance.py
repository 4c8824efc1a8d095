"""From a tensor at a boundary back to the parameters that made it: one projection, or a chain (see `foreshock.patterns.latent`)."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from foreshock.patterns.coordinates import Columns, Positions, flat
from foreshock.patterns.exchanges import swaps
from foreshock.patterns.graph import GraphView
from foreshock.patterns.latent import latent
from foreshock.patterns.ops import shape
from foreshock.patterns.pullback import Pull
from foreshock.patterns.sharded import on_this_rank
from foreshock.patterns.trail import Gain, Trail
from foreshock.records import Stage, WeightView

_LONGEST = 4  # projections in one chain


@dataclass(frozen=True)
class Link:
    """One projection of a chain: the placeholders of its weight and gains, and how they are read."""

    parameter: Node
    gains: tuple[Node, ...]
    stage: Stage
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Which projections made each channel, the one nearest the tensor first. ``path`` runs from ``projection`` to the tensor.

    ``channels`` are those of the head that come from there (None: all).
    """

    links: tuple[Link, ...]
    projection: Node
    path: tuple[Node, ...]
    channels: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[Node, ...]:
        """The placeholders that hold the weights and gains, in the order of `WeightView.names`."""
        return tuple(node for link in self.links for node in (link.parameter, *link.gains))

    @property
    def parameter(self) -> Node:
        """The placeholder of the weight nearest the tensor."""
        return self.links[0].parameter

    @property
    def index(self) -> Positions:
        """``[heads, channels]``: each channel's position on the output axes of `parameter`."""
        return self.links[0].stage.index

    @property
    def axes(self) -> tuple[int, ...]:
        return self.links[0].stage.axes

    @property
    def head_map(self) -> tuple[int, ...]:
        return self.links[0].stage.head_map


@dataclass(frozen=True)
class Untraced:
    """Falsy: no parameter was reached, and why."""

    reason: str

    def __bool__(self) -> bool:
        return False


def head_axis(view: GraphView, node: Node) -> int:
    """Which of axes 1 and 2 of a 4-D tensor holds heads: the one along which the projection's channel changes."""
    return next((axis for axis in (1, 2) if along_channels(view, node, axis)), 1)


def along_channels(view: GraphView, node: Node, axis: int) -> bool:
    """Whether the projection's channel changes along ``axis`` of a 4-D tensor."""
    sizes = shape(node) or ()
    return len(sizes) == 4 and sizes[axis] > 1 and _differ(view, node, axis, 1)


def _differ(view: GraphView, node: Node, axis: int, step: int) -> bool:
    """Whether the first element of ``node`` and the one ``step`` further along ``axis`` come from different channels."""
    pull = Pull(view)
    c = tuple(np.array([0, step]) if a == axis else 0 for a in range(len(shape(node) or ())))
    found = pull.pieces(node, c, _last_reader(view, node))
    for trail in found if isinstance(found, list) else ():
        product = pull.projection(trail.view, trail.node)
        if product is None:
            continue
        met, side = product
        outputs = [x for x, at in zip(trail.coordinates, met.result, strict=True) if at in met.letters[side]]
        if any(np.unique(column).size > 1 for column in outputs):
            return True
    return False


def among_ranks(view: GraphView, origin: Origin, pieces: int) -> tuple[int, int] | None:
    """Of ``pieces`` heads that this rank has of those which ranks swapped for positions: the number of the first, and how many
    there are on all of them. None where none were swapped."""
    while view.parent is not None:
        view = view.parent
    for source, rank, ranks in swaps(origin.path):
        block = (shape(source) or (0,))[0] // ranks
        where = next((own for own in view.walk() if own.graph is source.graph), None)
        if where is not None and block and _differ(where, source, 0, block):
            return rank * pieces, ranks * pieces
    return None


def trace_heads(view: GraphView, node: Node, axis: int) -> Origin | Untraced:
    """The origin of ``[B, H, S, h]`` (``axis=1``) or ``[B, S, H, h]`` (``axis=2``): every head's channels at the last position."""
    sizes = shape(node)
    if sizes is None or len(sizes) != 4:
        return Untraced(f"{node.name} is not 4-D")
    c: list[Any] = [0, 0, 0, np.arange(sizes[3])[None, :]]
    c[3 - axis] = sizes[3 - axis] - 1
    c[axis] = np.arange(sizes[axis])[:, None]
    return trace(view, node, tuple(c), sizes[axis], sizes[3])


def trace_features(view: GraphView, node: Node, axis: int = -1) -> Origin | Untraced:
    """The origin of what runs along ``axis`` of ``node`` (router logits or scores, ``[..., E]`` or ``[E, T]``)."""
    sizes = shape(node)
    if not sizes:
        return Untraced(f"{node.name} is no tensor with axes")
    c: list[Any] = [0] * len(sizes)
    c[axis] = np.arange(sizes[axis])[None, :]
    return trace(view, node, tuple(c), 1, sizes[axis])


def _last_reader(view: GraphView, node: Node) -> Node | None:
    return max(node.users, key=lambda user: view.order[user], default=None)


def trace(view: GraphView, node: Node, c: Columns, heads: int, channels: int) -> Origin | Untraced:
    """The origin of the elements at ``c``, columns of a grid ``[heads, channels]``."""
    pull = Pull(view)
    found = pull.pieces(node, c, _last_reader(view, node))
    if isinstance(found, str):
        return Untraced(found)
    chosen = _widest(found, heads, channels)
    if chosen is None:
        return Untraced(f"{node.name}: its parts come from different projections")
    trail, kept = chosen
    links = _chain(pull, trail, heads, len(kept))
    if isinstance(links, Untraced):
        return links
    notes = [*trail.notes, *(note for link in links for note in link.notes)]
    if sum(heads * channels if one.where is None else len(one.where) for one in found) < heads * channels:
        notes.append("a part of the channels was not traced, and is left out of the factors")
    own = None if len(kept) == channels else tuple(int(channel) for channel in kept)
    return Origin(links, trail.node, trail.path, own, tuple(dict.fromkeys(notes)))


def _widest(found: list[Trail], heads: int, channels: int) -> tuple[Trail, Positions] | None:
    """Of trails that hold the same channels of every head, the one in which heads differ, then the widest; and its channels."""
    best: tuple[tuple[bool, int], Trail, Positions] | None = None
    for trail in found:
        if trail.where is None:
            return trail, np.arange(channels)
        held = np.zeros((heads, channels), dtype=bool)
        held.reshape(-1)[trail.where] = True
        kept = np.flatnonzero(held[0])
        if not len(kept) or (held != held[0]).any():
            continue
        order = np.argsort(trail.where)
        coordinates = tuple(_rows(column[order], heads, len(kept)) for column in trail.coordinates)
        gains = tuple(Gain(g.parameter, _rows(g.index[order], heads, len(kept)), g.offset) for g in trail.gains)
        rank = (any(np.any(column != column[0]) for column in coordinates), len(kept))
        if best is None or rank > best[0]:
            best = rank, replace(trail, coordinates=coordinates, gains=gains, where=None), kept
    return None if best is None else best[1:]


def _rows(column: Any, heads: int, channels: int) -> Positions:
    return np.broadcast_to(column, (heads * channels,)).reshape(heads, channels)


def _chain(pull: Pull, trail: Trail, heads: int, channels: int) -> tuple[Link, ...] | Untraced:
    """The projection at the end of ``trail``, and those before it of which it is the last."""
    links: list[Link] = []
    while True:
        found = _link(pull, trail, (heads, channels))
        if isinstance(found, Untraced):
            return tuple(links) or found
        link, distinct = found
        links.append(link)
        inner = latent(pull, trail, distinct, (heads, channels)) if len(links) < _LONGEST else None
        if inner is None:
            return tuple(links)
        trail, heads, channels = inner


def _link(pull: Pull, trail: Trail, whole: tuple[int, int]) -> tuple[Link, list[int]] | Untraced:
    """How the elements of ``trail``, ``[heads, channels]``, are read out of the weight where it ends, and its distinct heads."""
    product = pull.projection(trail.view, trail.node)
    if product is None:
        return Untraced(f"{trail.node.name}: a parameter used without a projection")
    met, side = product
    values = dict(zip(met.result, trail.coordinates, strict=True))
    weight, summed = met.operands[side], met.summed(side)
    rows = dict(zip(summed, np.indices(tuple(summed.values())).reshape(len(summed), -1), strict=True))
    first, last = ({letter: _end(column, end) for letter, column in values.items()} for end in (0, -1))
    farthest = {**last, **{letter: size - 1 for letter, size in summed.items()}}
    weights = Pull(trail.view)
    outputs, inputs, corner = (
        weights(weight, met.columns(side, these), trail.node) for these in (values, {**first, **rows}, farthest)
    )
    if outputs is None or inputs is None or corner is None:
        return Untraced(f"{trail.node.name}: its weight {weight.name} is no parameter ({weights.stops[-1]})")
    if outputs.node not in pull.root.parameters or inputs.node is not outputs.node:
        return Untraced(f"{trail.node.name}: its weight {weight.name} is a product of parameters")
    sizes = shape(outputs.node) or ()
    read = [a for a, column in enumerate(inputs.coordinates) if np.any(column != _end(column, 0))]
    kept = [a for a in range(len(sizes)) if a not in read]
    if any(
        _end((inputs if a in read else outputs).coordinates[a], -1) != corner.coordinates[a] for a in range(len(sizes))
    ):
        return Untraced(f"{trail.node.name}: which inputs its weight {weight.name} meets differs by channel")
    index = _table(flat([outputs.coordinates[a] for a in kept], [sizes[a] for a in kept]), whole)
    order = np.asarray(flat([inputs.coordinates[a] for a in read], [sizes[a] for a in read]))
    fixed, unit, notes = _gains_of_weight(outputs, corner, math.prod(sizes[a] for a in kept))
    gains = [(gain, _table(gain.index, whole)) for gain in (*fixed, *trail.gains)]
    of_input = [column for letter, column in values.items() if letter in met.letters[1 - side] and np.ndim(column)]
    distinct, head_map = _distinct(
        [index, *(positions for _, positions in gains), *(_table(column, whole)[:, :1] for column in of_input)]
    )
    stage = Stage(
        index=index[distinct],
        axes=tuple(kept),
        head_map=head_map,
        inputs=None if np.array_equal(order, np.arange(math.prod(sizes[a] for a in read))) else np.atleast_1d(order),
        gains=tuple((positions[distinct], gain.offset) for gain, positions in gains),
        factor=outputs.factor * trail.factor,
        unit=unit,
    )
    behind = tuple(gain.parameter for gain, _ in gains)
    own = on_this_rank(stage, outputs.node, behind)
    if isinstance(own, str):
        return Untraced(f"{trail.node.name}: {own}")
    return Link(outputs.node, behind, own, (*outputs.notes, *notes)), distinct


def _gains_of_weight(outputs: Trail, corner: Trail, rows: int) -> tuple[list[Gain], bool, tuple[str, ...]]:
    """Of the gains of a weight those that belong to its output channels, whether each row is scaled to length one, and notes.

    ``corner`` is the trail of the last element of the last channel: along its inputs a gain must not change.
    """
    kept = [
        gain
        for gain, there in zip(outputs.gains, corner.gains, strict=True)
        if _end(gain.index, -1) == _end(there.index, -1)
    ]
    by_row = len(kept) == len(outputs.gains) and any(math.prod(shape(gain.parameter) or ()) == rows for gain in kept)
    if len(kept) == len(outputs.gains) and (by_row or not outputs.unit):
        return kept, outputs.unit, ()
    return kept, False, (f"{outputs.node.name} is scaled along its inputs: the factors are without it",)


def _end(column: Any, end: int) -> int:
    """The first or last entry of a column."""
    return int(np.asarray(column).flat[end])


def _table(column: Any, whole: tuple[int, int]) -> Positions:
    return np.ascontiguousarray(np.broadcast_to(np.asarray(column, dtype=np.int64), whole))


def _distinct(tables: list[Positions]) -> tuple[list[int], tuple[int, ...]]:
    """The first of each set of equal rows, and which of those each row equals."""
    known: dict[tuple[bytes, ...], int] = {}
    head_map = tuple(
        known.setdefault(tuple(table[row].tobytes() for table in tables), len(known)) for row in range(len(tables[0]))
    )
    return [head_map.index(position) for position in range(len(known))], head_map


def weight_view(view: GraphView, origin: Origin | Untraced) -> WeightView | None:
    """The `WeightView` of an origin, bound to the live parameters."""
    if isinstance(origin, Untraced):
        return None
    while view.parent is not None:
        view = view.parent
    return WeightView(
        names=tuple(view.names[node] for node in origin.sources),
        stages=tuple(link.stage for link in origin.links),
        parameters=tuple(_reference(view.parameters[node]) for node in origin.sources),
        channels=origin.channels,
        notes=origin.notes,
    )


def weight_of(view: GraphView, parameter: Node, stage: Stage) -> WeightView:
    """The `WeightView` of one placeholder that is read as ``stage`` says, bound to the live parameter."""
    return WeightView((view.names[parameter],), (stage,), (_reference(view.parameters[parameter]),))


def _reference(held: Any) -> weakref.ref[torch.Tensor] | None:
    return weakref.ref(held) if isinstance(held, torch.Tensor) else None
