"""From readings to findings: what is dated how, whatever comes along with it, and what resumes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from foreshock.monitors import (
    Detector,
    Drift,
    Extrapolation,
    LawTest,
    Limit,
    Limits,
    NonFinite,
    PageHinkley,
    RobustZ,
    Trend,
)
from foreshock.monitors.detectors.columns import Columns
from foreshock.records import Alarm, Reading, Site

SITES = {name: Site(name, name, "attention", "test", heads=2, kv_heads=2, dtype="bfloat16") for name in "ab"}


def one(metric: str, value: float, site: str | None = "a") -> Reading:
    return Reading(metric, site, np.array([0.0, value]))


def feed(detector: Detector, metric: str, values: list[float], step: int = 10) -> list:
    return [f for n, value in enumerate(values) for f in detector.update(step * n, [one(metric, value)], SITES)]


@pytest.mark.parametrize(
    ("detector", "metric", "values", "heard"),
    [
        (Limits([Limit("mine", 5.0, 3, "test")]), "mine", [1, 9, 9, 1, 9, 9, 9], (60, 40, (30, 40))),
        (Limits([Limit("mine", 5.0, 2, "test")]), "mine", [9, 9], (10, 0, (0, 0))),
        (NonFinite({"mine": 2}), "mine", [1, np.nan, np.inf], (20, 10, (0, 10))),
        (LawTest(), "law/key_shift", [0.001, 1.0], (10, 10, (0, 10))),
        (LawTest(), "law/key_shift", [0.001, 0.001, 0.1, 0.1], (30, 20, (10, 20))),
    ],
)
def test_a_bound_is_dated_between_the_last_good_sample_and_the_first_bad_one(detector, metric, values, heard) -> None:
    (finding,) = feed(detector, metric, values)
    assert (finding.step, finding.onset, finding.onset_interval) == heard
    assert (finding.site, finding.metric, finding.index) == ("a", metric, 1)


def test_readings_in_any_order_and_company_are_the_same_series() -> None:
    detector = Limits([Limit("mine", 5.0, 3, "test")])
    for n, company in enumerate(([one("mine", 1.0, "b")], [], [one("other", 9.0)])):
        found = detector.update(n, [*company, one("mine", 9.0)][:: 1 if n else -1], SITES)
    assert [(f.site, f.onset) for f in found] == [("a", 0)]


def test_columns_fold_as_said() -> None:
    trends = (
        Trend("m", "mean", "linear", 4.0, (+1,), ""),
        Trend("m", "max", "log", 2.0, (+1,), ""),
        Trend("m", "min", "linear", 1.0, (-1,), ""),
    )
    columns = Columns(trends)
    x, raw, worst = columns.row(
        [Reading("m", "a", np.array([3.0, np.nan, 6.0, -np.inf])), Reading("m", None, np.array([2.0]))]
    )
    np.testing.assert_allclose(raw, [4.5, 6, 3, 2, 2, 2])
    np.testing.assert_allclose(x, [4.5, 2 * np.log(6), 12, 2, 2 * np.log(2), 8])
    assert worst.tolist() == [2, 2, 0, -1, -1, -1]
    x, _, worst = columns.row([Reading("m", "a", np.full(4, np.nan))])
    assert np.isnan(x).all()
    assert (worst == -1).all()


def rising(slope: float, samples: int = 90) -> list:
    rng, detector, found = np.random.default_rng(0), Extrapolation(), []
    for n in range(samples):
        if n in (20, 50):
            resumed = Extrapolation()
            resumed.load_state_dict(json.loads(json.dumps(detector.state_dict())))
            detector = resumed
        value = 20 + slope * n + rng.standard_normal()
        found += detector.update(10 * n, [one("attention/logit_max", value)], SITES)
    return [f for f in found if f.score >= 1]


def test_a_limit_that_a_sure_slope_is_about_to_reach_is_a_finding() -> None:
    assert rising(0.1) == []
    first = rising(1.0)[0]
    assert 400 <= first.step <= 700  # 100 is reached at step 800
    assert "at this slope that is reached in about" in first.expected
    steps = int(first.expected.split("about ")[1].split()[0])
    assert first.step + steps == pytest.approx(800, abs=60)


@pytest.mark.parametrize("test", [lambda: PageHinkley(limit=12.0), lambda: RobustZ(least=1.0)])
def test_another_test_of_trends_is_asked_in_the_same_way(test) -> None:
    trend, rng = Trend("mine", "max", "linear", 4.0, (+1,), ""), np.random.default_rng(0)
    detector = Drift([trend], test=test())
    assert isinstance(detector, Detector)
    values = (0.5 * rng.standard_normal(80) + np.where(np.arange(80) < 60, 0.0, 9.0)).clip(0.01)
    found = [f for f in feed(detector, "mine", values.tolist()) if f.score >= 1]
    assert found[0].onset == 600
    assert {f.direction for f in found} == {+1}
    down = Drift([trend], test=test())
    assert [f for f in feed(down, "mine", (20 - values).tolist()) if f.score >= 1] == []


def test_an_alarm_that_was_stored_without_an_interval_still_loads() -> None:
    alarm = Alarm(9, 7, "a", "m", 1.0, "less", "warning", "unknown", ("it is",), "it is off", onset_interval=(5, 8))
    plain = json.loads(json.dumps(alarm.to_json()))
    assert Alarm.from_json(plain) == alarm
    assert alarm.since == "since about step 7 (5 to 8)"
    del plain["onset_interval"]
    old = Alarm.from_json(plain)
    assert (old.onset_interval, old.since) == ((7, 7), "since about step 7")
