"""Hard limits: bounds on single readings that need no history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foreshock.monitors.detectors.bound import Bound
from foreshock.monitors.detectors.sheet import Layout, Places, Sheet
from foreshock.monitors.detectors.warmup import Warmup
from foreshock.monitors.finding import Finding
from foreshock.monitors.policy import LIMITS, Limit
from foreshock.records import Array, Reading, Site


class Limits:
    """A finding for every bound that is broken now and has been for long enough, with the worst head or expert."""

    def __init__(self, limits: Sequence[Limit] = LIMITS, warmup: int = 0) -> None:
        self.limits = {limit.metric: limit for limit in limits}
        self.warmup = Warmup(warmup)
        self._sheet, self._places = Sheet(self.limits), Places()
        self._layout: Layout | None = None
        self._columns = np.empty(0, dtype=np.int64)
        self._settled = np.empty(0, dtype=bool)
        self._bound = Bound(np.empty(0))

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Finding]:
        warming = self.warmup.update(step, readings)
        layout, values = self._sheet.read(readings)
        if layout is not self._layout:
            self._arrange(layout)
        values = np.where(np.isnan(values), -np.inf, values)
        top = layout.each(np.maximum, values)
        x_S = np.full(self._places.size, np.nan)
        x_S[self._columns] = np.where((self._settled & warming) | (top == -np.inf), np.nan, top)
        self._bound.update(step, x_S)
        out = np.flatnonzero((self._bound.score[self._columns] > 1) & ~np.isnan(x_S[self._columns]))
        return [self._finding(step, layout, values, int(row)) for row in out]

    def _arrange(self, layout: Layout) -> None:
        self._layout, self._columns = layout, self._places.of(layout.keys, np.ones_like(layout.lengths_R))
        self._settled = np.array([self.limits[metric].settled for metric, _ in layout.keys], dtype=bool)
        own = [self.limits[str(key[0])] for key in self._places.keys]
        self._bound.above = np.array([limit.above for limit in own], dtype=float)
        self._bound.samples = np.array([limit.samples for limit in own], dtype=np.int64)
        self._bound.steps = np.array([limit.steps for limit in own], dtype=np.int64)

    def _finding(self, step: int, layout: Layout, values: Array, row: int) -> Finding:
        column = self._columns[row]
        (metric, site), start = layout.keys[row], layout.starts_R[row]
        worst = int(np.argmax(values[start : start + layout.lengths_R[row]]))
        low, high = map(int, self._bound.onset_interval[column])
        return Finding(
            step=step,
            onset=int(self._bound.onset[column]),
            site=site,
            metric=metric,
            value=float(values[start + worst]),
            expected=f"at most {self.limits[metric].above:g}",
            direction=+1,
            score=float(self._bound.score[column]),
            index=layout.index(row, worst),
            onset_interval=(low, high),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "places": self._places.state_dict(),
            "bound": self._bound.state_dict(),
            "warmup": self.warmup.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._places.load_state_dict(state["places"])
        self._layout = None
        self._bound.load_state_dict(state["bound"])
        self.warmup.load_state_dict(state["warmup"])
