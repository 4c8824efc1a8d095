"""Drift against the run's own healthy past, and against reference runs: the policy's trends at every site, together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foreshock.monitors.budget import Budget
from foreshock.monitors.detectors.columns import Columns
from foreshock.monitors.detectors.contract import SeriesTest
from foreshock.monitors.detectors.cusum import Cusum
from foreshock.monitors.detectors.forecast import Forecast
from foreshock.monitors.detectors.quantile_band import QuantileBand
from foreshock.monitors.detectors.references import TOKENS, References, Run
from foreshock.monitors.detectors.warmup import Warmup
from foreshock.monitors.finding import Finding
from foreshock.monitors.policy import SPACING, TRENDS, Trend
from foreshock.monitors.rates import Rates
from foreshock.records import Array, Reading, Site

HINT = 0.4  # share of the limit from which a series may help to name a mechanism
RISING = 1.05  # a learning rate so far above the highest that was healthy: what follows it is no baseline
LEAST = 1.0  # spread against the own trend, in quarters of the smallest change that matters
REFERENCE_LEAST = 4.0 / 1.5  # against references, whose seeds differ for good: a smaller change stays below the slack


class Drift:
    """A CUSUM of every trend against its own forecast; silent while the learning rate warms up.

    A sample is what each series said last since the sample before: weights are read on another step at each site.
    With ``reference`` runs, a second CUSUM judges the distance to their band at the same step, or, with ``align="tokens"``, at the
    same count of ``run/tokens``. ``test`` takes the first one's place: any `SeriesTest`, with the limit that it has of its own.
    """

    def __init__(
        self,
        trends: Sequence[Trend] = TRENDS,
        reference: Sequence[Run] = (),
        warmup: int = 0,
        spacing: int = SPACING,
        *,
        test: SeriesTest | None = None,
        align: str = "step",
        budget: Budget | None = None,
    ) -> None:
        self.trends, self.warmup, self.spacing = tuple(trends), Warmup(warmup), spacing
        self.budget = Budget() if budget is None else budget
        self.columns = Columns(self.trends)
        self.own_trend = Forecast(LEAST)
        self.own = Cusum(self.own_trend)
        self.test: SeriesTest = self.own if test is None else test
        self.references = References(reference, align)
        self.band = QuantileBand(np.empty(0), REFERENCE_LEAST)
        self.against_references = Cusum(self.band)
        self._compared = 0  # columns that the band has
        self._gridded = 0  # columns whose curves made the band's grid
        self._tokens = -1.0
        self.rates = Rates()
        self._before: float | None = None  # the rate of the last sample
        self.pace = np.empty(0)  # what the learning rate adds to each column's expected value at the last sample
        self._last = -spacing
        self._held: dict[tuple[str, str | None], Reading] = {}  # since the last sample

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Finding]:
        """Every series that is out now (score above 1), and the hints."""
        self.rates.update(step, readings)
        self._held |= {(r.metric, r.site): r for r in readings if self.columns.wants(r.metric) or r.metric == TOKENS}
        if step < self._last + self.spacing:
            return []
        self._last = step
        held, self._held = list(self._held.values()), {}
        if self.warmup.update(step, readings):
            return []
        x_S, raw_S, worst_S = self.columns.row(held)
        if not len(x_S):
            return []
        sides = self.columns.sides()
        if hasattr(self.test, "sides"):
            self.test.sides = sides
        self.own.limit = self.budget.log_limit("trend", self.spacing, int(sides.sum()))
        self.own_trend.frozen = self.rates.rise > RISING
        self.pace = self.columns.paced() * self._pace()
        self.test.update(step, x_S - self.pace)
        findings = self._findings(step, self.test, raw_S, worst_S, "its own trend", self.pace)
        if self.references:
            self._compare(step, held, x_S, sides)
            findings += self._findings(
                step, self.against_references, raw_S, worst_S, "the reference", np.zeros(len(x_S))
            )
        return findings

    def _pace(self) -> float:
        """The logarithm of the rate, as far as it is healthy: the larger of this sample's and the last one's, for increments reach
        back."""
        before, self._before = self._before, self.rates.healthy
        known = [rate for rate in (before, self._before) if rate]
        return math.log(max(known)) if known else 0.0

    def _compare(self, step: int, held: Sequence[Reading], x_S: Array, sides: Array) -> None:
        """One sample against the references; none where the run's place among them is not known."""
        self._cover()
        if self.references.align == "tokens":
            count = max((float(r.values.max()) for r in held if r.metric == TOKENS), default=math.nan)
            risen = count > self._tokens
            self.band.place = count if risen else math.nan
            self._tokens = count if risen else self._tokens
        self.against_references.sides = sides
        self.against_references.limit = self.budget.log_limit("references", self.spacing, int(sides.sum()))
        self.against_references.update(step, x_S)

    def _cover(self) -> None:
        """Give the band the columns that it has not got yet."""
        new = self.columns.keys[self._compared :]
        if not new:
            return
        curves = [self.references.curves(self.trends[position], site) for position, site in new]
        if not len(self.band.grid):
            curves = [*([[]] * self._compared), *curves]  # none of the earlier columns was ever recorded
            self.band = QuantileBand(self.references.grid(curves[: self._gridded or None]), REFERENCE_LEAST)
            self.against_references.baseline = self.band
            if len(self.band.grid):  # a resumed run has the grid that it had
                self._gridded = self._gridded or len(curves)
        self.band.add(curves)
        self._compared = len(self.columns.keys)

    def _findings(
        self, step: int, test: SeriesTest, raw_S: Array, worst_S: Array, against: str, pace_S: Array
    ) -> list[Finding]:
        heard = np.flatnonzero((test.score > HINT) & np.isfinite(test.expected) & np.isfinite(raw_S))
        if not len(heard):
            return []
        onsets, intervals = _began(test, heard)
        units, positions, findings = self.columns.units(), self.columns.positions(), []
        for column, onset, interval in zip(heard, onsets, intervals, strict=True):
            trend, direction = self.trends[positions[column]], int(test.direction[column])
            if direction not in trend.directions:
                continue  # a test of the user's own that knows no sides
            centre = (test.expected[column] + pace_S[column]) / units[column]
            centre = math.exp(centre) if trend.scale == "log" else centre
            findings.append(
                Finding(
                    step=step,
                    onset=int(onset),
                    site=self.columns.keys[column][1],
                    metric=trend.metric,
                    value=float(raw_S[column]),
                    expected=f"about {centre:.3g} by {against} ({trend.fold})",
                    direction=direction,
                    score=float(test.score[column]),
                    index=int(worst_S[column]) if worst_S[column] >= 0 else None,
                    onset_interval=(int(interval[0]), int(interval[1])),
                )
            )
        return findings

    def state_dict(self) -> dict[str, Any]:
        return {
            "columns": self.columns.state_dict(),
            "test": self.test.state_dict(),
            "references": self.against_references.state_dict(),
            "clock": [self._last, self._tokens, self._gridded],
            "held": [[*key, reading.values.tolist()] for key, reading in self._held.items()],
            "warmup": self.warmup.state_dict(),
            "rates": [self.rates.state_dict(), self._before],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.columns.load_state_dict(state["columns"])
        self.test.load_state_dict(state["test"])
        self.against_references.load_state_dict(state["references"])
        self._last, self._tokens, self._gridded = state["clock"]
        held = [Reading(metric, site, np.array(values)) for metric, site, values in state["held"]]
        self._held = {(reading.metric, reading.site): reading for reading in held}
        self.warmup.load_state_dict(state["warmup"])
        rates, self._before = state["rates"]
        self.rates.load_state_dict(rates)


def _began(test: SeriesTest, columns: Array) -> tuple[Array, Array]:
    """Onsets and intervals of a few columns, asked for alone where the test can."""
    if isinstance(test, Cusum):
        return test.began(columns)
    return test.onset[columns], test.onset_interval[columns]
