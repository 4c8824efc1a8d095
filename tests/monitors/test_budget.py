"""The run-wide budget: where the limits come from, and that healthy streams keep to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from foreshock.errors import ConfigError
from foreshock.monitors import Budget, Cusum, Judge
from foreshock.monitors.budget import SHARES
from foreshock.monitors.detectors import LawTest
from foreshock.records import Reading, Site

SITE = {"a": Site("a", "a", "attention", "test", heads=4, kv_heads=4, dtype="bfloat16")}


def test_the_shares_are_one_budget() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)


def test_limits_grow_with_the_budget_and_the_series() -> None:
    budget = Budget()
    assert budget.log_limit("trend", 10, 1) == pytest.approx(math.log(100_000 / 10 / 0.5))
    assert budget.log_limit("trend", 10, 40) == pytest.approx(budget.log_limit("trend", 10, 1) + math.log(40))
    assert Budget(1000).log_limit("trend", 10, 40) < budget.log_limit("trend", 10, 40)
    for degrees in (7, 19, 28):
        chance = 0.15 / 100_000 / 8
        assert budget.student_t("bias", 1, 8, degrees) == pytest.approx(stats.t.isf(chance / 2, degrees))
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        Judge(steps_per_false_alarm=0)


@pytest.mark.parametrize("spread", [1.0, 1.4])
def test_the_mean_run_to_a_false_alarm_is_what_the_theorem_says(spread: float) -> None:
    """A small budget, so that alarms come: 200 samples an alarm over 5 series of noise up to 1.4 times what it is taken for."""
    rng, samples, series, runs = np.random.default_rng(0), 200, 5, 400
    test = Cusum(limit=math.log(samples) + math.log(2 * series))
    alarmed = np.full(runs, 2000)
    for n in range(2000):
        test.update(n, spread * rng.standard_normal(runs * series))
        out = (test.score > 1).reshape(runs, series).any(1)
        alarmed = np.where(out, np.minimum(alarmed, n + 1), alarmed)
    assert alarmed.mean() > samples


def bias(t: float, samples: int | None) -> list[Reading]:
    heads = [Reading("law/bias", "a", np.full(4, 2.8e-3)), Reading("law/bias_t", "a", np.array([1.0, t, 0.0, -2.0]))]
    return heads + ([] if samples is None else [Reading("law/bias_samples", "a", np.array([float(samples)]))])


@pytest.mark.parametrize(
    ("t", "samples", "named"),
    [(12.0, 20, True), (6.5, 20, False), (8.0, 10, False), (12.0, 8, False), (12.0, None, False), (-40.0, 8, True)],
)
def test_few_samples_of_a_bias_need_a_larger_t(t: float, samples: int | None, named: bool) -> None:
    found = LawTest().update(0, bias(t, samples), SITE)
    assert [(f.index, f.metric) for f in found] == ([(1, "law/bias")] if named else [])


def test_a_bias_is_dated_by_its_sums() -> None:
    rng, test = np.random.default_rng(1), LawTest()
    for step in range(40):
        den = np.ones(4)
        num = 1e-4 * rng.standard_normal(4) + 2.8e-3 * (step >= 20)
        sums = [Reading("law/bias_num", "a", num), Reading("law/bias_den", "a", den)]
        found = test.update(step, sums + (bias(40.0, 20) if step == 39 else []), SITE)
    (finding,) = found
    assert finding.onset == 20
    assert finding.onset_interval[0] < 20 <= finding.onset_interval[1] <= 22
