"""What the page of a report draws, as one JSON value: every series thinned to what a page can show, the most telling ones least.

Names from the run are in it as they are: whoever embeds it escapes it, and the page shows it as text alone.
Shapes: N samples, H heads or experts.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from foreshock.errors import ConfigError
from foreshock.monitors import metrics
from foreshock.monitors.compare import WHOLE
from foreshock.monitors.policy import FINITE, LAWS, LIMITS, TRENDS
from foreshock.monitors.report_limits import Band, Key, floors
from foreshock.monitors.report_thin import Packed, extremes, keep, odd, thin
from foreshock.records import Alarm, Array, Site

if TYPE_CHECKING:
    from foreshock.reader import Run

POINTS, MANY, LEAST = 1200, 600, 24  # of a curve, at most, where many share a figure, and at least
CURVES = 240_000  # points of all curves together
CELLS = 240  # columns of a series' heads
HEADS = 1_200_000  # numbers of all heads together
HIDDEN = {"law/bias_num", "law/bias_den", "law/bias_samples"}  # halves of law/bias, and how many it is made of
SIGNED = ("law/bias", "law/bias_site", "law/bias_t", "law/bias_site_t", "attention/shadow_bias")
BIAS = ("law/bias", "law/bias_site")
PARTS = {"heads": "head", "kv_heads": "key/value head", "experts": "expert"}
FOLDS = {"max": "largest", "min": "smallest"}  # as said to people
ABOVE = {limit.metric: limit.above for limit in LIMITS if limit.above > 0}
JUDGED = tuple(dict.fromkeys(trend.metric for trend in TRENDS if trend.metric != "run/loss"))
FIRST = {*LAWS, *BIAS, *JUDGED, *ABOVE, "run/loss"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One metric's figure: ``anchor`` is its id on the page; ``site`` the position of the one it opens with, -1 for all."""

    metric: str
    title: str
    meaning: str
    anchor: str
    site: int = -1


def anchor(metric: str) -> str:
    """An id for the page that is the same every time; names that are no words get a checksum."""
    word = re.sub(r"[^A-Za-z0-9]+", "-", metric).strip("-")
    return f"m-{word}" if re.fullmatch(r"[\w/@]+", metric, re.A) else f"m-{word}-{zlib.crc32(metric.encode()):08x}"


def panel(metric: str, site: int = -1) -> Panel:
    entry = known(metric)
    unit = f" [{entry.unit}]" if entry and entry.unit else ""
    return Panel(metric, metric + unit, entry.meaning if entry else "", anchor(metric), site)


def known(name: str) -> metrics.Metric | None:
    try:
        return metrics.metric(name)
    except ConfigError:
        return None


def fold(metric: str) -> str:
    """How heads or experts become one curve: as the metric is judged, else as it merges."""
    if metric in SIGNED:
        return "farthest from zero"
    judged = next((trend.fold for trend in TRENDS if trend.metric == metric), None)
    if judged is not None:
        return FOLDS.get(judged, judged)
    entry = known(metric)
    most = metric.startswith("law/") or (entry is not None and entry.merge == "max") or metric.endswith("nonfinite")
    return "largest" if most else "mean"


def folded(values_NH: Array, how: str) -> Array:
    """``[N]``, over the values that are there."""
    if values_NH.shape[1] == 1:
        return values_NH[:, 0]
    there = ~np.isnan(values_NH)
    if how == "mean":
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(there, values_NH, 0.0).sum(1) / there.sum(1))
    size = np.abs(values_NH) if how == "farthest from zero" else -values_NH if how == "smallest" else values_NH
    worst = np.where(there, size, -np.inf).argmax(1)
    return np.asarray(values_NH[np.arange(len(values_NH)), worst])


def payload(run: Run, sites: Mapping[str, Site], alarms: Sequence[Alarm], bands: Mapping[Key, Band]) -> dict[str, Any]:
    """Everything that is drawn; finite numbers, texts and lists alone."""
    every = frozenset(run.columns())
    keys = [key for key in every if key[0] not in HIDDEN]
    names = sorted({metric for metric, _ in keys})
    unlisted = {site for _, site in keys if site is not None} - set(sites)
    order = {site: at for at, site in enumerate([*sites, *sorted(unlisted)])}
    keys.sort(key=lambda key: (key[0], order.get(key[1] or "", -1)))
    telling = {(alarm.metric, alarm.site) for alarm in alarms}
    first = sum(key[0] in FIRST or key in telling for key in keys)
    most = _points(0.7 * CURVES, first), _points(0.3 * CURVES, len(keys) - first)
    packed, series = Packed(), []
    for metric, site in keys:
        points = most[0] if metric in FIRST or (metric, site) in telling else most[1]
        points = points if site is None or (metric, site) in telling else min(points, MANY)
        at = order.get(site or "", -1)
        one = _Series(run, every, (metric, site), at, names.index(metric), sites.get(site or ""))
        one.draw(packed, points, bands.get((metric, site)))
        series.append(one)
    _heads(packed, series, telling, {alarm.site for alarm in alarms})
    return {
        "arrays": packed.texts,
        "metrics": [_metric(metric) for metric in names],
        "sites": _labels(order, sites),
        "series": [one.plain for one in series],
        "alarms": [_alarm(alarm, order) for alarm in alarms],
    }


