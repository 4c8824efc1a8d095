"""Non-finite values: events of their own, of the scalars that must be finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foreshock.monitors.detectors.bound import Bound
from foreshock.monitors.detectors.sheet import Layout, Places, Sheet
from foreshock.monitors.finding import Finding
from foreshock.monitors.policy import FINITE
from foreshock.records import Array, Reading, Site


class NonFinite:
    """A finding for every metric of ``samples`` (in a row, by metric) that holds a NaN or an infinity."""

    def __init__(self, samples: Mapping[str, int] = FINITE) -> None:
        self.samples = dict(samples)
        self._sheet, self._places = Sheet(self.samples), Places()
        self._layout: Layout | None = None
        self._columns = np.empty(0, dtype=np.int64)
        self._bound = Bound(0.0)

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Finding]:
        layout, values = self._sheet.read(readings)
        if layout is not self._layout:
            self._layout, self._columns = layout, self._places.of(layout.keys, np.ones_like(layout.lengths_R))
            self._bound.samples = np.array([self.samples[str(key[0])] for key in self._places.keys], dtype=np.int64)
        first_R = layout.first(~np.isfinite(values))
        x_S = np.full(self._places.size, np.nan)
        x_S[self._columns] = first_R < layout.lengths_R
        self._bound.update(step, x_S)
        out = np.flatnonzero((self._bound.score[self._columns] > 1) & (first_R < layout.lengths_R))
        return [self._finding(step, layout, values, int(row), int(first_R[row])) for row in out]

    def _finding(self, step: int, layout: Layout, values: Array, row: int, worst: int) -> Finding:
        column = self._columns[row]
        low, high = map(int, self._bound.onset_interval[column])
        metric, site = layout.keys[row]
        return Finding(
            step=step,
            onset=int(self._bound.onset[column]),
            site=site,
            metric=metric,
            value=float(values[layout.starts_R[row] + worst]),
            expected="a finite value",
            direction=+1,
            score=float(self._bound.score[column]),
            index=layout.index(row, worst),
            onset_interval=(low, high),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"places": self._places.state_dict(), "bound": self._bound.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._places.load_state_dict(state["places"])
        self._layout = None
        self._bound.load_state_dict(state["bound"])
