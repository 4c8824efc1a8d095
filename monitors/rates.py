"""How far the learning rate is above what the run was healthy with."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from foreshock.records import Reading

HELD = 200  # samples after which a learning rate that nothing came of counts as healthy
FLAT = 20  # samples without a rise that end the warm-up: it may climb in stairs


def learning_rate(readings: Sequence[Reading]) -> float | None:
    """The largest rate that a sample tells of, over parameter groups; None where it tells none."""
    told = [float(value) for reading in readings if reading.metric == "optim/lr" for value in reading.values]
    return max(told, default=None)


class Rates:
    """``peak``: the highest learning rate of the first rise (the warm-up), or since then kept up for `HELD` samples.

    A schedule that decays and restarts stays at or below its peak; a fault that raises the rate goes beyond it. ``since`` is the
    step at which it did, None at or below the peak. A rate of zero says nothing.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        self.since: int | None = None
        self._warm = False
        self._recent: deque[float] = deque(maxlen=HELD)

    def update(self, step: int, readings: Sequence[Reading]) -> None:
        """One sample, which may or may not tell the learning rate."""
        rate = learning_rate(readings)
        if rate is None or not rate > 0:
            return
        if not self._warm and rate > self.peak:
            self._recent.clear()
            self.peak = rate
        self._recent.append(rate)
        self._warm = self._warm or rate < self.peak or len(self._recent) >= FLAT
        if len(self._recent) == HELD:
            self.peak = max(self.peak, min(self._recent))
        self.since = None if rate <= self.peak else step if self.since is None else self.since

    @property
    def rise(self) -> float:
        """The present rate over the peak; 1 below it, or where no rate is known."""
        return max(1.0, self._recent[-1] / self.peak) if self._recent else 1.0

    @property
    def healthy(self) -> float | None:
        """The present rate, or the peak where it is beyond; None where no rate is known."""
        return min(self._recent[-1], self.peak) if self._recent else None

    def state_dict(self) -> dict[str, Any]:
        return {"peak": self.peak, "since": self.since, "warm": self._warm, "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.peak, self.since, self._warm = state["peak"], state["since"], state["warm"]
        self._recent = deque(state["recent"], maxlen=HELD)
