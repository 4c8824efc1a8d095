"""The last few samples of every series, each series at its own pace.

Shapes: R samples kept, S series, N columns asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.records import Array


def widen(x: Array, series: int, fill: float) -> Array:
    """``x`` with its last axis grown to ``series``, the new columns filled; ``x`` itself if it is as wide already."""
    missing = series - x.shape[-1]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill) if missing > 0 else x


class Ring:
    """The last ``length`` finite samples of each column with their steps; what is missing takes no place."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.values = np.full((length, 0), np.nan)
        self.steps = np.full((length, 0), -1, dtype=np.int64)
        self.count = np.zeros(0, dtype=np.int64)  # samples seen

    def grow(self, series: int) -> None:
        """To so many columns; the new ones are empty."""
        self.values = widen(self.values, series, np.nan)
        self.steps = widen(self.steps, series, -1)
        self.count = widen(self.count, series, 0)

    def write(self, step: int, x_S: Array) -> None:
        """One sample of every column; further columns are new."""
        self.grow(len(x_S))
        columns = np.flatnonzero(np.isfinite(x_S))
        place = self.count[columns] % self.length
        self.values[place, columns], self.steps[place, columns] = x_S[columns], step
        self.count[columns] += 1

    def ordered(self, columns: Array | None = None) -> tuple[Array, Array]:
        """Steps and values, each ``[R, N]``, oldest first; what was not filled yet stands before, as -1 and NaN."""
        chosen = np.arange(len(self.count)) if columns is None else columns
        order = (self.count[chosen] + np.arange(self.length)[:, None]) % self.length
        return self.steps[order, chosen], self.values[order, chosen]

    def thin(self, columns: Array, spacing_N: Array) -> None:
        """Of some columns keep the newest sample and, going back, each that is ``spacing_N`` steps older than the one kept last."""
        steps, values = self.ordered(columns)
        kept, due = np.zeros(steps.shape, dtype=bool), steps[-1]
        for row in reversed(range(self.length)):
            kept[row] = (steps[row] >= 0) & (steps[row] <= due)
            due = np.where(kept[row], steps[row] - spacing_N, due)
        order = np.argsort(kept, axis=0, kind="stable")
        self.steps[:, columns] = np.take_along_axis(np.where(kept, steps, -1), order, 0)
        self.values[:, columns] = np.take_along_axis(np.where(kept, values, np.nan), order, 0)
        self.count[columns] = self.length

    def clear(self, columns: Array) -> None:
        """Forget all samples of some columns."""
        self.values[:, columns], self.steps[:, columns], self.count[columns] = np.nan, -1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values.tolist(), "steps": self.steps.tolist(), "count": self.count.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = np.array(state["values"], dtype=float).reshape(self.length, -1)
        self.steps = np.array(state["steps"], dtype=np.int64).reshape(self.length, -1)
        self.count = np.array(state["count"], dtype=np.int64)


def spans(steps_RN: Array, first_N: Array, last_N: Array) -> Array:
    """``[N, 2]``: the step before row ``first_N`` (its own where none is kept) and that of row ``last_N``."""
    columns = np.arange(steps_RN.shape[1])
    before = steps_RN[np.maximum(first_N - 1, 0), columns]
    low = np.where(before >= 0, before, steps_RN[first_N, columns])
    return np.stack([low, steps_RN[last_N, columns]], axis=1)
