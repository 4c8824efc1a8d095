"""Where a healthy series is expected next, learned from its own past, for all series at once.

Healthy curves of a training run fall like powers of the step, so a resistant line (medians of the outer thirds, Tukey) in the
logarithm of the step is fitted to a trailing window that ends ``LAG`` samples before now: a fault is judged against the trend
before it and not against itself. The spread is that of the forecast's own past errors, so curvature and autocorrelation
are in it. NaN stands for a missing sample and enters nothing.

Shapes: N samples of history, S series, W samples of a fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from foreshock.records import Array

LAG = 6  # samples between the fit and now: a fault has this long to be heard before its own values enter the trend
FIT = 30  # samples of a fit: long against the noise, short against a schedule
MIN_FIT = 12  # four points in each third is the least a median of a third is worth
ERRORS = 60  # past errors that set the spread
DAMPING = 0.6  # of the slope is carried forward (Gardner's damped trend): a slow ramp that enters the fit stays visible
MIN_ERRORS = 10  # below this the median error is itself uncertain by more than a third


@dataclass(slots=True)
class Forecast:
    """``expect`` gives prediction and spread for a step; ``learn`` takes the values that came."""

    steps: list[int] = field(default_factory=list)
    values: Array = field(default_factory=lambda: np.empty((0, 0)))
    errors: Array = field(default_factory=lambda: np.empty((0, 0)))

    def expect(self, step: int) -> tuple[Array, Array]:
        """Predicted value and robust spread of each series at ``step``; NaN until there is history enough."""
        series = self.values.shape[1]
        past = self.values[:-LAG][-FIT:]
        if len(past) < MIN_FIT:
            return np.full(series, np.nan), np.full(series, np.nan)
        time = np.log(np.array(self.steps[:-LAG][-FIT:], dtype=float) + 1)
        third = len(past) // 3
        early, late = time[:third], time[-third:]
        slope = (median(past[-third:]) - median(past[:third])) / (np.median(late) - np.median(early))
        level = median(past - slope * time[:, None])
        errors = self.errors[-ERRORS:]
        spread = 1.4826 * median(np.abs(errors))
        enough = (np.isfinite(past).sum(0) >= MIN_FIT) & (np.isfinite(errors).sum(0) >= MIN_ERRORS)
        middle = np.median(time)
        prediction = level + slope * (middle + DAMPING * (np.log(step + 1) - middle))
        return prediction, np.where(enough, spread, np.nan)

    def learn(self, step: int, values: Array, errors: Array) -> None:
        """Append one sample; series beyond those known so far are new columns."""
        keep = FIT + LAG + 1
        self.steps = [*self.steps, step][-keep:]
        self.values = append(self.values, values)[-keep:]
        self.errors = append(self.errors, errors)[-ERRORS:]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "values": self.values.tolist(), "errors": self.errors.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = list(state["steps"])
        self.values, self.errors = (  # no row at all is not one empty row
            np.array(state[name], dtype=float) if state[name] else np.empty((0, 0)) for name in ("values", "errors")
        )


def median(x_NS: Array) -> Array:
    """Median of each column without its NaN; one sort for all columns, where numpy's nanmedian takes them one by one."""
    if not len(x_NS):
        return np.full(x_NS.shape[1], np.nan)
    ordered = np.sort(x_NS, axis=0)  # NaN sorts last
    count = np.isfinite(x_NS).sum(0)
    halves = (np.maximum(count - 1, 0) // 2, np.minimum(count // 2, len(x_NS) - 1))
    low, high = (ordered[half, np.arange(x_NS.shape[1])] for half in halves)
    return np.where(count > 0, (low + high) / 2, np.nan)


def append(history_NS: Array, row: Array) -> Array:
    """``history`` with one more row, its new columns filled with NaN."""
    missing = len(row) - history_NS.shape[1]
    padded = np.pad(history_NS, ((0, 0), (0, missing)), constant_values=np.nan) if missing else history_NS
    return np.concatenate([padded, row[None]])
