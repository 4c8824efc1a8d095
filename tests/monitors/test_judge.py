"""From readings to alarms: which mechanism, how often, since when, and what never."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from foreshock.errors import ConfigError
from foreshock.monitors import (
    METRICS,
    ConsoleSink,
    Detector,
    Finding,
    Judge,
    Monitor,
    RouterWeights,
    Sink,
    Spectra,
    family,
    floor,
    metric,
)
from foreshock.monitors.detectors import Drift, LawTest, Limits
from foreshock.monitors.mechanisms import TABLE
from foreshock.monitors.rates import Rates
from foreshock.records import Alarm, Reading, Site

SITES = {
    "a0": Site("a0", "layers.0.attn", "attention", "test", heads=4, kv_heads=4, dtype="bfloat16"),
    "a1": Site("a1", "layers.1.attn", "attention", "test", heads=4, kv_heads=4, dtype="bfloat16"),
    "r0": Site("r0", "layers.0.router", "router", "test", experts=4, top_k=2),
}
HEALTHY = {
    ("law/key_shift", "a0"): 0.004,
    ("law/key_shift", "a1"): 0.004,
    ("attention/delta2_norm", "a0"): 0.15,
    ("attention/delta2_norm", "a1"): 0.15,
    ("optim/update_ratio", "a0"): 0.004,
    ("optim/update_ratio", "a1"): 0.004,
    ("attention/grad_out_norm", "a0"): 0.1,
    ("attention/grad_out_norm", "a1"): 0.1,
    ("attention/logit_max", "a0"): 8.0,
    ("attention/logit_max", "a1"): 8.0,
    ("router/entropy_norm", "r0"): 0.8,
    ("router/load", "r0"): 0.25,
    ("router/dead_experts", "r0"): 0.0,
    ("optim/lr", None): 1e-3,
    ("run/loss", None): 2.0,
}


class Stream:
    """A healthy run with 2 % noise, whose series ``change`` from sample 60 on."""

    def __init__(self, seed: int = 0, **judge) -> None:
        self.rng, self.judge, self.n = np.random.default_rng(seed), Judge(**judge), 0

    def readings(self, change) -> list[Reading]:
        found = []
        for (name, site), level in HEALTHY.items():
            values = level * (
                1 + 0.02 * self.rng.standard_normal(1 if site in ("r0", None) and name != "router/load" else 4)
            )
            values = np.full(1, level) if name in ("optim/lr", "router/dead_experts") else values
            found.append(Reading(name, site, change(name, site, values.copy(), self.n)))
        return found

    def run(self, samples: int, change=lambda name, site, values, n: values) -> list[Alarm]:
        alarms = []
        for _ in range(samples):
            alarms += self.judge.update(10 * self.n, self.readings(change), SITES)
            self.n += 1
        return alarms


def twice(stream: Stream, more: list[Reading], change=lambda name, site, values, n: values) -> list[Alarm]:
    """Two samples with ``more`` in them: one head alone must be heard again, for a fault of the hardware would not be."""
    assert stream.judge.update(600, stream.readings(change) + more, SITES) == []
    return stream.judge.update(610, stream.readings(change) + more, SITES)


def scaled(*names: str, by: float, site: str | None = "any", start: int = 60, stop: int = 10**9):
    def change(name, where, values, n):
        hit = name in names and site in ("any", where) and start <= n < stop
        return values * by if hit else values

    return change


def test_a_healthy_run_is_silent() -> None:
    assert Stream().run(200) == []


@pytest.mark.parametrize(
    ("change", "mechanism", "site"),
    [
        (scaled("law/key_shift", by=100, site="a1"), "wrong attention backward", "a1"),
        (scaled("attention/delta2_norm", "optim/update_ratio", by=3), "learning rate too large", None),
        (scaled("attention/delta2_norm", by=3, site="a0"), "attention-logit growth", "a0"),
        (scaled("attention/grad_out_norm", by=1024), "gradient scale changed", None),
        (scaled("attention/logit_max", by=2.5, site="a0"), "attention-logit growth", "a0"),
        (scaled("attention/logit_max", by=14, site="a0"), "attention-logit growth", "a0"),
        (scaled("router/entropy_norm", by=0.6), "router collapse", "r0"),
        (scaled("router/load", by=2), "load-balance fault", "r0"),
        (scaled("run/loss", by=1.6), "data fault", None),
        (scaled("run/loss", by=math.nan), "non-finite values", None),
        (scaled("router/entropy_norm", by=1.2), "unknown", "r0"),
    ],
)
def test_each_signature_gets_its_name_once(change, mechanism, site) -> None:
    alarms = Stream().run(90, change)
    assert [a.mechanism for a in alarms][:1] == [mechanism]
    assert len([a for a in alarms if a.severity == alarms[0].severity]) == 1
    (first, *_) = alarms
    assert site in (None, first.site)
    assert first.onset == 600
    assert first.step >= first.onset
    assert first.evidence
    assert first.mechanism in first.message
    assert Alarm.from_json(json.loads(json.dumps(first.to_json()))) == first or math.isnan(first.value)


def test_a_broken_law_is_a_kernel_fault_whatever_the_learning_rate_does() -> None:
    def change(name, site, values, n):
        if n < 60:
            return values
        gain = {"law/key_shift": 100, "optim/lr": 10, "attention/delta2_norm": 4, "attention/logit_max": 3}
        return values * gain.get(name, 1)

    alarms = Stream().run(90, change)
    first, second, third = alarms
    assert {a.mechanism for a in (first, second)} == {"wrong attention backward"}
    assert {a.site for a in (first, second)} == {"a0", "a1"}
    assert {a.step for a in (first, second)} == {600}
    # The learning rate did rise tenfold too: it is named, and said to stand beside what is open already.
    assert (third.mechanism, third.severity) == ("learning rate too large", "warning")
    assert any(
        line.startswith("at the same time: wrong attention backward at layers.0.attn") for line in third.evidence
    )


@pytest.mark.parametrize(
    "law", ["law/key_shift", "law/value_mass", "law/euler", "law/shadow", "law/hull", "law/router_shift"]
)
@pytest.mark.parametrize("every", [1, 10])
def test_a_law_that_one_head_breaks_once_is_a_corruption_of_data(law: str, every: int) -> None:
    site = "r0" if "router" in law else "a1"
    judge = Judge()

    def update(step: int, values: list[float]) -> list[Alarm]:
        return judge.update(step, [Reading(law, site, np.array(values))], SITES)

    for n in range(30):
        assert update(every * n, [1e-9] * 4) == []
    assert update(every * 30, [1e-9, 0.9, 1e-9, 1e-9]) == []
    (alarm,) = update(every * 31, [1e-9] * 4)
    assert (alarm.mechanism, alarm.site, alarm.confidence) == ("silent data corruption", site, "proved")
    assert alarm.onset == every * 30
    for n in range(32, 400):
        assert update(every * n, [1e-9] * 4) == []
    assert update(every * 400, [1e-9, 1e-9, 0.9, 1e-9]) == []
    assert len(update(every * 401, [1e-9] * 4)) == 1, "and once more when it comes again"


def test_a_forward_that_most_heads_get_wrong_alike_is_a_wrong_scale_or_mask() -> None:
    stream = Stream()
    stream.run(60)
    off = [Reading("law/shadow", "a0", np.array([0.3, 0.4, 0.5, 0.001]))]
    (alarm,) = stream.judge.update(600, stream.readings(lambda name, site, values, n: values) + off, SITES)
    assert (alarm.mechanism, alarm.head) == ("wrong softmax scale or mask", 2)


def test_quantised_keys_break_the_euler_law_and_the_forward() -> None:
    stream = Stream()
    stream.run(60)
    off = [Reading("law/shadow", "a0", np.full(4, 0.1)), Reading("law/euler", "a0", np.full(4, 0.6))]
    (alarm,) = stream.judge.update(600, stream.readings(lambda name, site, values, n: values) + off, SITES)
    assert alarm.mechanism == "altered queries or keys in the kernel"


@pytest.mark.parametrize(
    ("forward", "mechanism"), [(2.5e-3, "low-precision attention kernel"), (1e-4, "wrong attention backward")]
)
def test_a_bias_that_the_forward_does_not_have_is_the_backwards_own(forward: float, mechanism: str) -> None:
    stream = Stream()
    stream.run(60)
    bias = [
        Reading("law/bias", "a0", np.full(4, 2.8e-3)),
        Reading("law/bias_t", "a0", np.full(4, 40.0)),
        Reading("law/bias_site", "a0", np.array([2.8e-3])),
        Reading("law/bias_site_t", "a0", np.array([80.0])),
        Reading("attention/shadow_bias", "a0", np.full(4, forward)),
    ]
    (alarm,) = stream.judge.update(600, stream.readings(lambda name, site, values, n: values) + bias, SITES)
    assert alarm.mechanism == mechanism


def test_a_restarted_schedule_is_no_rise_of_the_learning_rate() -> None:
    rates = Rates()
    schedule = [*np.linspace(0.1, 1, 10), *np.linspace(1, 0.05, 100), *np.linspace(0.1, 1, 10), *[1.0] * 20]
    for rate in schedule:
        rates.update(0, [Reading("optim/lr", None, np.array([rate]))])
        assert rates.rise == 1.0
    rates.update(0, [Reading("optim/lr", None, np.array([3.0]))])
    assert (rates.rise, rates.healthy) == (3.0, 1.0)
    other = Rates()
    other.load_state_dict(json.loads(json.dumps(rates.state_dict())))
    assert (other.rise, other.healthy) == (3.0, 1.0)


@pytest.mark.parametrize("law", ["law/hull", "law/shadow"])
def test_a_forward_that_is_off_alone_is_a_wrong_forward(law: str) -> None:
    stream = Stream()
    stream.run(60)
    off = [
        Reading(law, "a0", np.array([0.001, 0.5, 0.001, 0.001])),
        Reading("attention/shadow_bias", "a0", np.full(4, -0.2)),
    ]
    (alarm,) = twice(stream, off)
    assert (alarm.mechanism, alarm.site, alarm.head, alarm.metric) == ("wrong attention forward", "a0", 1, law)
    assert ("along the output by -0.2" in alarm.message) == (law == "law/shadow")


@pytest.mark.parametrize("law", ["shadow", "hull"])
def test_a_forward_a_little_off_is_no_alarm_and_tells_a_broken_backward_apart(law: str) -> None:
    hint, stream = [Reading(f"law/{law}", "a1", np.full(4, 1.5 * floor(law, "bfloat16")))], Stream()
    healthy = stream.readings(lambda name, site, values, n: values)
    assert stream.judge.update(0, healthy + hint, SITES) == []
    broken = stream.readings(scaled("law/key_shift", by=100, site="a1", start=0))
    (alarm,) = stream.judge.update(10, broken + hint, SITES)
    assert alarm.mechanism == "low-precision attention kernel"


def test_a_gradient_that_rounding_alone_makes_breaks_no_law() -> None:
    site = {"a": Site("a", "a", "attention", "test", heads=2, kv_heads=2, dtype="bfloat16")}
    for law, gain in (("law/key_shift", "law/key_gain"), ("law/euler", "law/euler_gain")):
        saturated = [Reading(law, "a", np.array([1.0, 1.0])), Reading(gain, "a", np.array([200.0, 2.0]))]
        (finding,) = LawTest().update(0, saturated, site)
        assert (finding.metric, finding.index) == (law, 1)  # the head whose dK rounding does not explain


def test_a_router_law_is_held_to_the_routers_own_dtype() -> None:
    site = {"r": Site("r", "r", "router", "test", experts=4, top_k=2, dtype="float32")}
    readings = [Reading("law/router_shift", "r", np.array([0.01]))]
    (finding,) = LawTest("bfloat16").update(0, readings, site)
    assert finding.expected.endswith("in float32")
    assert LawTest().update(0, readings, {"r": replace(site["r"], dtype="bfloat16")}) == []


@pytest.mark.parametrize(
    ("law", "value", "mechanism"),
    [("law/router_shift", 0.5, "wrong router backward"), ("law/token_count", 1e-7, "wrong expert choice")],
)
def test_a_broken_router_law_is_named_whatever_the_learning_rate_does(law: str, value: float, mechanism: str) -> None:
    stream = Stream()
    stream.run(60)
    (alarm,) = twice(stream, [Reading(law, "r0", np.array([value]))], scaled("optim/lr", "router/load", by=10, start=0))
    assert (alarm.mechanism, alarm.severity) == (mechanism, "critical")


def test_what_is_too_large_for_a_rounding_is_called_none() -> None:
    site = {"a": Site("a", "a", "attention", "test", heads=4, kv_heads=4, dtype="bfloat16")}
    for c, named in ((-0.2, True), (-1.0, False)):
        readings = [
            Reading("law/key_shift", "a", np.full(4, 1.0)),
            Reading("law/bias_num", "a", np.full(4, c)),
            Reading("law/bias_den", "a", np.ones(4)),
            Reading("law/bias", "a", np.full(4, c)),
            Reading("law/bias_t", "a", np.full(4, -99.0)),
        ]
        found = {finding.metric for finding in LawTest().update(0, readings, site)}
        assert found == ({"law/key_shift", "law/bias", "law/bias_site"} if named else {"law/key_shift"})


def test_a_learning_rate_that_rises_is_blamed_and_no_law_fires() -> None:
    alarms = Stream().run(90, scaled("optim/lr", "attention/delta2_norm", "attention/logit_max", by=3))
    assert [a.mechanism for a in alarms] == ["learning rate too large"]
    assert any("optim/lr rose to 3 times" in line for line in alarms[0].evidence)


def test_a_biased_rounding_is_named_with_its_head() -> None:
    def change(name, site, values, n):
        return values

    stream = Stream()
    stream.run(60, change)
    t = np.array([3.0, 40.0, 8.0, -2.0])
    pooled = [Reading("law/bias", "a0", np.array([1e-4, 2.8e-3, 1.2e-3, -1e-4])), Reading("law/bias_t", "a0", t)]
    (alarm,) = twice(stream, pooled, change)
    assert (alarm.mechanism, alarm.head, alarm.metric) == ("low-precision attention kernel", 1, "law/bias")
    assert alarm.severity == "critical"
    assert "t = 40.0" in alarm.message


def test_an_alarm_speaks_again_after_it_cleared_and_when_the_loss_leaves() -> None:
    stream = Stream()
    assert len(stream.run(70, scaled("law/key_shift", by=100, site="a1", stop=63))) == 1
    assert stream.run(30) == []
    assert len(stream.run(3, scaled("law/key_shift", by=100, site="a1"))) == 1

    both = Stream(seed=1)
    change = scaled("router/entropy_norm", by=0.6)
    late = scaled("run/loss", by=1.6, start=68)
    alarms = both.run(90, lambda name, site, values, n: late(name, site, change(name, site, values, n), n))
    assert [(a.mechanism, a.severity) for a in alarms] == [
        ("router collapse", "warning"),
        ("router collapse", "critical"),
    ]


def test_dead_experts_must_stay_dead() -> None:
    def dying(until):
        return lambda name, site, values, n: values + 1 if name == "router/dead_experts" and 60 <= n < until else values

    assert Stream().run(90, dying(69)) == []
    (alarm,) = Stream().run(90, dying(90))
    assert (alarm.step, alarm.onset) == (700, 600)


def test_an_expert_may_starve_while_the_learning_rate_warms_up() -> None:
    def early(name, site, values, n):
        if name == "optim/lr":
            return values * min((n + 1) / 20, 1.0)
        return values + 1 if name == "router/dead_experts" and n < 20 else values

    assert Stream().run(60, early) == []


def test_a_judge_resumes_where_it_stopped() -> None:
    change = scaled("router/entropy_norm", by=0.6)
    whole = Stream(seed=3)
    expected = whole.run(90, change)
    first, second = Stream(seed=3), Stream(seed=3)
    heard = first.run(62, change)
    second.judge.load_state_dict(json.loads(json.dumps(first.judge.state_dict())))
    second.n, second.rng = first.n, first.rng
    assert heard + second.run(28, change) == expected


class Once:
    """A user's detector."""

    def update(self, step, readings, sites):
        return [Finding(step, step, "r0", "mine/metric", 1.0, "less", +1, 2.0)] if step >= 300 else []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_users_detector_is_heard_as_unknown() -> None:
    (alarm,) = Stream(detectors=[Once()]).run(50)
    assert (alarm.mechanism, alarm.metric, alarm.site) == ("unknown", "mine/metric", "r0")