class _Series:
    """One series: its curve and what bounds it are packed by ``draw``, its heads, if there is room, by ``heads``."""

    def __init__(self, run: Run, every: Collection[Key], key: Key, at: int, number: int, known_as: Site | None) -> None:
        self.run, self.every, self.known_as = run, every, known_as
        self.metric, self.site = key
        self.width = 1
        self.plain: dict[str, Any] = {"m": number, "s": at}

    def draw(self, packed: Packed, points: int, band: Band | None) -> None:
        """The numbers of the run are let go again: all series of a long run together may be too many for memory."""
        (steps, values), how = self.run.column(self.metric, self.site), fold(self.metric)
        self.width = values.shape[1]
        self.plain |= {"n": len(steps), "width": self.width}
        own = self.known_as
        limits = None if own is None else floors(self.run, self.every, self.metric, own, steps, values)
        curve = folded(values, how)
        if limits is not None and self.metric not in BIAS:
            with np.errstate(invalid="ignore", divide="ignore"):
                excess = np.where(np.isnan(values / limits), -np.inf, values / limits)
            worst = excess.argmax(1)  # the head that is farthest beyond its floor, with that floor
            curve, edge = (part[np.arange(len(steps)), worst] for part in (values, limits))
            self._beyond(steps, excess.max(1), worst)
            at, _ = thin(steps, curve, points)
            self.plain["floor"] = packed.floats(edge[keep(curve, points)])
        elif limits is not None and np.isfinite(limits).any():
            self.plain["bounds"] = [float(sign * np.nanmax(limits)) for sign in (-1, 1)]
        elif self.metric in ABOVE:
            self.plain["bounds"] = [ABOVE[self.metric]]
        at, thinned = thin(steps, curve, points)
        self.plain |= {"x": packed.steps(at), "y": packed.floats(thinned)}
        must = self.metric.startswith(WHOLE) or self.metric in FINITE
        self.plain["odd"] = odd(steps, values, whole=must)
        if band is not None and FOLDS.get(band.fold, band.fold) == how:
            kept = np.unique(np.linspace(0, len(band.steps) - 1, min(len(band.steps), POINTS // 2)).astype(int))
            low, high = packed.floats(band.low[kept]), packed.floats(band.high[kept])
            self.plain["band"] = [packed.steps(band.steps[kept]), low, high]

    def _beyond(self, steps: Array, excess: Array, worst: Array) -> None:
        """How the residual stood to its floor: at worst, and where it was last beyond."""
        if not len(excess) or excess.max() == -np.inf:
            return
        at, out = int(excess.argmax()), np.flatnonzero(excess > 1)
        told = {"worst": float(min(excess[at], 1e30)), "step": int(steps[at]), "head": int(worst[at])}
        self.plain["beyond"] = told | {"count": len(out), "last": int(steps[out[-1]]) if len(out) else -1}

    def heads(self, packed: Packed) -> None:
        steps, values = self.run.column(self.metric, self.site)
        at, rows, pairs = extremes(steps, values, CELLS)
        self.plain["heads"] = {"x": packed.steps(at), "z": packed.halves(rows), "pairs": pairs}

    @property
    def cells(self) -> int:
        return self.width * min(int(self.plain["n"]), CELLS)


def _heads(packed: Packed, series: Sequence[_Series], telling: set[Key], sick: set[str | None]) -> None:
    """The heads of as many series as there is room for: where there were alarms, what is judged, the rest."""

    def rank(one: _Series) -> tuple[bool, ...]:
        judged = one.metric in FIRST
        return (
            (one.metric, one.site) not in telling,
            not (judged and one.site in sick),
            not judged,
            one.site not in sick,
        )

    room = HEADS
    for one in sorted((one for one in series if one.width > 1), key=rank):
        room -= one.cells
        if room < 0:
            return
        one.heads(packed)


def _points(budget: float, curves: int) -> int:
    return int(min(POINTS, max(LEAST, budget // max(curves, 1))))


def _metric(name: str) -> dict[str, Any]:
    entry = known(name)
    axis = entry.axis if entry else ""
    heads = axis.split(",") if "," in axis else PARTS.get(axis, "entry")
    return {
        "name": name,
        "anchor": anchor(name),
        "fold": fold(name),
        "heads": heads,
        "law": name in LAWS,
    }


def _labels(order: Mapping[str, int], sites: Mapping[str, Site]) -> list[str]:
    """A site by its name, or by its id where two share the name."""
    names = [site.name for site in sites.values()]
    return [sites[site].name if site in sites and names.count(sites[site].name) == 1 else site for site in order]


def _alarm(alarm: Alarm, order: Mapping[str, int]) -> dict[str, Any]:
    low, high = alarm.onset_interval
    head = alarm.head if alarm.head is not None else alarm.expert
    return {
        "step": alarm.step, "onset": alarm.onset, "low": low, "high": high, "site": order.get(alarm.site or "", -1),
        "metric": alarm.metric, "head": -1 if head is None else head, "what": alarm.mechanism,
    }  # fmt: skip


def groups(names: Sequence[str]) -> Iterator[tuple[str, list[Panel]]]:
    """A figure for each of ``names``, by family."""
    grouped: dict[str, list[Panel]] = {}
    for name in names:
        grouped.setdefault(metrics.family(name) if known(name) else "other", []).append(panel(name))
    order = [*dict.fromkeys(metrics.FAMILIES.values()), "spectra"]
    yield from sorted(grouped.items(), key=lambda entry: (order.index(entry[0]) if entry[0] in order else 99, entry[0]))
