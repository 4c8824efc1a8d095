"""The spectra of each head's QK increment over several windows at once, spread over the steps (arXiv 2606.28116).

Sites take turns: each has a step of every stride on which it is measured, and a window ``w`` asks for its weights ``w`` steps
before that. Only these snapshots are taken, and each is dropped at the last measurement that needs it. So a reading is of
exactly the age that its name says, both its ends are one step's weights, and no step pays for all sites.

A snapshot holds matrices in the precision that they were read in, gains apart in float64. Where that precision changes
(masters found or lost, a model cast in mid-run) older snapshots do not count: the difference would be rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.errors import ConfigError
from foreshock.monitors.increments import PEAKS, UPDATE_RATIO, Stages, increment, precision, statistics
from foreshock.monitors.metrics import family
from foreshock.records import Array, Read, Reading, Share, Site, WeightView, as_it_is

__all__ = ["UPDATE_RATIO", "Spectra", "in_turn", "standing"]

MOST_NUMBERS = 2**26  # at a time: layers of one shape are measured together up to half a gigabyte in float64
KEPT_AS_THEY_ARE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def in_turn(metric: str) -> bool:
    """Whether a metric is read from the weights at whatever step it is the site's turn."""
    try:
        return metric == UPDATE_RATIO or family(metric) == "spectra"
    except ConfigError:
        return False


# Of each stage its matrix [heads, inputs, channels], in the precision it was read in, and its gain [heads, channels], float64.
Side = tuple[Tensor, ...]
Pair = tuple[WeightView, WeightView]


@dataclass(frozen=True, slots=True)
class Factors:
    """One site's weights at one step: the stages of its query and of its key, the one nearest the kernel first.

    ``precision`` names the dtype of every tensor that was read, gains included.
    """

    q: Side
    k: Side
    precision: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A snapshot: its step, the last step that measures against it, and the weights."""

    step: int
    until: int
    factors: Factors


@dataclass(slots=True)
class Turn:
    """A site's turn: ``slot`` is the step of every stride on which it is measured. And its snapshots, oldest first."""

    slot: int
    ring: list[Entry] = field(default_factory=list)