def test_the_contracts_hold() -> None:
    for detector in (Limits(), LawTest(), Drift(), Once()):
        assert isinstance(detector, Detector)
        assert detector.update(0, [], {}) == []
        detector.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    assert all(isinstance(monitor, Monitor) for monitor in (Spectra(), RouterWeights()))
    assert isinstance(ConsoleSink(), Sink)
    assert all(row.says and row.advice for row in TABLE)


def test_kernel_dtype_overrides_the_dtype_at_the_boundary() -> None:
    site = {"a": Site("a", "a", "attention", "test", dtype="float32")}
    readings = [Reading("law/key_shift", "a", np.full(4, 0.005))]
    assert [f.score > 1 for _ in range(3) for f in LawTest("bfloat16").update(0, readings, site)] == []
    assert len(LawTest().update(0, readings, site)) == 1


def test_a_metric_is_found_by_name_and_a_wrong_one_gets_close_names() -> None:
    assert metric("attention/delta2_norm@50").name == "attention/delta2_norm"
    assert [family(name) for name in ("law/bias", "attention/sink", "attention/dwk_norm", "router/z", "optim/lr", "run/loss")] == [
        "laws", "attention", "spectra", "router", "optim", "run",
    ]  # fmt: skip
    assert len({entry.name for entry in METRICS}) == len(METRICS)
    with pytest.raises(ConfigError, match="router/entropy"):
        metric("router/entropie")


