"""What an alarm does: in which order, how often, and in a distributed job on all ranks at one step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import HEARD, NEVER, SCENARIOS, STEPS, Layer

from foreshock import Alarm, AlarmRaised, ConfigError, Watch
from foreshock.acting import Acting
from foreshock.config import Settings, load_settings
from foreshock.monitors import Finding

ALARM = Alarm(10, 8, "a", "law/euler", 1.0, "< 1", "warning", "bad kernel", ("one",), "it is off")


def _acting(row: Any, *, strict: bool = False, **settings: Any) -> tuple[Acting, list[str]]:
    """With what was stopped or failed, in order."""
    done: list[str] = []

    def fail(what: str, error: Exception) -> None:
        done.append(f"failed: {what}: {error}")
        if strict:
            raise error

    return Acting(row, Settings(**settings), lambda: done.append("stop"), fail), done


def test_actions_run_in_order_and_raising_comes_last() -> None:
    acting, done = _acting(["raise", lambda alarm: done.append("first"), "stop", lambda alarm: done.append("second")])
    acting.hear(ALARM, 11)
    assert done == ["first", "stop", "second"]
    with pytest.raises(AlarmRaised) as raised:
        acting.settle()
    assert raised.value.alarm is ALARM
    acting.settle()  # once


@pytest.mark.parametrize("strict", [False, True])
def test_what_fails_keeps_no_other_from_running(strict: bool) -> None:
    def broken(alarm: Alarm) -> None:
        raise OSError("disk full")

    acting, done = _acting([broken, "stop", "raise"], strict=strict)
    if strict:
        with pytest.raises(OSError, match="disk full"):
            acting.hear(ALARM, 11)
    else:
        acting.hear(ALARM, 11)
    failed, stopped = done
    assert failed.startswith("failed: calling on_alarm ")
    assert failed.endswith("broken: disk full")
    assert stopped == "stop"
    with pytest.raises(AlarmRaised):
        acting.settle()


@pytest.mark.parametrize(
    ("later", "acts"),
    [
        ({}, False),  # the very same, again
        ({"step": 5000}, False),  # or much later
        ({"step": 109, "site": "b"}, False),
        ({"step": 110, "site": "b"}, True),
        ({"step": 11, "severity": "critical"}, True),
        ({"step": 11, "site": "b", "severity": "critical"}, True),
        ({"step": 11, "mechanism": "another"}, True),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_fault_acts_once(later: dict[str, Any], acts: bool, resumed: bool) -> None:
    heard: list[Alarm] = []
    acting, _ = _acting([heard.append])
    acting.hear(ALARM, 11)
    if resumed:
        state = json.loads(json.dumps(acting.state_dict()))
        acting, _ = _acting([heard.append])
        acting.load_state_dict(state)
    acting.hear(replace(ALARM, **later), 12)
    assert len(heard) == 1 + acts


def test_debounce_is_a_setting_and_a_critical_fault_does_not_escalate() -> None:
    heard: list[Alarm] = []
    acting, _ = _acting([heard.append], debounce=3)
    critical = replace(ALARM, severity="critical")
    for alarm in (
        critical,
        critical,
        replace(critical, site="b"),
        replace(ALARM, site="b"),
        replace(ALARM, site="b", step=13),
    ):
        acting.hear(alarm, alarm.step)
    assert [(alarm.site, alarm.step) for alarm in heard] == [("a", 10), ("b", 13)]
    acting, _ = _acting([heard.append], debounce=0)
    acting.hear(ALARM, 10)
    acting.hear(replace(ALARM, site="b"), 10)
    assert len(heard) == 4


def test_a_callable_may_ask_for_every_alarm() -> None:
    class Hears:
        every_alarm = True

        def __init__(self) -> None:
            self.heard: list[Alarm] = []

        def __call__(self, alarm: Alarm) -> None:
            self.heard.append(alarm)

    hears = Hears()
    acting, done = _acting([hears, "stop"])
    for site in ("a", "b", "b"):
        acting.hear(replace(ALARM, site=site), 11)
    assert len(hears.heard) == 3
    assert done == ["stop"]


# -- on a watch --------------------------------------------------------------------------------------------------------


class Finds:
    """Finds something at every step from the third on."""

    def update(self, step, readings, sites):
        return [Finding(step, step, s, "attention/nonfinite", 1.0, "none", +1, 10.0, 0) for s in sites if step >= 2]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def _train(watch: Watch, steps: int = 5) -> None:
    torch._dynamo.reset()
    model = Layer()
    compiled = torch.compile(model, backend=watch.backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(steps):
        compiled(torch.randn(2, 5, 8)).square().mean().backward()
        optimizer.step()
        if watch.stop_requested:
            break


def test_a_row_of_actions_on_a_watch(one_thread) -> None:
    heard: list[Alarm] = []
    with Watch(every=1, inner="eager", on_alarm=(heard.append, "stop"), detectors=[Finds()]) as watch:
        _train(watch)
        assert watch.stop_requested
        assert watch.step == 4  # heard at the forward pass after step 2; that iteration is finished
    assert len(heard) == 1
    assert len(watch.alarms) >= 1


def test_a_callable_may_ask_the_watch_before_anything_is_raised(one_thread) -> None:
    heard: list[int] = []
    row = ["raise", lambda alarm: heard.append(len(watch.alarms)), lambda alarm: watch.flush()]
    watch = Watch(every=1, inner="eager", on_alarm=row, detectors=[Finds()], strict=True)
    with pytest.raises(AlarmRaised), watch:
        _train(watch)
    assert heard == [1]
    assert watch.closed


def test_an_alarm_of_the_last_step_is_raised_as_the_watch_closes(one_thread) -> None:
    watch = Watch(every=1, inner="eager", on_alarm="raise", detectors=[Finds()])
    _train(watch, steps=3)
    assert watch.step == 3
    with pytest.raises(AlarmRaised):
        watch.close()
    assert watch.closed


def test_what_acted_is_part_of_a_watch_s_state(one_thread) -> None:
    heard: list[Alarm] = []
    with Watch(every=1, inner="eager", on_alarm=heard.append, detectors=[Finds()]) as watch:
        _train(watch)
        state = watch.state_dict()
    with Watch(every=1, inner="eager", on_alarm=heard.append, detectors=[Finds()]) as resumed:
        resumed.load_state_dict(state)
        resumed.acting.hear(watch.alarms[0], 5)
        assert not resumed.stop_requested
    assert len(heard) == 1


def test_names_come_from_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreshock.toml").write_text('on_alarm = "stop"\ndebounce = 7\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORESHOCK_ON_ALARM", raising=False)
    with Watch() as watch:
        assert (watch.acting.row, watch.acting.debounce) == (("stop",), 7)
    monkeypatch.setenv("FORESHOCK_ON_ALARM", "warn, raise")
    with Watch() as watch:
        assert watch.acting.row == ("warn", "raise")
    with Watch(on_alarm=[], debounce=0) as watch:
        assert (watch.acting.row, watch.acting.debounce) == ((), 0)
    monkeypatch.setenv("FORESHOCK_ON_ALARM", "stop,rais")
    with pytest.raises(ConfigError, match=r"FORESHOCK_ON_ALARM: on_alarm must be one of .*, got 'rais' \(did you mean"):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_alarm": ["stop", 3]}, "setting on_alarm: 3 is no action; give 'warn', 'raise', 'stop', a callable"),
        ({"on_alarm": 3}, "setting on_alarm: 3 is no action"),
        ({"on_alarm": ["stop", "halt"]}, "got 'halt'"),
        ({"on_alarm": ""}, "got ''"),
        ({"debounce": -1}, "debounce must be steps, at least 0, got -1"),
    ],
)
def test_mistakes_are_told_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Watch(**options)


# -- on several ranks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks went through, in every scenario of `ranks`."""
    out = tmp_path_factory.mktemp("job")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(Path(__file__).with_name("ranks.py")), str(out)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [name for name, (*_, failures) in SCENARIOS.items() if failures < NEVER])
