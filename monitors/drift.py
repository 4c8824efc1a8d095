"""Drift against the run's own healthy past, and against reference runs: the policy's trends at every site, together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from foreshock.errors import ConfigError
from foreshock.monitors.cusum import Cusum
from foreshock.monitors.finding import Finding
from foreshock.monitors.forecast import Forecast, median
from foreshock.monitors.policy import SPACING, TRENDS, Trend
from foreshock.monitors.warmup import Warmup
from foreshock.records import Array, Reading, Site

HINT = 0.4  # share of the limit from which a series may help to name a mechanism
LIMIT = 7.0  # sigma: with the clip at 4 and the slack at 1.5, five samples far out are the least that alarms
EFFECT = (
    4.0  # the policy's smallest change that matters counts as at most so many sigma: smaller ones stay below the slack
)
FOLDS: dict[str, Callable[[Array], Any]] = {"mean": np.mean, "max": np.max, "min": np.min}


class Run(Protocol):
    """A recorded run."""

    def series(self, metric: str, site: str | None = None) -> tuple[Array, Array]:
        """Steps ``[n]`` and values ``[n]`` or ``[n, heads]``."""
        ...


class Columns:
    """Gives every (trend, site) a column, and folds one step's readings into a row of them."""

    def __init__(self, trends: Sequence[Trend]) -> None:
        self.trends = trends
        self.keys: list[tuple[int, str | None]] = []
        self.places: list[tuple[int, int]] = []  # trend, and the how-manieth series of that trend
        self._column: dict[tuple[int, str | None], int] = {}
        self._wanted: dict[str, list[int]] = {}
        for position, trend in enumerate(trends):
            self._wanted.setdefault(trend.metric, []).append(position)

    def wants(self, metric: str) -> bool:
        """Whether a trend is judged of this metric."""
        return metric in self._wanted

    def row(self, readings: Sequence[Reading]) -> tuple[Array, Array, Array]:
        """Values on the trend's scale, raw values, and the worst head or expert (-1: none), each ``[S]``."""
        found: dict[int, tuple[float, float, int]] = {}
        for reading in readings:
            for position in self._wanted.get(reading.metric, ()):
                key = (position, reading.site)
                if key not in self._column:
                    self._add(key)
                found[self._column[key]] = fold(self.trends[position], reading.values)
        rows = np.full((3, len(self.keys)), np.nan)
        for column, triple in found.items():
            rows[:, column] = triple
        return rows[0], rows[1], np.nan_to_num(rows[2], nan=-1).astype(int)

    def _add(self, key: tuple[int, str | None]) -> None:
        self._column[key] = len(self.keys)
        self.keys.append(key)
        self.places.append((key[0], sum(position == key[0] for position, _ in self.places)))

    def restore(self, keys: Sequence[tuple[int, str | None]]) -> None:
        """Start again with these columns."""
        self.keys, self.places, self._column = [], [], {}
        for key in keys:
            self._add(key)


