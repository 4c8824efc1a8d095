"""One contract for every test of series: silent in health, exact on faults, deaf to what is missing, and the same in any company.

Shapes: N samples, S series.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from foreshock.monitors import Cusum, Forecast, PageHinkley, QuantileBand, RobustZ, SeriesTest
from foreshock.monitors.detectors import Bound, Floors, Reach
from foreshock.records import Array

N, S, FAULT, SPACING = 120, 4, 100, 10


def healthy(seed: int, series: int = S, samples: int = N) -> Array:
    """White noise of size 1 about zero, each series with a seed of its own."""
    return np.stack([np.random.default_rng((seed, s)).standard_normal(samples) for s in range(series)], axis=1)


@cache
def references() -> QuantileBand:
    """Three references of the same noise, of which every fourth sample was kept."""
    steps = np.arange(0, 2 * N * SPACING, 4 * SPACING, dtype=float)
    made = QuantileBand(steps, least=1.0)
    made.add([[(steps, healthy(seed, 64, 2 * N)[::4, s]) for seed in (7, 8, 9)] for s in range(64)])
    return made


def band() -> QuantileBand:
    return copy.copy(references())


@dataclass(frozen=True)
class Case:
    """How to make a test, its unit and level of health, and at which samples it hears a step and a ramp that begin at `FAULT`."""

    make: Callable[[], SeriesTest]
    step: int | None  # None: no slope, no alarm
    ramp: int
    scale: float = 1.0
    level: float = 0.0
    size: float = 8.0
    two_sided: bool = True


CASES = {
    "Cusum": Case(lambda: Cusum(Forecast()), 104, 108),
    "Cusum of standardized samples": Case(Cusum, 104, 106),
    "Cusum of a QuantileBand": Case(lambda: Cusum(band()), 104, 106),
    "PageHinkley": Case(lambda: PageHinkley(Forecast()), 104, 108),
    "RobustZ": Case(RobustZ, 102, 107, size=12.0),
    "Bound": Case(lambda: Bound(100.0, samples=2), 101, 105, level=90.0, size=20.0, two_sided=False),
    "Floors": Case(Floors, 101, 103, scale=0.1, level=0.3, size=2.0, two_sided=False),
    "Reach": Case(lambda: Reach(20.0, samples=12), None, 108, two_sided=False),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def stream(case: Case, seed: int = 0, fault: str = "", series: int = S) -> Array:
    x = case.level + case.scale * healthy(seed, series)
    after = np.clip(np.arange(N) - FAULT + 1, 0, None)
    if fault == "step":
        x[:, 1] += case.size * (after > 0)
    elif fault == "ramp":
        x[:, 1] += case.size / 8 * after
    return x


def seen(test: SeriesTest) -> list[Array]:
    """Everything that the contract shows."""
    return [np.array(x) for x in (test.score, test.direction, test.onset, test.onset_interval, test.expected)]


def feed(test: SeriesTest, x: Array, start: int = 0) -> list[list[Array]]:
    shown = []
    for n, row in enumerate(x, start):
        before = row.copy()
        test.update(n * SPACING, row)
        np.testing.assert_array_equal(row, before)
        shown.append(seen(test))
    return shown


def same(left: list[list[Array]], right: list[list[Array]]) -> None:
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def first_alarm(case: Case, x: Array) -> tuple[int, int]:
    """Sample and series of the first score above 1."""
    scores = np.stack([shown[0] for shown in feed(case.make(), x)])
    return tuple(int(i) for i in np.argwhere(scores > 1)[0])  # type: ignore[return-value]


@every
def test_it_shows_what_the_contract_says(case: Case) -> None:
    test = case.make()
    assert isinstance(test, SeriesTest)
    feed(test, stream(case))
    score, direction, onset, interval, expected = seen(test)
    assert score.shape == direction.shape == onset.shape == expected.shape == (S,)
    assert interval.shape == (S, 2)
    assert (score >= 0).all()
    assert set(np.unique(direction)) <= ({-1, 1} if case.two_sided else {1})
    if not isinstance(test, Bound):  # where nothing was out there is no onset
        assert ((interval[:, 0] <= onset) & (onset <= interval[:, 1])).all()


@every
@pytest.mark.parametrize("seed", range(10, 13))
def test_healthy_streams_are_silent(case: Case, seed: int) -> None:
    assert max(shown[0].max() for shown in feed(case.make(), stream(case, seed))) < 1


@every
def test_a_step_is_heard_at_its_sample(case: Case) -> None:
    if case.step is not None:
        assert first_alarm(case, stream(case, fault="step")) == (case.step, 1)


@every
def test_a_ramp_is_heard_at_its_sample(case: Case) -> None:
    assert first_alarm(case, stream(case, fault="ramp")) == (case.ramp, 1)


@every
def test_both_sides_are_judged_where_there_are_two(case: Case) -> None:
    if case.two_sided and case.step is not None:
        x = -stream(case, fault="step")
        shown = feed(case.make(), x)
        assert shown[case.step + 1][1][1] == -1
        assert max(one[0][1] for one in shown) > 1


@every
def test_a_step_is_dated(case: Case) -> None:
    if case.step is not None:
        _, _, onset, interval, _ = feed(case.make(), stream(case, fault="step"))[case.step]
        assert onset[1] == FAULT * SPACING
        assert interval[1, 0] < FAULT * SPACING <= interval[1, 1]


@every
@pytest.mark.parametrize("gap", [[0, 3, 4], range(20, 60), range(90, 99)])
def test_a_missing_sample_changes_nothing_of_its_series(case: Case, gap) -> None:
    """As if the sample had not been taken, but for the steps that a forecast and a line measure time by."""
    x = stream(case, fault="step")
    x[list(gap), 2] = np.nan
    shown = feed(case.make(), x)
    for n in gap:
        if n:
            for a, b in zip(shown[n - 1][:4], shown[n][:4], strict=True):
                np.testing.assert_array_equal(a[2], b[2])
    same(
        [[a[[0, 1, 3]] for a in one] for one in shown],
        [[a[[0, 1, 3]] for a in one] for one in feed(case.make(), stream(case, fault="step"))],
    )


@every
@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_enters_no_baseline(case: Case, wild: float) -> None:
    x = stream(case, fault="step")
    x[::9, 3], x[41:44] = wild, wild
    shown = feed(case.make(), x)
    assert all(np.isfinite(one[0][[0, 2]]).all() for one in shown if not isinstance(case.make(), Bound))
    assert max(one[0][2] for n, one in enumerate(shown) if not (isinstance(case.make(), Bound) and 41 <= n < 44)) < 1
    if case.step is not None:
        assert int(np.argmax([one[0][1] > 1 for one in shown[60:]])) + 60 == case.step
    assert np.isfinite(shown[-1][4][2])


@every
def test_columns_may_be_appended(case: Case) -> None:
    """A series that appears later is what it would be alone from then on."""
    x = stream(case, fault="step")
    test = case.make()
    early, late = feed(test, x[:30, :2]), feed(test, x[30:], 30)
    alone = case.make()
    expected = feed(alone, x[:, :2])
    same(early, expected[:30])
    same([[a[:2] for a in one] for one in late], expected[30:])
    absent = x.copy()
    absent[:30, 2:] = np.nan
    same(late, feed(case.make(), absent)[30:])


@every
def test_all_at_once_is_each_alone(case: Case) -> None:
    x = stream(case, fault="ramp")
    whole = feed(case.make(), x)
    for s in range(S):
        made = case.make()
        baseline = getattr(made, "baseline", None)
        if isinstance(baseline, QuantileBand):
            baseline._middle, baseline._spread = baseline._middle[:, s:], baseline._spread[:, s:]
        for one, other in zip(whole, feed(made, x[:, [s]]), strict=True):
            for a, b in zip(one, other, strict=True):  # NumPy adds up one column in another order than several
                np.testing.assert_allclose(a[[s]], b, rtol=1e-9, atol=1e-12)


@every
@pytest.mark.parametrize("stop", [0, 1, 12, 31, 45, 102])
def test_a_resumed_test_goes_on_bit_for_bit(case: Case, stop: int) -> None:
    x = stream(case, fault="step")
    x[40:50, 0] = np.nan
    whole, test, resumed = feed(case.make(), x), case.make(), case.make()
    feed(test, x[:stop])
    resumed.load_state_dict(json.loads(json.dumps(test.state_dict())))
    same(feed(resumed, x[stop:], stop), whole[stop:])
    assert json.dumps(resumed.state_dict()) == json.dumps(feed_state(case, x))


def feed_state(case: Case, x: Array) -> dict:
    test = case.make()
    feed(test, x)
    return test.state_dict()


@every
def test_the_same_stream_says_the_same(case: Case) -> None:
    x = stream(case, 3, "ramp")
    same(feed(case.make(), x), feed(case.make(), x))


@every
def test_one_update_is_a_few_calls_whatever_the_number_of_series(case: Case) -> None:
    """Counted in the Python functions called, NumPy's own included: no loop over series."""

    def calls(series: int) -> int:
        test, x, count = case.make(), stream(case, series=series), 0

        def count_calls(frame, event, argument) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        for n in range(60):
            test.update(n * SPACING, x[n])
        sys.setprofile(count_calls)
        try:
            test.update(600, x[60])
            seen(test)
        finally:
            sys.setprofile(None)
        return count

    assert calls(10) == calls(64)
