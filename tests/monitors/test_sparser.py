"""Samples that come further apart in mid-run: no drift by themselves, and no cover for one."""

from __future__ import annotations

import numpy as np
import pytest

from foreshock.monitors.detectors import forecast
from foreshock.monitors.detectors.cusum import Cusum
from foreshock.monitors.detectors.drift import LEAST
from foreshock.monitors.detectors.forecast import Forecast

SERIES, EVERY, BEFORE = 200, 10, 80


def heard(ratio: int, samples: int, fault: int | None = None, shift: float = 40.0) -> list[int]:
    """Of each series the first sample out, -1 for none.

    Healthy ones go as the logarithm of the step, up or down by up to 12 of the
    least spread an e-fold; after ``BEFORE`` samples they are read ``ratio`` times as rarely, and shifted from ``fault`` on.
    """
    random = np.random.default_rng(0)
    slope, noise = np.linspace(-12, 12, SERIES), np.zeros(SERIES)
    test, first = Cusum(Forecast(LEAST)), np.full(SERIES, -1)
    far, start = EVERY * ratio, -(-BEFORE * EVERY // (EVERY * ratio)) * EVERY * ratio
    for n, step in enumerate([*range(0, BEFORE * EVERY, EVERY), *range(start, start + samples * far, far)]):
        noise = 0.5 * noise + 0.7 * random.standard_normal(SERIES)
        x = slope * np.log(step + 30) + noise + shift * (fault is not None and n >= BEFORE + fault)
        test.update(step, x)
        out = (test.score >= 1) & (first < 0) & (n >= BEFORE)
        first[out] = n - BEFORE
    return first.tolist()


@pytest.mark.parametrize("ratio", [1, 2, 4, 16, 64])
def test_health_stays_health(ratio: int) -> None:
    assert set(heard(ratio, 100)) == {-1}


def test_held_to_the_errors_of_before_it_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "SPARSER", np.inf)
    assert np.sum(np.array(heard(64, 100)) >= 0) > 10


@pytest.mark.parametrize(("ratio", "fault"), [(1, 12), (2, 12), (8, 45), (64, 45)])
def test_a_gross_fault_after_it_is_heard_as_soon_as_ever(ratio: int, fault: int) -> None:
    """At twice the spacing the trend is known at once and its errors soon; further apart both are learned anew first."""
    found = np.array(heard(ratio, fault + 20, fault))
    assert np.all(found >= fault)
    assert np.all(found <= fault + 7)
