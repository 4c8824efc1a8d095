"""A bound that must be broken for so many samples in a row, and over so many steps. Shapes: S series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.monitors.detectors.ring import widen
from foreshock.records import Array


class Bound:
    """``samples`` in a row above ``above``, over ``steps`` at least; each one number for all series or one of its own ``[S]``.

    The score is the value in units of the bound (infinite where that is zero), and 0 until the row is long enough.
    """

    def __init__(self, above: float | Array, samples: int | Array = 1, steps: int | Array = 0) -> None:
        self.above, self.samples, self.steps = above, samples, steps
        self.score = np.zeros(0)
        self._row = np.zeros(0, dtype=np.int64)  # samples in a row
        self._seen = np.full((3, 0), -1, dtype=np.int64)  # steps: of the first in the row, before it, the last sample

    def update(self, step: int, x_S: Array) -> None:
        """Take one sample of each series; an infinite one breaks every bound."""
        self._row, self._seen = widen(self._row, len(x_S), 0), widen(self._seen, len(x_S), -1)
        known = ~np.isnan(x_S)
        broken = x_S > self.above
        first, before, last = self._seen
        begins = broken & (self._row == 0)
        first, before = np.where(begins, step, first), np.where(begins, np.where(last < 0, step, last), before)
        self._seen = np.stack([first, before, np.where(known, step, last)])
        self._row = np.where(known, np.where(broken, self._row + 1, 0), self._row)
        long = (self._row >= self.samples) & (step - first >= self.steps)
        with np.errstate(divide="ignore", invalid="ignore"):
            size = np.where(np.asarray(self.above) > 0, x_S / self.above, np.inf)
        self.score = np.where(known, np.where(broken & long, size, 0.0), widen(self.score, len(x_S), 0.0))

    @property
    def direction(self) -> Array:
        return np.ones(len(self._row), dtype=int)

    @property
    def onset(self) -> Array:
        return np.asarray(self._seen[0])

    @property
    def onset_interval(self) -> Array:
        return np.asarray(self._seen[1::-1].T)

    @property
    def expected(self) -> Array:
        return np.broadcast_to(np.asarray(self.above, dtype=float), len(self._row))

    def state_dict(self) -> dict[str, Any]:
        return {"row": self._row.tolist(), "seen": self._seen.tolist(), "score": self.score.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._row = np.array(state["row"], dtype=np.int64)
        self._seen = np.array(state["seen"], dtype=np.int64).reshape(3, -1)
        self.score = np.array(state["score"], dtype=float)
