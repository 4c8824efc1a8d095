"""A few samples in a row far from a robust baseline that hardly moves.

Median and spread of the first samples are learned and then leak: towards each new sample by a hundredth of the spread and
never by its size, and not at all while the series is out. A baseline that follows the data, as a rolling window does, never
sees a steady ramp. Shapes: S series.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.monitors.detectors.forecast import NORMAL, median
from foreshock.monitors.detectors.ring import Ring, spans, widen
from foreshock.records import Array

LEARNED = 30  # samples of the baseline: its median absolute deviation is known to a seventh
ROW = 3  # samples in a row: one outlier is no change
SIGMA = (
    6.0  # three in a row at 6 spreads; 4 would come every few thousand samples of a Student t with 4 degrees of freedom
)
LEAK = 0.01


class RobustZ:
    """Scores the nearest of the last ``row`` samples in units of ``limit`` spreads; silent until ``learned`` samples are in."""

    def __init__(
        self, limit: float = SIGMA, *, learned: int = LEARNED, row: int = ROW, leak: float = LEAK, least: float = 0.0
    ) -> None:
        self.limit, self.learned, self.leak, self.least = limit, learned, leak, least
        self.sides: Array | None = None
        self.expected = np.zeros(0)
        self._spread = np.zeros(0)
        self._first = Ring(learned)
        self._recent = Ring(row + 1)  # of z: one more than are judged, to know the sample before

    def update(self, step: int, x_S: Array) -> None:
        """Take one sample of each series."""
        x_S = np.where(np.isfinite(x_S), x_S, np.nan)
        self.expected, self._spread = (widen(x, len(x_S), np.nan) for x in (self.expected, self._spread))
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (x_S - self.expected) / np.fmax(self._spread, self.least)
        self._recent.write(step, np.where(np.isnan(z), np.nan, np.clip(z, -1e9, 1e9)))
        calm = np.isfinite(z) & (np.abs(z) < self.limit)
        self.expected = np.where(calm, self.expected + self.leak * self._spread * np.sign(z), self.expected)
        self._first.write(step, np.where(np.isnan(self.expected), x_S, np.nan))
        full = np.flatnonzero((self._first.count >= self.learned) & np.isnan(self.expected))
        if len(full):
            values = self._first.values[:, full]
            self.expected[full] = median(values)
            self._spread[full] = NORMAL * median(np.abs(values - self.expected[full]))

    def _nearest(self) -> Array:
        """``[2, S]``: how far the nearest of the last samples is on each side, in spreads."""
        z = self._recent.ordered()[1][1:]
        sides = np.nan_to_num(np.stack([z.min(0), -z.max(0)]), nan=0.0)
        return np.asarray(np.maximum(sides if self.sides is None else sides * self.sides, 0))

    @property
    def score(self) -> Array:
        return np.asarray(self._nearest().max(0) / self.limit)

    @property
    def direction(self) -> Array:
        up, down = self._nearest()
        return np.where(up >= down, 1, -1)

    @property
    def onset(self) -> Array:
        return self.began()[0]

    @property
    def onset_interval(self) -> Array:
        return self.began()[1]

    def began(self, columns: Array | None = None) -> tuple[Array, Array]:
        """The first of the samples in a row ``[N]``, and the interval between the one before it and itself ``[N, 2]``."""
        steps, _ = self._recent.ordered(columns)
        first = np.minimum((steps < 0).sum(0).clip(1), len(steps) - 1)
        return steps[first, np.arange(steps.shape[1])], spans(steps, first, first)

    def state_dict(self) -> dict[str, Any]:
        rings = {"first": self._first.state_dict(), "recent": self._recent.state_dict()}
        return rings | {"expected": self.expected.tolist(), "spread": self._spread.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first.load_state_dict(state["first"])
        self._recent.load_state_dict(state["recent"])
        self.expected = np.array(state["expected"], dtype=float)
        self._spread = np.array(state["spread"], dtype=float)
