"""What a walk back through a graph finds: trails, and how those of parts are put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.fx import Node

from foreshock.patterns.coordinates import Columns, Positions
from foreshock.patterns.graph import GraphView


@dataclass(frozen=True, eq=False)
class Gain:
    """What elements were multiplied by: ``parameter + offset``, at a flat position for each element followed."""

    parameter: Node
    index: Positions
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Trail:
    """Where elements come from: those at ``coordinates`` of ``node``, a contraction in ``view`` or a parameter.

    ``where`` are the flat positions, in the grid asked for, of the elements that it accounts for (None: all); ``coordinates`` and
    the positions of ``gains`` broadcast to the grid, or have one entry for each of ``where``. ``path`` runs from ``node`` to the
    start. ``bent``: a nonlinear function stands between. Of a weight, each element was multiplied by ``factor`` and then had
    ``offset`` added, and with ``unit`` each row was divided by its norm first.
    """

    node: Node
    coordinates: Columns
    view: GraphView
    path: tuple[Node, ...] = ()
    gains: tuple[Gain, ...] = ()
    offset: float = 0.0
    factor: float = 1.0
    where: Positions | None = None
    bent: bool = False
    unit: bool = False
    notes: tuple[str, ...] = ()
    rank: int | None = None  # whose tensor they came from, where ranks exchange


Found = list[Trail] | str  # the reason why there is none


def each(found: Found, change: Callable[[Trail], Trail]) -> Found:
    """``found`` with every trail changed."""
    return found if isinstance(found, str) else [change(trail) for trail in found]


def noted(found: Found, note: str) -> Found:
    """``found`` with a note more."""
    return each(found, lambda trail: replace(trail, notes=(*trail.notes, note)))


def along(found: Found, path: Sequence[Node]) -> Found:
    """``found``, with the nodes passed since, the last one first."""
    passed = tuple(reversed(path))
    return each(found, lambda trail: replace(trail, path=(*trail.path, *passed))) if passed else found


def scaled(found: Found, gain: Gain, grid: tuple[int, ...]) -> Found:
    """``found`` multiplied by ``gain``, whose positions broadcast to ``grid``."""

    def change(trail: Trail) -> Trail:
        index = gain.index if trail.where is None else np.broadcast_to(gain.index, grid).reshape(-1)[trail.where]
        return replace(trail, gains=(*trail.gains, replace(gain, index=index)))

    return each(found, change)


def united(grid: tuple[int, ...], parts: Iterable[tuple[Positions, Found]]) -> Found:
    """The trails of a whole from those of its parts, which hold the elements at flat positions of ``grid``."""
    families: dict[tuple[object, ...], list[tuple[Positions, Trail]]] = {}
    reasons = []
    for rows, found in parts:
        if isinstance(found, str):
            reasons.append(found)
            continue
        for trail in found:
            key = (trail.node, trail.view, trail.unit, trail.factor, trail.offset)
            families.setdefault(key, []).append((rows if trail.where is None else rows[trail.where], trail))
    if not families:
        return reasons[0]
    ranks: dict[Node, set[int | None]] = {}
    for trail in (trail for family in families.values() for _, trail in family):
        ranks.setdefault(trail.node, set()).add(trail.rank)
    several = next((node for node, of in ranks.items() if len(of) > 1), None)
    if several is not None:
        return f"{several.name}: its parts come from several ranks"
    return [_one(grid, family) for family in families.values()]


def _one(grid: tuple[int, ...], family: list[tuple[Positions, Trail]]) -> Trail:
    """Trails to the same node as one."""
    first = family[0][1]
    where = np.concatenate([rows for rows, _ in family])
    order = np.argsort(where) if len(where) == math.prod(grid) else None

    def join(columns: Sequence[object]) -> Positions:
        whole = [
            np.broadcast_to(np.asarray(column), len(rows)) for column, (rows, _) in zip(columns, family, strict=True)
        ]
        joined = np.concatenate(whole)
        return joined if order is None else joined[order].reshape(grid)

    coordinates = tuple(join(columns) for columns in zip(*(trail.coordinates for _, trail in family), strict=True))
    notes = tuple(dict.fromkeys(note for _, trail in family for note in trail.notes))
    gains = [trail.gains for _, trail in family]
    if len({tuple((gain.parameter, gain.offset) for gain in of) for of in gains}) == 1:
        kept = tuple(replace(of[0], index=join([gain.index for gain in of])) for of in zip(*gains, strict=True))
    else:
        kept, notes = (), (*notes, "a gain that covers only part of the channels is left out of the factors")
    return replace(
        first,
        coordinates=coordinates,
        gains=kept,
        where=None if order is not None else where,
        bent=any(trail.bent for _, trail in family),
        notes=notes,
    )
