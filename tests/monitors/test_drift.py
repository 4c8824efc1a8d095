"""Drift detection on seeded streams: silence on healthy ones, exact alarm steps on faulty ones.

Streams are shaped as small healthy runs are (warm-up, power-law decline, cosine rate, AR(1) noise). The policy's constants were
chosen on recorded runs, not on these seeds.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from foreshock.monitors.detectors import Drift
from foreshock.monitors.detectors.cusum import CLIP, LIMIT, SLACK, Cusum
from foreshock.monitors.finding import Detector
from foreshock.monitors.policy import TRENDS, Trend
from foreshock.records import Reading

STEPS, EVERY = 2000, 10
LEVEL = {  # first and last healthy value, and relative (log) or absolute noise, as recorded on byte-level runs
    "attention/delta2_norm": (0.3, 0.05, 0.07),
    "attention/delta2_effective_rank@50": (9.0, 4.0, 0.08),
    "attention/logit_max": (2.0, 9.0, 0.10),
    "attention/entropy_norm": (0.95, 0.6, 0.02),
    "router/entropy_norm": (0.95, 0.8, 0.008),
    "router/load": (0.3, 0.17, 0.05),
    "router/similarity": (0.02, -0.05, 0.003),
    "router/conditioning": (3.0, 4.5, 0.03),
    "router/logit_absmax": (2.0, 4.5, 0.08),
    "optim/grad_norm": (1.5, 0.45, 0.15),
    "run/loss": (3.5, 1.9, 0.06),
}
SITES = {"attention": ("a0", "a1"), "router": ("r0", "r1"), "optim": (None,), "run": (None,)}


def healthy(seed: int) -> dict[tuple[str, str | None], np.ndarray]:
    """Every judged series of one run, ``[samples, 4]``."""
    rng = np.random.default_rng(seed)
    steps = np.arange(0, STEPS, EVERY)
    progress = (np.log(steps + 30) - math.log(30)) / (math.log(STEPS + 30) - math.log(30))
    series = {}
    for name, (first, last, noise) in LEVEL.items():
        for site in SITES[name.partition("/")[0]]:
            shocks = rng.standard_normal((len(steps), 4))
            ar = np.zeros_like(shocks)
            for n in range(1, len(steps)):
                ar[n] = 0.5 * ar[n - 1] + math.sqrt(0.75) * shocks[n]
            log = next(t.scale for t in TRENDS if t.metric == name) == "log"
            curve = (
                np.exp(np.log(first) + progress * np.log(last / first)) if log else first + progress * (last - first)
            )
            series[name, site] = curve[:, None] * np.exp(noise * ar) if log else curve[:, None] + noise * ar
    return series


def rate(step: int) -> float:
    return min(1.0, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))


def run(detector: Detector, series, upto: int = STEPS // EVERY):
    """All findings at or above the limit."""
    findings = []
    for n in range(upto):
        readings = [Reading(name, site, values[n]) for (name, site), values in series.items()]
        readings.append(Reading("optim/lr", None, np.array([rate(n * EVERY)])))
        findings += [f for f in detector.update(n * EVERY, readings, {}) if f.score >= 1]
    return findings


@pytest.mark.parametrize("seeds", [range(1000, 1050), pytest.param(range(1050, 1200), marks=pytest.mark.slow)])
def test_healthy_runs_are_silent(seeds) -> None:
    """200 runs of 2000 steps in all: 400,000 healthy steps over 20 series and not one finding."""
    assert {seed: found for seed in seeds if (found := run(Drift(), healthy(seed)))} == {}


@pytest.mark.parametrize(
    ("metric", "site", "change", "direction"),
    [
        ("attention/delta2_norm", "a1", 2.5, +1),
        ("attention/delta2_effective_rank@50", "a0", 0.4, -1),
        ("router/load", "r0", 2.0, +1),
        ("router/entropy_norm", "r1", 0.8, -1),
        ("router/entropy_norm", "r1", 1.2, +1),
        ("router/conditioning", "r1", 0.6, -1),
        ("run/loss", None, 1.5, +1),
    ],
)
def test_a_step_change_is_heard_at_the_sixth_sample(metric, site, change, direction) -> None:
    series = healthy(2000)
    series[metric, site][80:] *= change
    first = run(Drift(), series)[0]
    assert (first.metric, first.site, first.direction) == (metric, site, direction)
    assert (first.onset, first.step) == (800, 850)


@pytest.mark.parametrize(
    ("metric", "site", "slope"), [("attention/delta2_norm", "a0", 0.05), ("router/entropy_norm", "r1", -0.02)]
)
def test_a_slow_ramp_is_heard(metric, site, slope) -> None:
    series = healthy(2001)
    series[metric, site] *= np.exp(slope * np.clip(np.arange(200) - 80, 0, None))[:, None]
    first = run(Drift(), series)[0]
    assert (first.metric, first.site, first.direction) == (metric, site, np.sign(slope))
    assert 800 < first.step <= 1150


def test_the_worst_head_is_named() -> None:
    series = healthy(2002)
    series["attention/delta2_norm", "a0"][80:, 2] *= 4
    found = run(Drift(), series)
    assert {f.index for f in found if f.step < 900} == {2}


def test_non_finite_values_enter_nothing_and_blind_nothing() -> None:
    series = healthy(2003)
    for values in series.values():
        values[40:44] = np.nan
        values[50, 0] = np.inf
    assert run(Drift(), series) == []
    series["router/load", "r0"][80:] *= 2
    assert run(Drift(), series)[0].step <= 850


def test_a_single_outlier_is_no_alarm() -> None:
    series = healthy(2004)
    for values in series.values():
        values[90] *= 50
    assert run(Drift(), series) == []


def test_the_same_stream_gives_the_same_findings_also_across_a_resume() -> None:
    series = healthy(2005)
    series["router/load", "r0"][80:] *= 2
    whole = run(Drift(), series)
    assert whole == run(Drift(), series)
    first, second = Drift(), Drift()
    early = run(first, series, upto=82)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    late = [f for f in run(_From(second, 82 * EVERY), series) if f.step >= 82 * EVERY]
    assert early + late == whole


def test_what_was_read_between_two_samples_counts_at_the_next() -> None:
    """Weights are read on another step at each site, sampled or not: every series keeps its spacing."""
    series = healthy(2007)
    series["attention/delta2_norm", "a1"][80:] *= 3
    wanted = run(Drift(), series)
    assert {f.site for f in wanted} == {"a1"}
    detector, found = Drift(), []
    for step in range(STEPS):
        n, early = divmod(step + 3, EVERY)  # three steps before the others
        readings = []
        for (name, site), values in series.items():
            if "delta2" in name and site == "a1" and step > 0:
                readings += [Reading(name, site, values[n])] if early == 0 and n < len(values) else []
            elif step % EVERY == 0:
                readings.append(Reading(name, site, values[step // EVERY]))
        readings += [Reading("optim/lr", None, np.array([rate(step)]))] * (step % EVERY == 0)
        found += [f for f in detector.update(step, readings, {}) if f.score >= 1]
        if step % 7 == 0:
            resumed = Drift()
            resumed.load_state_dict(json.loads(json.dumps(detector.state_dict())))
            detector = resumed
    assert found == wanted


def test_an_unsampled_site_that_appears_later_is_a_new_series() -> None:
    series = healthy(2006)
    late = {key: values for key, values in series.items() if key[1] == "a1"}
    for values in late.values():
        values[:60] = np.nan
    late["attention/delta2_norm", "a1"][140:] *= 3
    assert {f.site for f in run(Drift(), series)} == {"a1"}


class _Reference:
    def __init__(self, series):
        self._series = series

    def series(self, metric, site=None):
        return np.arange(0, STEPS, EVERY), self._series[metric, site]


def test_a_reference_run_hears_what_a_run_wrong_from_its_start_hides_from_its_own_past() -> None:
    references = [_Reference(healthy(seed)) for seed in (3000, 3001, 3002)]
    series = healthy(3003)
    assert run(Drift(reference=references), series) == []
    series["router/entropy_norm", "r0"] -= 0.25
    assert run(Drift(), series) == []
    found = run(Drift(reference=references), series)
    assert {(f.metric, f.site) for f in found} == {("router/entropy_norm", "r0")}
    assert "the reference" in found[0].expected


def test_cusum_arithmetic_and_onset() -> None:
    cusum = Cusum()
    for step, z in enumerate([0.0, 1.0, 2.0, 100.0, np.nan, 2.0]):
        cusum.update(step, np.array([z]))
    assert cusum.score[0] * LIMIT == pytest.approx((2.0 - SLACK) + (CLIP - SLACK) + (2.0 - SLACK))
    assert (cusum.direction[0], cusum.onset[0]) == (+1, 2)
    assert cusum.onset_interval.tolist() == [[0, 3]]  # from the second sample on, within 2.5 of the largest sum


def test_every_trend_names_its_source_and_a_real_metric() -> None:
    from foreshock.monitors import metric

    for trend in TRENDS:
        assert isinstance(trend, Trend)
        assert trend.source
        assert metric(trend.metric)


class _From:
    """Feeds a detector only from a step on."""

    def __init__(self, detector, start):
        self.detector, self.start = detector, start

    def update(self, step, readings, sites):
        return self.detector.update(step, readings, sites) if step >= self.start else []


@pytest.mark.parametrize("length", [1, 3])
def test_an_excursion_that_heals_itself_is_no_alarm(length) -> None:
    series = healthy(2000)
    series["router/load", "r0"][80 : 80 + length] *= 1.7
    assert run(Drift(), series) == []


# -- the learning rate -------------------------------------------------------------------------------------------------


def _increments(schedule, norms, seed: int = 5) -> list[int]:
    """Steps at which the norm of the increments is out, for a schedule and what the norm does, both by step."""
    rng, drift, out = np.random.default_rng(seed), Drift(), []
    for step in range(0, STEPS, EVERY):
        noise = np.exp(0.07 * rng.standard_normal(4))
        readings = [
            Reading("optim/lr", None, np.array([schedule(step)])),
            Reading("attention/delta2_norm", "a0", norms(step) * noise),
        ]
        out += [step for finding in drift.update(step, readings, {}) if finding.score >= 1]
    return out


def _warm(step: int) -> float:
    return min(1.0, (step + 1) / 100)


def test_increments_that_follow_a_restarted_schedule_are_healthy() -> None:
    def decayed(step: int) -> float:
        return _warm(step) * (0.05 + 0.95 * (1 - (step - 100) % 600 / 600 if step > 100 else 1))

    def restarted(step: int) -> float:
        return _warm(step) * (0.3 if 200 <= step < 900 else 1.0)

    assert _increments(decayed, decayed) == []
    assert _increments(restarted, restarted) == []
    assert _increments(_warm, restarted), "the same increments under a constant rate are not"


@pytest.mark.parametrize("steps", [400, 800, 1600])
def test_a_rate_that_ramps_beyond_its_peak_is_not_taken_for_a_trend(steps: int) -> None:
    def ramped(step: int) -> float:
        return _warm(step) * 30 ** min(max(step - 400, 0) / steps, 1.0)

    first, *_ = _increments(ramped, ramped)
    assert ramped(first) < 4
    assert first > 400
