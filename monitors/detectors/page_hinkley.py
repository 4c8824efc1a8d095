"""Two-sided Page-Hinkley test (Hinkley, 1971): a CUSUM of the deviations from the residuals' own running mean.

A forecast that is off by a constant is forgiven, and so is a fault that was there from the beginning. Shapes: S series.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.monitors.detectors.contract import Baseline
from foreshock.monitors.detectors.cusum import CLIP, LIMIT, SLACK, Cusum
from foreshock.monitors.detectors.ring import widen
from foreshock.records import Array

MEMORY = 100  # samples after which the mean moves by a hundredth of a deviation and no less
FEWEST = 10  # samples before a mean is worth judging against


class PageHinkley(Cusum):
    """As `Cusum`, against the running mean of the last ``memory`` samples or so, learned only while the series is calm."""

    def __init__(
        self,
        baseline: Baseline | None = None,
        limit: float = LIMIT,
        *,
        clip: float = CLIP,
        slack: float = SLACK,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(baseline, limit, clip=clip, slack=slack)
        self.memory = memory
        self._mean = np.zeros(0)
        self._seen = np.zeros(0, dtype=np.int64)

    def _centred(self, z_S: Array) -> Array:
        self._mean, self._seen = widen(self._mean, len(z_S), 0.0), widen(self._seen, len(z_S), 0)
        deviation = z_S - self._mean
        judged = self._seen >= FEWEST
        calm = np.isfinite(z_S) & (widen(self.sums, len(z_S), 0.0) < self.limit / 2).all(0)
        self._seen = self._seen + calm
        pull = np.where(judged, np.clip(deviation, -self.clip, self.clip), deviation)
        self._mean = np.where(calm, self._mean + pull / np.clip(self._seen, 1, self.memory), self._mean)
        return np.where(judged, deviation, np.nan)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"mean": self._mean.tolist(), "seen": self._seen.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._mean = np.array(state["mean"], dtype=float)
        self._seen = np.array(state["seen"], dtype=np.int64)
