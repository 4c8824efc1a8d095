"""How far the learning rate is above what the run was healthy with."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from foreshock.records import Reading

HELD = 200  # samples after which a learning rate that nothing came of counts as healthy


class Rates:
    """``peak``: the highest learning rate of the first rise (the warm-up), or since then held for `HELD` samples.

    A schedule that decays and restarts stays at or below its peak; a fault that raises the rate goes beyond it.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        self._warm = False
        self._recent: deque[float] = deque(maxlen=HELD)

    def update(self, readings: Sequence[Reading]) -> None:
        """One sample, which may or may not tell the learning rate."""
        rate = next((float(r.values.max()) for r in readings if r.metric == "optim/lr"), None)
        if rate is None:
            return
        self._warm = self._warm or (bool(self._recent) and rate <= self._recent[-1])
        if not self._warm:
            self._recent.clear()
            self.peak = rate
        elif len(self._recent) == HELD:
            self.peak = max(self.peak, self._recent[0])
        self._recent.append(rate)

    @property
    def rise(self) -> float:
        """The present rate over the peak; 1 below it, or where no rate is known."""
        return max(1.0, self._recent[-1] / self.peak) if self._recent and self.peak > 0 else 1.0

    @property
    def healthy(self) -> float | None:
        """The present rate, or the peak where it is beyond; None where no rate is known."""
        return min(self._recent[-1], self.peak) if self._recent else None

    def state_dict(self) -> dict[str, Any]:
        return {"peak": self.peak, "warm": self._warm, "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.peak, self._warm = state["peak"], state["warm"]
        self._recent = deque(state["recent"], maxlen=HELD)
