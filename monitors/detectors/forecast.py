"""Where a healthy series is expected next, learned from its own past, for all series at once.

Healthy curves of a training run fall like powers of the step, so a resistant line (medians of the outer thirds, Tukey) in the
logarithm of the step is fitted to a trailing window that ends ``LAG`` samples before now: a fault is judged against the trend
before it and not against itself. The spread is that of the forecast's own past errors, so curvature is in it, times what their
autocorrelation adds to a sum of them. NaN stands for a missing sample and enters nothing.

Shapes: N samples of history, S series.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.monitors.detectors.ring import Ring
from foreshock.records import Array

LAG = 6  # samples between the fit and now: a fault has this long to be heard before its own values enter the trend
FIT = 30  # samples of a fit: long against the noise, short against a schedule
MIN_FIT = 12  # four points in each third is the least a median of a third is worth
ERRORS = 60  # past errors that set the spread
DAMPING = 0.6  # of the slope is carried forward (Gardner's damped trend): a slow ramp that enters the fit stays visible
MIN_ERRORS = 4  # fewer say nothing of the spread
UNSURE = 4.0  # n errors are known to a share of about 1/n: the spread is raised by 1 + 4/n, twofold at first
MOST_ALIKE = (
    0.4  # lag-one correlation that is believed at most: a slow ramp makes errors alike too, and must stay visible
)
SPARSER = 1.5  # times the widest gap so far: twice in a row, no sample is missing by chance
NORMAL = 1.4826  # a normal variable's standard deviation over its median absolute error


class Forecast:
    """The `Baseline` of a series' own healthy trend, each at its own pace. ``least``: the smallest spread, in the series' unit."""

    def __init__(self, least: float = 0.0) -> None:
        self.least = least
        self.frozen = False  # learn nothing: what comes is under suspicion for another reason
        self._past, self._errors = Ring(FIT + LAG), Ring(ERRORS)
        self._predicted = np.empty(0)

    def expect(self, step: int, series: int) -> tuple[Array, Array]:
        """Predicted value and robust spread of each series at ``step``; NaN until there is history enough."""
        self._past.grow(series)
        self._errors.grow(series)
        self._keep_pace(step)
        steps_NS, past_NS = (x[:FIT] for x in self._past.ordered())
        time_NS = np.where(np.isfinite(past_NS), np.log(np.maximum(steps_NS, 0) + 1.0), np.nan)
        known_S = np.isfinite(past_NS).sum(0)
        rank_NS = np.arange(FIT)[:, None] - (FIT - known_S)  # what is not filled stands first, below zero
        early_NS, late_NS = rank_NS < known_S // 3, rank_NS >= known_S - known_S // 3
        (x0, t0), (x1, t1) = (
            (median(np.where(third, past_NS, np.nan)), median(np.where(third, time_NS, np.nan)))
            for third in (early_NS, late_NS)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            slope_S = (x1 - x0) / (t1 - t0)
        level_S, middle_S = median(past_NS - slope_S * time_NS), median(time_NS)
        predicted_S = level_S + slope_S * (middle_S + DAMPING * (np.log(step + 1) - middle_S))
        self._predicted = np.where(known_S >= MIN_FIT, predicted_S, np.nan)
        errors_NS = self._errors.ordered()[1]
        errors_S = np.isfinite(errors_NS).sum(0)
        unsure_S = 1 + UNSURE / np.maximum(errors_S, 1)
        spread_S = np.fmax(NORMAL * median(np.abs(errors_NS)) * long_run(errors_NS) * unsure_S, self.least)
        return self._predicted, np.where((known_S >= MIN_FIT) & (errors_S >= MIN_ERRORS), spread_S, np.nan)

    def _keep_pace(self, step: int) -> None:
        """Where samples come further apart than ever, be as if they always had: with a past as sparse, and errors yet to be made.

        The fit then ends more steps ago and misses more: held to the errors of before, health would look like drift.
        """
        steps_NS = self._past.ordered()[0]
        gaps_NS = np.where(steps_NS[:-1] >= 0, np.diff(steps_NS, axis=0), 0)
        now_S, last_S = step - steps_NS[-1], gaps_NS[-1]
        spacing_S = np.minimum(now_S, last_S)
        sparser = np.flatnonzero(spacing_S >= SPARSER * np.maximum(gaps_NS[:-1].max(0), 1))
        sparser = sparser[self._past.count[sparser] > 2]
        if len(sparser):
            self._past.thin(sparser, spacing_S[sparser])
            self._errors.clear(sparser)

    def learn(self, step: int, x_S: Array, calm_S: Array) -> None:
        """Append a sample; its error counts only while the series is calm."""
        if self.frozen:
            return
        self._errors.write(step, np.where(calm_S, x_S - self._predicted, np.nan))
        self._past.write(step, x_S)

    def state_dict(self) -> dict[str, Any]:
        return {"past": self._past.state_dict(), "errors": self._errors.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._past.load_state_dict(state["past"])
        self._errors.load_state_dict(state["errors"])


def long_run(errors_NS: Array) -> Array:
    """How much farther the sum of neighbouring errors wanders than if they were independent: ``sqrt((1 + r) / (1 - r))``.

    As for an AR(1) process of lag-one correlation r, here of errors cut at three times their median, so that no outlier decides.
    """
    if not len(errors_NS):
        return np.ones(errors_NS.shape[1])
    bound = 3 * NORMAL * median(np.abs(errors_NS))
    cut = np.nan_to_num(np.clip(errors_NS, -bound, bound), nan=0.0)
    again = (cut[1:] * cut[:-1]).sum(0) / np.maximum(np.square(cut).sum(0), 1e-300)
    again = np.clip(again, 0, MOST_ALIKE)
    return np.asarray(np.sqrt((1 + again) / (1 - again)))


def quantile(x_NS: Array, share: float) -> Array:
    """Of each column without its NaN, linear between ranks; one sort for all columns, where numpy takes them one by one."""
    if not len(x_NS):
        return np.full(x_NS.shape[1], np.nan)
    ordered = np.sort(x_NS, axis=0)  # NaN sorts last
    rank = share * np.maximum(np.isfinite(x_NS).sum(0) - 1, 0)
    low = np.floor(rank).astype(int)
    columns = np.arange(x_NS.shape[1])
    under, over = ordered[low, columns], ordered[np.ceil(rank).astype(int), columns]
    found: Array = under + (over - under) * (rank - low)
    return found


def median(x_NS: Array) -> Array:
    """Of each column without its NaN."""
    return quantile(x_NS, 0.5)
