"""Onsets on seeded changes: how often their interval holds the true beginning. `cusum.SET` was chosen on seed 1."""

from __future__ import annotations

import numpy as np
import pytest

from foreshock.monitors import Budget, Cusum, Forecast
from foreshock.monitors.detectors.bias import split
from foreshock.records import Array

SPACING, CHANGED, SERIES = 10, 100, 600


def heard(change: float, ramp: bool, keep: float, seed: int) -> tuple[Array, Array]:
    """Onset and interval of every series at its alarm; the change comes at sample 100, in quarters of the smallest that matters."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((CHANGED + 30, SERIES))
    for n in range(1, len(x)):
        x[n] = keep * x[n - 1] + np.sqrt(1 - keep**2) * x[n]
    after = np.clip(np.arange(len(x)) - CHANGED + 1, 0, None)
    x = 0.7 * x + (change * after if ramp else change * (after > 0))[:, None]
    test, done = Cusum(Forecast(1.0), Budget().log_limit("trend", SPACING, 40)), np.zeros(SERIES, dtype=bool)
    onsets, intervals = [], []
    for n, row in enumerate(x):
        test.update(n * SPACING, row)
        new = np.flatnonzero((test.score > 1) & ~done)
        done[new] = True
        onsets.append(test.onset[new])
        intervals.append(test.onset_interval[new])
    assert done.mean() > 0.5
    return np.concatenate(onsets), np.concatenate(intervals)


def coverage(interval: Array) -> float:
    return float(np.mean((interval[:, 0] < CHANGED * SPACING) & (interval[:, 1] >= CHANGED * SPACING)))


@pytest.mark.parametrize("change", [5.0, 10.0])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_nine_intervals_in_ten_hold_the_beginning_of_a_step(change: float, keep: float) -> None:
    onset, interval = heard(change, False, keep, seed=2)
    assert np.median(onset) == CHANGED * SPACING
    assert coverage(interval) >= 0.9
    assert np.mean(interval[:, 1] - interval[:, 0]) < 5 * SPACING


def test_a_ramp_is_dated_late() -> None:
    steep, interval = heard(1.0, True, 0.5, seed=2)
    assert coverage(interval) >= 0.85
    assert 0 <= np.median(steep) - CHANGED * SPACING <= 4 * SPACING
    slow, interval = heard(0.5, True, 0.5, seed=2)
    assert coverage(interval) < 0.7
    assert np.median(slow) > np.median(steep)


def test_a_bias_is_dated_by_the_split_of_its_window() -> None:
    rng, held, late = np.random.default_rng(2), 0, []
    for _ in range(300):
        den = np.exp(0.5 * rng.standard_normal(40))
        num = 0.002 * den * (np.arange(40) >= 25) + 0.001 * np.sqrt(den) * rng.standard_normal(40)
        onset, (low, high) = split(np.arange(40), num, den)
        held += low < 25 <= high
        late.append(onset - 25)
    assert held / 300 >= 0.9
    assert abs(np.median(late)) <= 1