class Spectra:
    """Keeps base snapshots of the query and key factors and measures the increments since them.

    ``update`` wants every step; where some go by unseen, what fell due meanwhile is done at the next one, and a window of
    which the base was missed has no reading. ``windows`` are in steps; the first carries the plain metric names, the others a
    suffix (``@50``). Every site is measured once a ``stride`` (default: the shortest window). Windows that are multiples of
    the stride share their snapshots: ``max(windows) / stride`` copies of the query and key weights, and one more of the sites
    whose turn it is. ``read`` gives the tensor to read in a parameter's place (its fp32 master).

    Where ``share`` says that ranks hold a weight between them, `catch` copies it on one of these while it is whole.
    """

    def __init__(
        self,
        windows: Sequence[int] = (10, 50),
        stride: int | None = None,
        read: Read = as_it_is,
        share: Share = lambda parameter: None,
    ) -> None:
        self.windows = tuple(windows)
        self.stride = min(self.windows) if stride is None else stride
        self.read = read
        self.share = share
        self._taking: int | None = None
        self._taken: dict[str, Factors] = {}  # of the sites whose turn it is at that step
        self._turns: dict[str, Turn] = {}  # by the first of the sites that share their weights
        self._twins: dict[str, list[str]] = {}
        self._numbers: dict[str, int] = {}  # the ranks that hold a weight between them take the sites in turns
        self._known: tuple[str, ...] | None = None
        self._last: int | None = None

    def update(self, step: int, sites: Sequence[Site]) -> list[Reading]:
        """Readings of the attention sites whose turn it is and whose two weights are known, one value a query head."""
        before = self._before(step)
        if step <= before:
            return []
        if self._taking != step:
            self.take(step, sites)
        self._last = step
        views = _views(sites)
        if self._known != tuple(views):
            self._give_turns(views)
        now, self._taken = {name: taken for name, taken in self._taken.items() if name in self._twins}, {}
        measured = [name for name in now if self._due(before, step, self._turns[name].slot)[0]]
        readings = [r for window in self.windows for r in self._measure(step, window, measured, now, views)]
        self._keep(before, step, now)
        return readings

    def take(self, step: int, sites: Sequence[Site]) -> None:
        """Copy now the weights after ``step`` that `update` is to measure, of those of ``sites`` that always stand."""
        if step <= self._before(step):
            return
        self._taking, self._taken = step, {}
        views = _views(sites)
        if self._known != tuple(views):
            self._give_turns(views)
        for name in self._twins:
            if not self._is_due(name):
                continue
            held = views[name][0].resolve()
            if held is None or views[name][1].resolve() is None:
                self._known = None  # a parameter is gone: its site gives up its turn
            elif self.share(held) is None:
                self._taken[name] = _factors(views[name], self.read)

    def catch(self, site: Site) -> None:
        """The same for a site of which the weights are whole now, in the first call since, where it falls to this rank."""
        number = self._numbers.get(site.id)
        if number is None or site.id in self._taken or not self._is_due(site.id):
            return
        for name, views in _views([site]).items():
            held = views[0].resolve()
            rank, ranks = (held is not None and self.share(held)) or (0, 0)
            if ranks and number % ranks == rank:
                self._taken[name] = _factors(views, self.read)

    def _before(self, step: int) -> int:
        return step - 1 if self._last is None else self._last

    def _is_due(self, name: str) -> bool:
        step = self._taking
        if step is None or step <= self._before(step):
            return False
        measures, until = self._due(self._before(step), step, self._turns[name].slot)
        return measures or until is not None

    def _give_turns(self, views: Mapping[str, Pair]) -> None:
        """One turn for all sites that share both weights, on the slot with the fewest: 0 first, then those right before it."""
        self._known = tuple(views)
        alike: dict[tuple[Any, ...], list[str]] = {}
        for site, (q, k) in views.items():
            held = [view.held() for view in (q, k)]
            if None not in held:
                key = (*(id(x) for of in held for x in of or ()), *(view.index.tobytes() for view in (q, k)))
                alike.setdefault(key, []).append(site)
        self._twins = {next((s for s in group if s in self._turns), group[0]): group for group in alike.values()}
        # Of sites that are not back yet after a resume, the turn is kept as long as their snapshots are.
        self._turns = {
            name: turn for name, turn in self._turns.items() if name in self._twins or (name not in views and turn.ring)
        }
        load = [sum(turn.slot == slot for turn in self._turns.values()) for slot in range(self.stride)]
        for name in self._twins:
            if name not in self._turns:
                slot = min(range(self.stride), key=lambda slot: (load[slot], -slot % self.stride))
                load[slot] += 1
                self._turns[name] = Turn(slot)
        self._numbers = {name: number for number, name in enumerate(self._twins)}

    def spread(self, stride: int) -> None:
        """Measure every site once in ``stride`` steps from now on. Where that is a multiple of the stride so far, a site keeps some
        of the turns that it had, so that the windows under way have their bases."""
        old, self.stride = self.stride, stride
        load = [0] * stride
        for turn in self._turns.values():
            offered = range(turn.slot % old, stride, old) if stride % old == 0 else (turn.slot % stride,)
            turn.slot = min(offered, key=lambda slot: (load[slot], -slot % stride))
            load[turn.slot] += 1

    def _due(self, before: int, step: int, slot: int) -> tuple[bool, int | None]:
        """Whether a site is measured in the steps after ``before`` up to ``step``, and until when a snapshot is needed, if any."""

        def passed(slot: int) -> bool:
            return (step - slot) // self.stride > (before - slot) // self.stride

        needed = [window for window in self.windows if passed(slot - window)]
        return passed(slot), step + max(needed) if needed else None

    def _measure(
        self, step: int, window: int, sites: Sequence[str], now: Mapping[str, Factors], views: Mapping[str, Pair]
    ) -> list[Reading]:
        base = {
            name: entry.factors
            for name in sites
            for entry in self._turns[name].ring
            if entry.step == step - window and _alike(entry.factors, now[name])
        }
        first = window == self.windows[0]
        return [
            Reading(metric if first else f"{metric}@{window}", site, rows[row])
            for names, values in _by_shape(now, base, views, window)
            for metric, rows in values.items()
            if first or metric not in (*PEAKS, UPDATE_RATIO)
            for row, name in enumerate(names)
            for site in self._twins[name]
        ]

    def _keep(self, before: int, step: int, now: Mapping[str, Factors]) -> None:
        for name, turn in self._turns.items():
            if name in now:
                turn.ring = [entry for entry in turn.ring if entry.factors.precision == now[name].precision]
            if any(entry.until <= step for entry in turn.ring):
                turn.ring = [entry for entry in turn.ring if entry.until > step]
            until = self._due(before, step, turn.slot)[1]
            if name in now and until is not None:
                turn.ring.append(Entry(step, until, now[name]))

    def state_dict(self) -> dict[str, Any]:
        """Whose turn it is, and the snapshots as tensors on the host; a resumed run goes on without a gap."""
        return {
            "last": self._last,
            "taking": self._taking,
            "taken": {name: (taken.q, taken.k, taken.precision) for name, taken in self._taken.items()},
            "turns": {
                name: (
                    turn.slot,
                    [
                        (e.step, e.until, _on_host(e.factors.q), _on_host(e.factors.k), e.factors.precision)
                        for e in turn.ring
                    ],
                )
                for name, turn in self._turns.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Snapshots of sites that do not come back are dropped once they are too old."""
        self._last, self._known, self._taking = state["last"], None, state["taking"]
        self._taken = {name: Factors(*taken) for name, taken in state["taken"].items()}
        self._turns = {
            name: Turn(slot, [Entry(step, until, Factors(q, k, kind)) for step, until, q, k, kind in ring])
            for name, (slot, ring) in state["turns"].items()
        }
        self._numbers = {name: number for number, name in enumerate(self._turns)}


def standing(sites: Sequence[Site], read: Read = as_it_is) -> list[Reading]:
    """The spectrum of each head's ``Wq Wk^T`` as it stands, float64 ``[H]`` each: norm, stable rank, entropy, effective rank, as
    ``attention/qk_norm`` and so on, of the attention sites whose weights are known. It is that of the whole change from nothing."""
    views = _views(sites)
    now, base = {}, {}
    for name, pair in views.items():
        found = _factors(pair, read)
        q, k = (tuple(x.double() for x in side) for side in (found.q, found.k))
        now[name] = Factors(q, k, found.precision)
        base[name] = Factors(_without_matrices(q), _without_matrices(k), found.precision)
    return [
        Reading(metric.replace("delta3", "qk"), site, rows[row])
        for names, values in _by_shape(now, base, views, 1)
        for metric, rows in values.items()
        if "/delta3_" in metric
        for row, site in enumerate(names)
    ]


def _without_matrices(side: Side) -> Side:
    return tuple(x if place % 2 else torch.zeros_like(x) for place, x in enumerate(side))


def _views(sites: Sequence[Site]) -> dict[str, Pair]:
    """The two weights of each site where both are known, and meet in a product."""
    views = {site.id: (site.q_weight, site.k_weight) for site in sites if site.q_weight and site.k_weight}
    return {site: (q, k) for site, (q, k) in views.items() if q.index.shape[1] == k.index.shape[1]}


def _on_host(side: Side) -> Side:
    """A checkpoint is read also where there is no such device."""
    return tuple(x.cpu() for x in side)


def _factors(views: Pair, read: Read) -> Factors:
    """The weights now. Gains stay apart: in the matrices' precision their product would round away small increments."""
    sides, read = [], functools.cache(read)
    for view in views:
        found: list[Tensor] = []
        for matrix, gain in view.matrices(read):
            kind = matrix.dtype if matrix.dtype in KEPT_AS_THEY_ARE else torch.float32
            ones = torch.ones(matrix.shape[0], matrix.shape[2], dtype=torch.float64, device=matrix.device)
            found += [matrix.to(kind), ones if gain is None else gain]
        sides.append(tuple(found))
    precision = ",".join(str(read(x).dtype) for view in views for x in view.held() or ())
    return Factors(sides[0], sides[1], precision)


def _shapes(factors: Factors) -> tuple[torch.Size, ...]:
    return tuple(x.shape for x in (*factors.q, *factors.k))


def _alike(one: Factors, other: Factors) -> bool:
    return one.precision == other.precision and _shapes(one) == _shapes(other)


def _by_shape(
    now: Mapping[str, Factors], base: Mapping[str, Factors], views: Mapping[str, Pair], age: int
) -> list[tuple[list[str], dict[str, Array]]]:
    """Measure the sites of one shape together: ``[(sites, {metric: float64 [L, H]})]``."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in base:
        q, k = views[name]
        heads = max(len(q.head_map), len(k.head_map))
        inner = tuple(tuple(stage.head_map for stage in view.stages[1:]) for view in (q, k))
        maps = (q.read_by(heads), k.read_by(heads))
        matrices = [x for side in (now[name].q, now[name].k) for x in side[::2]]
        # Told by the views: to look at numbers on a device is to wait for them.
        gained = tuple(tuple(bool(s.gains) or s.unit or s.factor != 1.0 for s in view.stages) for view in (q, k))
        kind = precision([x.dtype for x in matrices], 1 + max(map(len, inner)))
        groups.setdefault((_shapes(now[name]), maps, inner, gained, kind, matrices[0].device), []).append(name)
    measured = []
    for (shapes, maps, inner, gained, kind, _), names in groups.items():
        at_once = max(1, MOST_NUMBERS // (2 * sum(shape.numel() for shape in shapes)))
        for start in range(0, len(names), at_once):
            part = names[start : start + at_once]
            values, sure = _together(part, now, base, kind, inner, gained, maps, age)
            again = np.flatnonzero(~sure.all(1)) if kind != torch.float64 else ()
            if len(again):
                exact, _ = _together([part[row] for row in again], now, base, torch.float64, inner, gained, maps, age)
                for metric, rows in values.items():
                    rows[again] = exact[metric]
            measured.append((part, values))
    return measured


def _together(
    names: Sequence[str],
    now: Mapping[str, Factors],
    base: Mapping[str, Factors],
    kind: torch.dtype,
    inner: Sequence[Sequence[tuple[int, ...]]],
    gained: Sequence[Sequence[bool]],
    maps: Sequence[tuple[int, ...]],
    age: int,
) -> tuple[dict[str, Array], Array]:
    """Sites of one shape in one precision, as `statistics` says."""
    q_now, q_base, k_now, k_base = (
        _stacked([getattr(taken[name], role) for name in names], kind, own)
        for role, own in zip(("q", "k"), gained, strict=True)
        for taken in (now, base)
    )
    q_side, k_side = increment(q_now, q_base, inner[0]), increment(k_now, k_base, inner[1])
    return statistics(q_side, k_side, maps[0], maps[1], age)


def _stacked(sides: Sequence[Side], kind: torch.dtype, gained: Sequence[bool]) -> Stages:
    """The sides of several sites as one, matrices in ``kind`` and gains in float64; those of a single site where they lie."""
    together = _as_one(sides, kind)
    return [(together[2 * at], together[2 * at + 1] if gains else None) for at, gains in enumerate(gained)]


def _as_one(sides: Sequence[Side], kind: torch.dtype) -> list[Tensor]:
    kinds = (kind, torch.float64)
    if len(sides) == 1:
        return [x[None].to(kinds[place % 2]) for place, x in enumerate(sides[0])]
    return [torch.stack([x.to(kinds[place % 2]) for x in of]) for place, of in enumerate(zip(*sides, strict=True))]
