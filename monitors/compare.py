"""A run beside healthy references: are they comparable, and which series leave the references' band, and when.

The band at a step holds what the references recorded nearest to it: with one reference its own noise, with several the spread
between them too. All recorded metrics are compared, judged or not, heads and experts folded into their mean and their largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from foreshock.errors import ConfigError, RunError
from foreshock.records import Array, Site

NEAR = 15  # samples of each reference that make the band at a step
INSIDE = (0.05, 0.95)  # quantiles of these; the band is twice as wide, so that a healthy sample is rarely outside
SMOOTH = 5  # samples of the run that a running median is taken over: single ones are noise
STAYS = 3  # samples outside up to the end that are a departure
GRID = 256  # steps at which the band is computed; between them it is a straight line
ROUNDING = 1e-6  # of a value: the store keeps float32
SMALLEST = 1e-30  # half a band, where all references say 0
SHAPE = ("heads", "kv_heads", "head_dim", "value_dim", "experts", "top_k")
WHOLE = ("run/", "optim/")  # numbers of the whole run, of which NaN is no missing value but a broken one
TOKENS = "run/tokens"

Curve = tuple[Array, Array]  # places, rising, and values


class Recorded(Protocol):
    """A run to read from; `foreshock.Run` is one."""

    @property
    def name(self) -> str: ...
    @property
    def sites(self) -> list[Site]: ...
    def metrics(self) -> list[str]: ...
    def sites_of(self, metric: str) -> list[str | None]: ...
    def series(self, metric: str, site: str | None = None) -> tuple[Array, Array]: ...


@dataclass(frozen=True, slots=True)
class Departure:
    """One series that ends outside the references' band.

    ``over``: "value", or "mean" or "max" over heads or experts. ``first``: the step of the run from which it stays outside, and
    ``place`` the same on the common axis. ``end`` and ``worst``: signed distance from the band, in its widths (inf: not finite).
    ``started``: it was outside from the first common sample on, so nothing happened at ``first``.
    """

    metric: str
    site: str | None
    over: str
    first: int
    place: float
    end: float
    worst: float
    worst_step: int
    started: bool

    @property
    def direction(self) -> str:
        return "above" if self.end > 0 else "below"


@dataclass(frozen=True, slots=True)
class Comparison:
    """``span``: where run and references overlap, on the axis ``align``. ``missing``: what one side lacks, one line each.
    ``departures`` are sorted by the step at which they begin."""

    run: str
    references: tuple[str, ...]
    align: str
    span: tuple[float, float]
    sites: int
    series: int
    missing: tuple[str, ...]
    departures: tuple[Departure, ...]

    def to_json(self) -> dict[str, Any]:
        departures = [asdict(departure) | {"direction": departure.direction} for departure in self.departures]
        return asdict(self) | {"departures": departures}


def compare(run: Recorded, references: Sequence[Recorded], *, align: str = "step") -> Comparison:
    """``run`` beside ``references``, by "step" or by "tokens" seen (logged by both with ``watch.log(tokens=...)``).

    Raises RunError for runs of different models, and where they have no place in common; ConfigError for wrong arguments.
    """
    if align not in ("step", "tokens"):
        raise ConfigError(f"comparing {run.name}: align is {align!r}; give 'step' or 'tokens'")
    if not references:
        raise ConfigError(f"comparing {run.name}: there is no reference; give the folder of one healthy run or more")
    same = [_same_sites(run, reference) for reference in references]
    axes = [_Axis(one, align) for one in (run, *references)]
    span, found, count = (math.inf, -math.inf), [], 0
    for metric, site in _keys(run):
        known = [(r, axis, ids) for r, axis, ids in zip(references, axes[1:], same, strict=True) if site in ids]
        columns = [
            folded(axis.place(reference.series(metric, ids[site])))
            for reference, axis, ids in known
            if metric in axis.metrics and ids[site] in reference.sites_of(metric)
        ]
        own = folded(axes[0].place(run.series(metric, site)), metric.startswith(WHOLE))
        for over, curve in own.items():
            curves = [finite(column[over]) for column in columns if over in column]
            steps, departure = _departure(curve, [c for c in curves if len(c[0])], metric, site, over, axes[0])
            if len(steps):
                count += 1
                span = (min(span[0], float(steps[0])), max(span[1], float(steps[-1])))
            found += [departure] if departure else []
    if not count:
        raise RunError(
            f"comparing {run.name} with {', '.join(r.name for r in references)}: no series of theirs has a {align} in "
            "common; compare runs that recorded the same metrics over the same stretch"
        )
    return Comparison(
        run.name,
        tuple(reference.name for reference in references),
        align,
        span,
        len({site for ids in same for site in ids if site is not None}),
        count,
        tuple(_missing(run, references, same)),
        tuple(sorted(found, key=lambda d: (d.first, -abs(d.worst), d.metric, d.site or ""))),
    )


def _keys(run: Recorded) -> Iterator[tuple[str, str | None]]:
    for metric in run.metrics():
        if metric != TOKENS:
            yield from ((metric, site) for site in run.sites_of(metric))


class _Axis:
    """Where the samples of one run lie on the common axis."""

    def __init__(self, run: Recorded, align: str) -> None:
        self.metrics = set(run.metrics())
        self._tokens: Curve | None = None
        if align == "tokens":
            if TOKENS not in self.metrics:
                raise RunError(
                    f"aligning {run.name} by tokens: it recorded none; log them with watch.log(tokens=seen), or use --align step"
                )
            steps, seen = run.series(TOKENS)
            if len(seen) < 2 or not (np.diff(seen) > 0).all():
                raise RunError(
                    f"aligning {run.name} by tokens: run/tokens does not rise at every step; log the number of tokens seen so far"
                )
            self._tokens = steps.astype(float), seen

    def place(self, series: tuple[Array, Array]) -> Curve:
        """The samples that have a place, values as ``[n, heads or experts]``."""
        steps, values = series
        values = values.reshape(len(steps), -1)
        if self._tokens is None:
            return steps.astype(float), values
        places = np.interp(steps, *self._tokens, left=np.nan, right=np.nan)
        kept = np.isfinite(places)
        return places[kept], values[kept]

    def step(self, place: float) -> int:
        return int(place if self._tokens is None else np.rint(np.interp(place, *self._tokens[::-1])))


def folded(column: Curve, whole: bool = False) -> dict[str, Curve]:
    """``values`` of a single number a sample, else their ``mean`` and ``max`` over those that are there. NaN is missing, or of a
    ``whole`` run's number as bad as infinite."""
    places, values = column
    if whole:
        values = np.where(np.isnan(values), np.inf, values)
    if values.shape[1] == 1:
        folds = {"value": values[:, 0]}
    else:
        there = ~np.isnan(values)
        count = there.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(there, values, 0.0).sum(1) / count
        largest = np.where(there, values, -np.inf).max(1)
        folds = {"mean": mean, "max": np.where(count > 0, largest, np.nan)}
    return {over: (places[kept], row[kept]) for over, row in folds.items() for kept in [~np.isnan(row)]}


