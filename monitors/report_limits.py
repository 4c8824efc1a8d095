"""Where a stored series stops being healthy: the floors of laws, fixed bounds, and the band around a run's own trend.

Bands are not stored: the drift detector is given the run again, as it was judged.
Shapes: N samples of a series, H heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foreshock.monitors.detectors.cusum import SLACK
from foreshock.monitors.detectors.drift import Drift
from foreshock.monitors.detectors.law_test import LOGITS, judged_as
from foreshock.monitors.laws import EXPONENTIAL, GAINS, MARGIN, floor, growth
from foreshock.monitors.policy import LAW_LOGITS, TRENDS
from foreshock.monitors.spectra import in_turn
from foreshock.records import Array, Reading, Site

if TYPE_CHECKING:
    from foreshock.reader import Run

MOST = 20_000  # samples that are judged again, the newest: a band looks back over a hundred
OTHER = {"bias_site": "bias"}  # laws that share a floor
Key = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Band:
    """What the trend of a series, folded over its heads by ``fold``, was expected to be: an excursion gathers evidence outside of
    ``low`` and ``high``, on the sides in ``directions``. NaN from where it was judged out until it came back."""

    fold: str
    directions: tuple[int, ...]
    steps: Array
    low: Array
    high: Array


def floors(run: Run, keys: Collection[Key], law: str, site: Site, steps: Array, values_NH: Array) -> Array | None:
    """The limit ``[N, H]`` of each residual of a law at a site, NaN where none is judged; None for what has no floor."""
    name = law.removeprefix("law/")
    name = OTHER.get(name, name)
    held = run.meta.get("held_to", {})
    dtype = judged_as(site, held.get("kernel_dtype"), bool(held.get("tf32")))
    if name not in MARGIN or not law.startswith("law/") or dtype not in MARGIN["bias"] | {"float64": 0}:
        return None
    logits_N1 = _beside(run, keys, LOGITS, site.id, steps, 1).max(1, keepdims=True)
    gains_NH = _beside(run, keys, GAINS.get(law, ""), site.id, steps, values_NH.shape[1])
    grown = growth(gains_NH, logits_N1, np.array(law in EXPONENTIAL))
    return np.where(logits_N1 > LAW_LOGITS, np.nan, floor(name, dtype) * grown) + np.zeros_like(values_NH)


def _beside(run: Run, keys: Collection[Key], metric: str, site: str, steps: Array, width: int) -> Array:
    """Another series of the site at the same steps, ``[N, H]``; NaN where it was not recorded."""
    missing = np.full((len(steps), width), np.nan)
    if (metric, site) not in keys:
        return missing
    own, values = run.column(metric, site)
    found = np.full((len(steps), values.shape[1]), np.nan)
    at = np.clip(np.searchsorted(own, steps), 0, len(own) - 1)
    same = own[at] == steps
    found[same] = values[at[same]]
    return found if width == 1 or values.shape[1] == width else missing


def bands(run: Run) -> dict[Key, Band]:
    """The band of every judged series that has had time to learn one."""
    drift, rows, judged = Drift(), [], np.empty(0)
    for step, readings in _samples(run):
        drift.update(step, readings, {})
        if drift.own.expected is judged or not len(drift.own.expected):
            continue  # no sample of a trend, or still warming up
        judged = drift.own.expected
        spread = np.where(drift.own.score < 1, SLACK * drift.own.spread, np.nan)
        rows.append((step, judged + drift.pace, spread))
    found: dict[Key, Band] = {}
    units = drift.columns.units() if drift.columns.keys else np.empty(0)
    for column, (position, site) in enumerate(drift.columns.keys):
        trend = TRENDS[position]
        own = [(step, middle[column], spread[column]) for step, middle, spread in rows if column < len(middle)]
        own = [row for row in own if np.isfinite(row[1])]
        if not own or (trend.metric, site) in found:
            continue
        steps, middle, spread = (np.array(part) for part in zip(*own, strict=True))
        low, high = (middle - spread) / units[column], (middle + spread) / units[column]
        low, high = (np.exp(low), np.exp(high)) if trend.scale == "log" else (low, high)
        found[trend.metric, site] = Band(trend.fold, trend.directions, steps, low, high)
    return found


def _samples(run: Run) -> Iterator[tuple[int, list[Reading]]]:
    """What the detector looks at, at each step that was judged; weights are read in between and come with the next."""
    wanted = {trend.metric for trend in TRENDS} | {"optim/lr"}
    by_step: dict[int, list[Reading]] = defaultdict(list)
    sampled: set[int] = set()
    for metric, site in run.columns():
        if metric not in wanted:
            continue
        steps, values = run.column(metric, site)
        if not in_turn(metric) and not metric.startswith("run/"):
            sampled.update(steps.tolist())
        for step, row in zip(steps.tolist(), values, strict=True):
            by_step[step].append(Reading(metric, site, row))
    first = sorted(sampled)[-MOST:][:1]
    held: dict[Key, Reading] = {}
    for step in sorted(step for step in by_step if first and step >= first[0]):
        held |= {(reading.metric, reading.site): reading for reading in by_step[step]}
        if step in sampled:
            yield step, list(held.values())
            held = {}
