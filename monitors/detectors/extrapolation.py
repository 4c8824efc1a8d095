"""Where a rising series is going: "at this slope the limit is reached in about N steps".

A finding only where the slope is sure and the limit no farther ahead than the window looks back; else a hint. Shapes: S series.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foreshock.monitors.budget import Budget
from foreshock.monitors.detectors.columns import Columns
from foreshock.monitors.detectors.reach import Reach
from foreshock.monitors.detectors.warmup import Warmup
from foreshock.monitors.finding import Finding
from foreshock.monitors.policy import LIMITS, SPACING, Limit, Trend
from foreshock.records import Reading, Site

HINT = 0.4  # of the limit


class Extrapolation:
    """Judges the largest head of every metric with a hard limit above zero, every ``spacing`` steps once the run has settled."""

    def __init__(
        self, limits: Sequence[Limit] = LIMITS, warmup: int = 0, spacing: int = SPACING, *, budget: Budget | None = None
    ) -> None:
        self.limits = tuple(limit for limit in limits if limit.above > 0)
        self.warmup, self.spacing = Warmup(warmup), spacing
        self.budget = Budget() if budget is None else budget
        self.columns = Columns(
            [Trend(limit.metric, "max", "linear", 4.0, (+1,), limit.source) for limit in self.limits]
        )
        self.reach = Reach(np.empty(0))
        self._last = -spacing

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Finding]:
        """Every series whose limit is ahead, above 1 if it is near and certain."""
        if step < self._last + self.spacing or self.warmup.update(step, readings):
            return []
        self._last = step
        x_S, raw_S, worst_S = self.columns.row(readings)
        if not len(x_S):
            return []
        self.reach.limit = np.array([limit.above for limit in self.limits])[self.columns.positions()]
        self.reach.sure = self.budget.student_t("extrapolation", self.spacing, len(x_S), self.reach.degrees)
        self.reach.update(step, x_S)
        score, onset, interval = self.reach.score, self.reach.onset, self.reach.onset_interval
        findings = []
        for column in np.flatnonzero((score > HINT) & np.isfinite(raw_S)):
            position, site = self.columns.keys[column]
            ahead, limit = self.reach.ahead[column], self.limits[position].above
            findings.append(
                Finding(
                    step=step,
                    onset=int(onset[column]),
                    site=site,
                    metric=self.limits[position].metric,
                    value=float(raw_S[column]),
                    expected=f"at most {limit:g}; at this slope that is reached in about {ahead:.0f} steps",
                    direction=+1,
                    score=float(score[column]),
                    index=int(worst_S[column]) if worst_S[column] >= 0 else None,
                    onset_interval=(int(interval[column][0]), int(interval[column][1])),
                )
            )
        return findings

    def state_dict(self) -> dict[str, Any]:
        reach, warmup = self.reach.state_dict(), self.warmup.state_dict()
        return {"columns": self.columns.state_dict(), "reach": reach, "warmup": warmup, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.columns.load_state_dict(state["columns"])
        self.reach.load_state_dict(state["reach"])
        self.warmup.load_state_dict(state["warmup"])
        self._last = state["last"]
