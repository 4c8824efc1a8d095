"""In how many steps rising series reach their limits, from a least-squares line through the last samples.

A line's t is worth what its residuals' independence is: they are taken as an AR(1) process, whose lag-one correlation r widens the
slope's error by ``sqrt((1 + r) / (1 - r))``. Few residuals of a line show less of it than there is: the upper end of what they
allow is taken, ``r + (1 + 4 r) / n`` (Kendall, 1954) and two standard errors. Shapes: S series, R samples of the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.monitors.detectors.ring import Ring, spans, widen
from foreshock.records import Array

SAMPLES = 30  # of a line, as in `forecast.FIT`
SURE = 8.0  # a single series at the default budget
MOST_ALIKE = 0.9  # lag-one correlation that is believed at most
NEVER = np.inf


class Reach:
    """The score is 1 where the slope is ``sure`` times its error and ``limit`` is as many steps ahead as the line is long.

    ``limit``: a number, or one for each series. ``ahead``, ``[S]``: steps until it is reached, infinite where nothing rises.
    """

    def __init__(self, limit: float | Array, sure: float = SURE, samples: int = SAMPLES) -> None:
        self.limit, self.sure, self.degrees = limit, sure, samples - 2
        self.score, self.ahead, self.expected = np.zeros(0), np.zeros(0), np.zeros(0)
        self._recent = Ring(samples)

    def update(self, step: int, x_S: Array) -> None:
        """Take one sample of each series."""
        self.score, self.ahead = widen(self.score, len(x_S), 0.0), widen(self.ahead, len(x_S), NEVER)
        self.expected = widen(self.expected, len(x_S), np.nan)
        self._recent.write(step, x_S)
        steps, values = self._recent.ordered()
        length = (steps[-1] - steps[0]).astype(float)
        time = (steps - steps.mean(0)) / np.maximum(length, 1)
        slope = (time * values).sum(0) / np.maximum(np.square(time).sum(0), 1e-30)
        level = values.mean(0) + slope * time[-1]
        left = values - values.mean(0) - slope * time
        with np.errstate(divide="ignore", invalid="ignore"):
            squares = np.square(left).sum(0)
            again = (left[1:] * left[:-1]).sum(0) / squares
            again = np.clip(again + (1 + 4 * again) / len(left) + 2 / np.sqrt(len(left)), 0, MOST_ALIKE)
            error = np.sqrt(squares / self.degrees / np.square(time).sum(0) * (1 + again) / (1 - again))
            ahead = np.where(slope > 0, np.maximum(self.limit - level, 0) / slope * length, NEVER)
            near = np.where(ahead > 0, length / ahead, np.inf)
            score = np.minimum(np.where(error > 0, slope / error, np.inf) / self.sure, near)
        known = np.isfinite(x_S) & np.isfinite(values[0])
        self.score = np.where(known, np.where(slope > 0, score, 0.0), self.score)
        self.ahead = np.where(known, ahead, self.ahead)
        self.expected = np.where(known, level, self.expected)

    @property
    def direction(self) -> Array:
        return np.ones(len(self.score), dtype=int)

    @property
    def onset(self) -> Array:
        steps, _ = self._recent.ordered()
        return np.asarray(steps[0])

    @property
    def onset_interval(self) -> Array:
        """The line's own length: a slope has no one beginning within it."""
        steps, _ = self._recent.ordered()
        first = np.zeros(steps.shape[1], dtype=np.int64)
        return spans(steps, first, first + len(steps) - 1)

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name).tolist() for name in ("score", "ahead", "expected")}
        return numbers | {"recent": self._recent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.score, self.ahead, self.expected = (
            np.array(state[n], dtype=float) for n in ("score", "ahead", "expected")
        )
        self._recent.load_state_dict(state["recent"])