def finite(curve: Curve) -> Curve:
    kept = np.isfinite(curve[1])
    return curve[0][kept], curve[1][kept]


def band(curves: Sequence[Curve], places: Array) -> tuple[Array, Array]:
    """Low and high edge at ``places`` ``[n]``; NaN where no curve reaches."""
    grid = places if len(places) <= GRID else places[np.linspace(0, len(places) - 1, GRID).astype(int)]
    pools = []
    for at, values in curves:
        near = min(NEAR, len(at))
        start = np.clip(np.searchsorted(at, grid) - near // 2, 0, len(at) - near)
        pools.append(
            np.where(((grid >= at[0]) & (grid <= at[-1]))[:, None], sliding_window_view(values, near)[start], np.nan)
        )
    low, high = _quantiles(np.concatenate(pools, 1), INSIDE)
    half = np.maximum((high - low) / 2, ROUNDING * np.fmax(np.abs(low), np.abs(high)) + SMALLEST)
    low, high = low - half, high + half
    return (low, high) if grid is places else (np.interp(places, grid, low), np.interp(places, grid, high))


def _quantiles(pool: Array, shares: Sequence[float]) -> list[Array]:
    """Of each row of ``pool`` ``[n, m]``, NaN left out: np.nanquantile goes row by row."""
    ranked = np.sort(pool, 1)
    count = np.isfinite(ranked).sum(1)
    found = []
    for share in shares:
        exact = share * np.maximum(count - 1, 0)
        below = np.floor(exact).astype(int)
        above = np.minimum(below + 1, np.maximum(count - 1, 0))
        low, high = (np.take_along_axis(ranked, index[:, None], 1)[:, 0] for index in (below, above))
        found.append(low + (high - low) * (exact - below))
    return found


def _departure(
    curve: Curve, curves: Sequence[Curve], metric: str, site: str | None, over: str, axis: _Axis
) -> tuple[Array, Departure | None]:
    """The places that were compared, and the departure if there is one."""
    places, values = curve
    if not curves or not len(places):
        return places[:0], None
    low, high = band(curves, places)
    kept = np.isfinite(low)
    places, low, high = places[kept], low[kept], high[kept]
    values = _smooth(values[kept])
    if len(places) < STAYS:
        return places, None
    distance = (np.maximum(values - high, 0) + np.minimum(values - low, 0)) / (high - low)
    side = np.sign(distance)
    back = np.flatnonzero(side != side[-1])
    first = int(back[-1]) + 1 if len(back) else 0
    if side[-1] == 0 or len(places) - first < STAYS:
        return places, None
    worst = int(np.abs(distance).argmax())
    return places, Departure(
        metric,
        site,
        over,
        axis.step(places[first]),
        float(places[first]),
        float(distance[-1]),
        float(distance[worst]),
        axis.step(places[worst]),
        first == 0,
    )


def _smooth(values: Array) -> Array:
    """Running median; at either end over what is mirrored there."""
    if len(values) < SMOOTH:
        return values
    smooth: Array = np.median(sliding_window_view(np.pad(values, SMOOTH // 2, mode="reflect"), SMOOTH), 1)
    return smooth


def _same_sites(run: Recorded, reference: Recorded) -> dict[str | None, str | None]:
    """Which site of ``reference`` is which of ``run``: by name and kind. Raises RunError if they are of different models."""
    own, other = _named(run), _named(reference)
    shared = own.keys() & other.keys()
    for key in shared:
        shapes = [{of: getattr(side[key], of) for of in SHAPE} for side in (own, other)]
        if shapes[0] != shapes[1]:
            told = (
                f"{of} {a} and {b}" for of, a, b in zip(SHAPE, *(s.values() for s in shapes), strict=True) if a != b
            )
            raise RunError(
                f"comparing {run.name} with {reference.name}: they are of different models, {key[1]} has {', '.join(told)}; "
                "give a reference of the same model"
            )
    if own and other and not shared:
        raise RunError(
            f"comparing {run.name} with {reference.name}: they are of different models, no site has the same name "
            f"({_some(own)} and {_some(other)}); give a reference of the same model"
        )
    return {None: None} | {own[key].id: other[key].id for key in own if key in shared}


def _named(run: Recorded) -> dict[tuple[str, str, int], Site]:
    found: dict[tuple[str, str, int], Site] = {}
    for site in run.sites:
        place = sum(key[:2] == (site.kind, site.name) for key in found)
        found[site.kind, site.name, place] = site
    return found


def _some(named: Mapping[tuple[str, str, int], Site]) -> str:
    return ", ".join(name for _, name, _ in list(named)[:3]) + ", ..." * (len(named) > 3)


def _missing(
    run: Recorded, references: Sequence[Recorded], same: Sequence[Mapping[str | None, str | None]]
) -> Iterator[str]:
    for reference, ids in zip(references, same, strict=True):
        sides = (
            ("sites", {s.name for s in run.sites if s.id not in ids}, run, reference),
            ("sites", {s.name for s in reference.sites if s.id not in ids.values()}, reference, run),
            ("metrics", {*run.metrics()} - {*reference.metrics()}, run, reference),
            ("metrics", {*reference.metrics()} - {*run.metrics()}, reference, run),
        )
        for what, names, has, lacks in sides:
            if names:
                listed = sorted(names)
                more = f" and {len(listed) - 8} more" * (len(listed) > 8)
                yield f"{what} of {has.name} that {lacks.name} lacks: {', '.join(listed[:8])}{more}"