def test_the_console_sink_logs_one_line_an_alarm(caplog) -> None:
    (first, *_) = Stream().run(90, scaled("law/key_shift", by=100, site="a1"))
    with caplog.at_level(logging.WARNING, logger="foreshock"):
        ConsoleSink().alarm(first)
    (record,) = caplog.records
    assert record.levelno == logging.CRITICAL
    assert "layers.1.attn" in record.getMessage()


# -- what once went wrong ----------------------------------------------------------------------------------------------


def test_a_series_that_is_read_now_and_then_is_never_not_finite() -> None:
    def change(name, site, values, n):
        if name != "run/loss":
            return values
        return values * (1.6 if n >= 200 else 1.0) if n % 2 == 0 else np.empty(0)

    assert {alarm.mechanism for alarm in Stream().run(260, change)} == {"data fault"}


def test_a_loss_that_is_logged_seldom_is_judged_all_the_same() -> None:
    def change(name, site, values, n):
        return values * (1.6 if n >= 300 else 1.0) if name != "run/loss" or n % 5 == 0 else np.empty(0)

    alarms = Stream().run(400, lambda name, site, v, n: change(name, site, v, n) if name == "run/loss" else v)
    assert {alarm.mechanism for alarm in alarms} == {"data fault"}


def test_corruption_that_goes_on_is_the_kernels_after_all() -> None:
    judge, alarms = Judge(), []
    for n in range(200):
        broken = n == 100 or n >= 120
        readings = [Reading("law/key_shift", "a1", np.array([0.9 if broken else 0.004, 0.004, 0.004, 0.004]))]
        alarms += judge.update(10 * n, readings, SITES)
    assert [(a.step, a.mechanism) for a in alarms] == [
        (1010, "silent data corruption"),
        (1200, "wrong attention backward"),
    ]