def fold(trend: Trend, values: Array) -> tuple[float, float, int]:
    """One series' value on its scale, its raw value and its worst index; non-finite values become NaN."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan, -1
    raw = float(FOLDS[trend.fold](finite))
    sign = -1 if trend.directions == (-1,) else 1
    worst = int(np.where(np.isfinite(values), sign * values, -math.inf).argmax())
    scaled = raw if trend.scale == "linear" else math.log(raw) if raw > 0 else math.nan
    return scaled, raw, worst if len(values) > 1 else -1


class Drift:
    """CUSUM of every trend against its own forecast; silent while the learning rate warms up.

    A sample is what each series said last since the sample before: weights are read on another step at each site.
    With ``reference`` runs, a second CUSUM judges the distance to their median at the same step, in units of their spread.
    """

    def __init__(
        self, trends: Sequence[Trend] = TRENDS, reference: Sequence[Run] = (), warmup: int = 0, spacing: int = SPACING
    ) -> None:
        self.trends, self.warmup, self.spacing = tuple(trends), Warmup(warmup), spacing
        self.columns = Columns(self.trends)
        self.forecast = Forecast()
        self.cusum, self.reference_cusum = Cusum(), Cusum()
        self._band = Band(reference)
        self._last = -spacing
        self._held: dict[tuple[str, str | None], Reading] = {}  # since the last sample

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Finding]:
        """Every series that is out now (score above 1), and the hints."""
        self._held |= {(r.metric, r.site): r for r in readings if self.columns.wants(r.metric)}
        if step < self._last + self.spacing:
            return []
        self._last = step
        held, self._held = list(self._held.values()), {}
        if self.warmup.update(step, readings):
            return []
        values, raw, worst = self.columns.row(held)
        if not len(values):
            return []
        effects = np.array([self.trends[position].effect for position, _ in self.columns.keys])
        limit = LIMIT + math.log(
            len(values)
        )  # the sum's tail is exponential: with the series, the limit grows like their log
        predicted, spread = (
            np.pad(x, (0, len(values) - len(x)), constant_values=np.nan) for x in self.forecast.expect(step)
        )
        sigma = np.fmax(self._shared(spread), effects / EFFECT)
        z = np.where(np.isfinite(spread), (values - predicted) / sigma, np.nan)
        sums = self.cusum.update(step, z, limit)
        calm = (sums < limit / 2).all(0)
        self.forecast.learn(step, values, np.where(calm, values - predicted, np.nan))
        findings = self._findings(step, self.cusum, limit, raw, predicted, worst, "its own trend")
        if self._band:
            middle, width = self._band.at(step, [(self.trends[position], site) for position, site in self.columns.keys])
            z = (values - middle) / np.fmax(width, effects / EFFECT)
            self.reference_cusum.update(step, z, limit)
            findings += self._findings(step, self.reference_cusum, limit, raw, middle, worst, "the reference")
        return findings

    def _shared(self, spread: Array) -> Array:
        """A spread below half of its kind's median over the sites is luck: it is raised to that."""
        kinds, ranks = np.array(self.columns.places).T
        table = np.full((ranks.max() + 1, len(self.trends)), np.nan)
        table[ranks, kinds] = spread
        raised: Array = np.fmax(spread, 0.5 * median(table)[kinds])
        return raised

    def _findings(
        self, step: int, cusum: Cusum, limit: float, raw: Array, expected: Array, worst: Array, against: str
    ) -> list[Finding]:
        findings = []
        for side, column in np.argwhere(cusum.sums > HINT * limit):
            position, site = self.columns.keys[column]
            trend, direction = self.trends[position], 1 - 2 * int(side)
            if direction not in trend.directions or not np.isfinite(expected[column]):
                continue
            centre = math.exp(expected[column]) if trend.scale == "log" else float(expected[column])
            findings.append(
                Finding(
                    step=step,
                    onset=int(cusum.onset[side, column]),
                    site=site,
                    metric=trend.metric,
                    value=float(raw[column]),
                    expected=f"about {centre:.3g} by {against} ({trend.fold})",
                    direction=direction,
                    score=float(cusum.sums[side, column] / limit),
                    index=int(worst[column]) if worst[column] >= 0 else None,
                )
            )
        return findings

    def state_dict(self) -> dict[str, Any]:
        return {
            "keys": [list(key) for key in self.columns.keys],
            "forecast": self.forecast.state_dict(),
            "cusum": self.cusum.state_dict(),
            "reference": self.reference_cusum.state_dict(),
            "last": self._last,
            "held": [[*key, reading.values.tolist()] for key, reading in self._held.items()],
            "warmup": self.warmup.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.columns.restore([(int(position), site) for position, site in state["keys"]])
        self.forecast.load_state_dict(state["forecast"])
        self.cusum.load_state_dict(state["cusum"])
        self.reference_cusum.load_state_dict(state["reference"])
        self._last = state["last"]
        held = [Reading(metric, site, np.array(values)) for metric, site, values in state["held"]]
        self._held = {(reading.metric, reading.site): reading for reading in held}
        self.warmup.load_state_dict(state["warmup"])


class Band:
    """Median and spread of the reference runs, per series, at any step they cover."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        self._curves: dict[tuple[Trend, str | None], list[tuple[Array, Array]]] = {}

    def __bool__(self) -> bool:
        return bool(self.runs)

    def at(self, step: int, keys: Sequence[tuple[Trend, str | None]]) -> tuple[Array, Array]:
        """``[S]`` medians and spreads; NaN for a series or a step that no reference run has."""
        middle, width = np.full(len(keys), np.nan), np.full(len(keys), np.nan)
        for column, key in enumerate(keys):
            if key not in self._curves:
                self._curves[key] = [curve for run in self.runs if len((curve := _curve(run, *key))[0]) > 1]
            curves = [(t, y) for t, y in self._curves[key] if t[0] <= step <= t[-1]]
            if not curves:
                continue
            at_step = np.array([np.interp(step, t, y) for t, y in curves])
            # Within a run, neighbouring samples around this step show the noise; between runs, the seeds' own spread.
            near = np.concatenate([y[np.argsort(np.abs(t - step))[:15]] for t, y in curves])
            middle[column] = np.median(at_step)
            between = 1.4826 * np.median(np.abs(at_step - middle[column])) if len(curves) > 2 else 0.0
            width[column] = max(between, 1.4826 * np.median(np.abs(near - np.median(near))))
        return middle, width


def _curve(run: Run, trend: Trend, site: str | None) -> tuple[Array, Array]:
    try:
        steps, values = run.series(trend.metric, site)
    except (KeyError, ConfigError):
        return np.empty(0), np.empty(0)
    folded = np.array([fold(trend, row)[0] for row in np.asarray(values, dtype=float).reshape(len(steps), -1)])
    kept = np.isfinite(folded)
    return np.asarray(steps, dtype=float)[kept], folded[kept]
