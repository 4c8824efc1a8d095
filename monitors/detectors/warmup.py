"""When a run has settled enough for its curves to be judged."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foreshock.monitors.policy import WARMUP_SAMPLES
from foreshock.monitors.rates import learning_rate
from foreshock.records import Reading


class Warmup:
    """Waits for the first rise of the learning rate to end, and a few samples more: the curves bend most there.

    Without a learning rate, only ``steps`` and the samples count.
    """

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps
        self._rate = -math.inf
        self._settling = WARMUP_SAMPLES

    def update(self, step: int, readings: Sequence[Reading]) -> bool:
        """Whether the run is still warming up at this sample."""
        rate = learning_rate(readings)
        if step < self.steps or (rate is not None and rate > self._rate and self._settling == WARMUP_SAMPLES):
            self._rate = self._rate if rate is None else rate
            return True
        self._settling -= self._settling > 0
        return self._settling > 0

    def state_dict(self) -> list[float]:
        return [self._rate, self._settling]

    def load_state_dict(self, state: Sequence[float]) -> None:
        self._rate, self._settling = state[0], int(state[1])