def test_a_site_that_is_not_read_again_was_not_clean() -> None:
    judge, alarms = Judge(), []
    for n in range(40):
        readings = [Reading("law/key_shift", "a1", np.array([0.9 if n >= 10 else 0.004, 0.004]))] if n % 2 == 0 else []
        alarms += judge.update(10 * n, [*readings, Reading("run/loss", None, np.ones(1))], SITES)
    assert [(a.step, a.mechanism) for a in alarms] == [(120, "wrong attention backward")]


def test_a_router_that_was_mended_may_be_wrong_in_another_way() -> None:
    judge, alarms = Judge(), []
    for n in range(400):
        shift, lost = 0.5 if 10 <= n < 20 else 1e-9, 0.1 if n >= 300 else 0.0
        readings = [
            Reading("law/router_shift", "r0", np.array([shift])),
            Reading("law/token_count", "r0", np.array([lost])),
        ]
        alarms += judge.update(10 * n, readings, SITES)
    assert [a.mechanism for a in alarms] == ["wrong router backward", "wrong expert choice"]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda n: 1e-3 * min(1 + n // 15, 5),  # a warm-up in stairs
        lambda n: 0.0 if n < 2 else 1e-3 * min(n / 300, 1.0),  # from zero, for long
        lambda n: 1e-3 * (20 if n == 300 else 1),  # one wrong sample
        lambda n: 1e-3 * max(0.001, 0.5 + 0.5 * math.cos(math.pi * (n % 100) / 100)),  # restarted at once
    ],
)
def test_no_schedule_is_a_fault(schedule) -> None:
    """Increments follow the rate; what does not, scatters as ever."""

    def change(name, site, values, n):
        if name == "optim/lr":
            return np.array([schedule(n)])
        follows = name in ("attention/delta2_norm", "optim/update_ratio", "attention/dwq_norm")
        return values * max(schedule(n), schedule(max(n - 1, 0)), 1e-12) / 1e-3 if follows and n != 300 else values

    assert Stream().run(600, change) == []


def test_several_detectors_of_one_series_are_one_sample() -> None:
    class Twice(Once):
        def update(self, step, readings, sites):
            found = Finding(step, step, "r0", "router/entropy_norm", 0.1, "more", -1, 2.0)
            return [found, replace(found, score=1.5)] if step == 100 else []

    assert Stream(detectors=[Twice()]).run(60) == []


def test_what_another_version_saved_is_left_with_a_word() -> None:
    told: list[str] = []
    judge = Judge(on_error=lambda what, error: told.append(f"{what}: {error}"))
    judge.load_state_dict({"detectors": [], "heard": [], "open": [], "samples": 3})
    assert "saved by another version" in told[0]
    with pytest.raises(ConfigError, match="judging starts anew"):
        Judge().load_state_dict({})