def test_all_ranks_act_at_one_step_on_what_one_heard(job: list[dict[str, Any]], name: str) -> None:
    on_alarm, every, sited, failures = SCENARIOS[name]
    first, second = job[0][name], job[1][name]
    heard = -(-HEARD // every) * every + 1  # at the forward pass after the first sampled step that is bad
    assert first["step"] == second["step"] == (heard // every + 2) * every + failures
    assert (first["stop"], second["stop"]) == ((True, True) if "stop" in on_alarm else (False, False))
    assert first["raised"] == second["raised"]
    assert (second["raised"] is not None) is (on_alarm == "raise")
    assert first["sites"] == int(sited)
    assert (len(first["called"]), len(second["called"])) == (0, 1)  # callables run where the alarm was heard
    assert (first["warnings"], len(second["warnings"])) == ([], failures)
    assert any("rank 1 heard an alarm; all ranks act at step" in line for line in first["said"])


def test_without_a_store_no_rank_acts_by_itself(job: list[dict[str, Any]]) -> None:
    first, second = (rank["stop, without a store"] for rank in job)
    assert [first["step"], second["step"]] == [STEPS, STEPS]
    assert [first["stop"], second["stop"]] == [False, False]
    assert first["warnings"] == []
    (warning,) = second["warnings"]
    assert warning.startswith("agreeing with the other ranks on an alarm: ConnectionError: nobody answers")
    assert sum("nobody answers" in line for line in second["said"]) == 1
    assert len(second["called"]) == 1
