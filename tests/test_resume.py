"""A run that was killed and resumed is the run that was never stopped: the same series, the same alarms, one record a step."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resumed import EVERY, STEPS, Training, most_records_of_a_step, watched
from torch import distributed
from torch.distributed import checkpoint as dcp

import foreshock
from foreshock.reader import Run
from foreshock.records import Reading
from foreshock.rejudge import rejudge
from foreshock.resume import plain

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).parent / "resumed.py"
Told = dict[tuple[str, str | None], tuple[list[int], list[Any]]]


def series(run: Run | foreshock.Watch, start: int = 0) -> Told:
    """Every series, bit for bit, from a step on."""
    store = run if isinstance(run, Run) else run.collector.store
    found = {}
    for metric, site in store._keys():
        steps, values = store._column(metric, site)
        kept = steps >= start
        if kept.any():
            found[metric, site] = (steps[kept].tolist(), values[kept].tobytes())
    return found


# -- killed --------------------------------------------------------------------------------------------------------------


def _killed(out: Path, moments: int, seed: int) -> None:
    subprocess.run([sys.executable, SCRIPT, "killed", out, str(moments), str(seed)], check=True)
    with foreshock.open_run(out / "unkilled/run") as run:
        expected, alarms = series(run), run.alarms
    assert alarms
    assert {"law/bias", "run/loss", "attention/entropy"} <= {metric for metric, _ in expected}
    assert any(metric.endswith("@12") for metric, _ in expected)
    for number, seen in enumerate(json.loads((out / "seen.json").read_text())):
        newest = max(seen["told"], default=0)
        assert seen["recorded"] == list(range(0, len(seen["recorded"]) * EVERY, EVERY))
        assert max(seen["recorded"], default=-EVERY) >= newest - EVERY, "no more than one flush is lost"
        assert seen["again"] == list(range(seen["resumed"], STEPS))
        folder = out / f"killed{number}/run"
        with foreshock.open_run(folder) as run:
            assert series(run) == expected
            assert run.alarms == alarms
            assert rejudge(run) == alarms
            assert most_records_of_a_step(run) == 1
            assert run.meta["steps"] == STEPS
        aside = folder / "earlier-1"
        assert aside.exists() == (not seen["resumed"] and bool(seen["recorded"]))


def test_killed_at_a_few_moments(tmp_path: Path) -> None:
    _killed(tmp_path, 3, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_fifty_moments(tmp_path: Path) -> None:
    _killed(tmp_path, 50, 2)


# -- more ranks, or fewer ------------------------------------------------------------------------------------------------


def test_ranks_that_come_and_go(tmp_path: Path) -> None:
    """Through files and through distributed checkpoints: 2 ranks to 2, 2 to 1 and 1 to 2."""
    command = [sys.executable, SCRIPT, "ranks", tmp_path]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in (0, 1)]
    assert [process.wait(300) for process in processes] == [0, 0]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank in (0, 1):
        with foreshock.open_run(tmp_path / f"two/rank{rank}") as run:
            expected, alarms = series(run, start=12), run.alarms
        assert found[rank]["two_two"] == {"begun": 12, "ended": STEPS // 2, "told": []}
        with foreshock.open_run(tmp_path / f"two_two/rank{rank}") as run:
            assert series(run) == expected
            assert [alarm for alarm in alarms if alarm.step >= 12] == run.alarms
    with foreshock.open_run(tmp_path / "merged") as run, foreshock.open_run(tmp_path / "merged_two") as resumed:
        assert series(resumed, start=12) == series(run, start=12)
        assert [alarm for alarm in run.alarms if alarm.step >= 12] == resumed.alarms
        assert all(found[rank]["merged_two"]["told"] == [] for rank in (0, 1))
    for name, rank, told in (
        (
            "two_one",
            0,
            "saved by 2 ranks, now 1; rank 0 goes on with what it knew, and what the other ranks knew is left",
        ),
        ("one_two", 0, "saved by 1 rank, now 2; rank 0 goes on with what it knew"),
        (
            "one_two",
            1,
            "saved by 1 rank, now 2; of rank 1 there is no state, so its detectors and weight snapshots begin anew",
        ),
    ):
        for way in (name, f"{name}_file") if rank or name == "one_two" else (name,):
            assert found[rank][way] == {"begun": 12, "ended": 16, "told": [f"resuming at step 12: {told}"]}
    for run, first in (("two_one", 14), ("one_two/rank0", 14), ("one_two/rank1", None)):
        with foreshock.open_run(tmp_path / run) as opened:
            assert opened.series("run/loss")[0].tolist() == [12, 13, 14, 15]
            # Pooled over at least eight samples, one every second step: six of them came with the state, or none did.
            known = "law/bias" in opened.metrics()
            assert known == (first is not None)
            assert not known or opened.series("law/bias")[0].tolist() == [first]


# -- in one process ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def never_stopped() -> tuple[Told, list[foreshock.Alarm], dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with watched(None) as watch:
        training = Training(watch)
        for step in range(24):
            training.one(step)
            if step == 15:
                state = saved({name: part.state_dict() for name, part in training.parts().items()})
    torch.set_num_threads(threads)
    return series(watch), watch.alarms, state


@pytest.fixture
def whole(one_thread, never_stopped) -> tuple[Told, list[foreshock.Alarm], dict[str, Any]]:
    """A run of 24 steps in memory, and its state after 16."""
    told, alarms, state = never_stopped
    return told, alarms, saved(state)


def saved(state: Any) -> Any:
    """``state`` as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def _after(told: Told, start: int) -> Told:
    found = {}
    for key, (steps, values) in told.items():
        width = len(values) // len(steps)
        at = sum(step < start for step in steps)
        if at < len(steps):
            found[key] = (steps[at:], values[at * width :])
    return found


@pytest.mark.parametrize("when", ["before the first compile", "after a forward pass", "after some steps"])
def test_the_state_may_be_loaded_at_any_time(whole, when: str) -> None:
    told, alarms, state = whole
    with watched(None) as watch:
        training = Training(watch)
        if when == "after a forward pass":
            training.micro(0, 0)
            training.optimizer.zero_grad()
        for step in range(3 if when == "after some steps" else 0):
            training.one(step)
        for name, part in training.parts().items():
            part.load_state_dict(state[name])
        assert watch.step == 16
        for step in range(16, 24):
            assert watch.step == step
            training.one(step)
    assert _after(series(watch), 16) == _after(told, 16)
    assert watch.alarms == alarms
    assert watch.coverage.warnings == ()


def test_going_back_in_one_process_forgets_what_came_after(whole) -> None:
    told, alarms, _ = whole
    with watched(None) as watch:
        training = Training(watch)
        for step in range(16):
            training.one(step)
        state = {name: saved(part.state_dict()) for name, part in training.parts().items()}
        for step in range(16, 23):
            training.one(step)
        training.micro(23, 0)
        watch.log(loss=7.0)
        training.optimizer.zero_grad()
        assert watch.alarms
        for name, part in training.parts().items():
            part.load_state_dict(state[name])
        assert watch.alarms == []
        assert max(steps[-1] for steps, _ in series(watch).values()) == 15
        for step in range(16, 24):
            training.one(step)
    assert series(watch) == told
    assert watch.alarms == alarms


def test_a_state_saved_in_the_middle_of_a_step_resumes_at_its_start(whole) -> None:
    state = whole[2]
    with watched(None) as watch:
        training = Training(watch)
        for name, part in training.parts().items():
            part.load_state_dict(state[name])
        training.micro(16, 0)
        watch.log(other=1.0)
        middle = saved(watch.state_dict())
    assert str(middle["shared"]) == str(state["watch"]["shared"])
    assert str(middle["rank0"]) == str(state["watch"]["rank0"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("later", [False, True])
def test_distributed_checkpoints_of_one_process(whole, tmp_path: Path, later: bool) -> None:
    told, alarms, state = whole
    with watched(None) as watch:
        training = Training(watch)
        for name, part in training.parts().items():
            part.load_state_dict(saved(state[name]))  # an optimizer writes into the tensors that it was given
        if later:
            distributed.init_process_group("cpu:gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
            try:
                saving = dcp.async_save({"watch": watch}, checkpoint_id=tmp_path / "dcp")
                for step in range(16, 20):
                    training.one(step)
                saving.result()
            finally:
                distributed.destroy_process_group()
        else:
            dcp.save({"watch": watch}, checkpoint_id=tmp_path / "dcp")
    with watched(None) as watch:
        training = Training(watch)
        dcp.load({"watch": watch}, checkpoint_id=tmp_path / "dcp")
        for name in ("model", "optimizer"):
            training.parts()[name].load_state_dict(state[name])
        for step in range(watch.step, 24):
            training.one(step)
    assert _after(series(watch), 16) == _after(told, 16)
    assert watch.alarms == alarms


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_from_before_the_run_was_watched(one_thread, tmp_path: Path) -> None:
    dcp.save({"model": {"weight": torch.zeros(3)}}, checkpoint_id=tmp_path / "dcp")
    with watched(None) as watch:
        lenient = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load({"watch": watch}, checkpoint_id=tmp_path / "dcp", planner=lenient)
        assert watch.step == 0
        assert watch.coverage.warnings == ()


def test_what_is_no_state_is_reported_and_the_watch_begins_anew(one_thread) -> None:
    for state in ({}, {"shared": 3}, {"shared": ({"version": 99},)}, {"clock": {"step": 4}}):
        with foreshock.Watch(inner="eager") as watch:
            watch.load_state_dict(state)
            assert watch.step == 0
            assert ["no state that this version" in told for told in watch.coverage.warnings] == [True]
        with (
            foreshock.Watch(inner="eager", strict=True) as watch,
            pytest.raises(foreshock.ConfigError, match="no state"),
        ):
            watch.load_state_dict(state)


def test_a_rank_s_own_state_that_is_none_is_reported(whole) -> None:
    state = whole[2]["watch"]
    for own in (3, ({"step": 16},)):
        with foreshock.Watch(inner="eager") as watch:
            watch.load_state_dict({**state, "rank0": own})
            assert watch.step == 16
            assert ["what rank 0 knew begins anew" in told for told in watch.coverage.warnings] == [True]


def test_a_part_that_does_not_fit_begins_anew_by_itself(whole) -> None:
    told, _, state = whole
    state["watch"]["shared"][0]["parts"]["judge"]["detectors"]["Drift 0"] = {"columns": 3}
    with foreshock.Watch(None, every=EVERY, inner="eager", windows=(4, 12)) as watch:
        training = Training(watch)
        for name, part in training.parts().items():
            part.load_state_dict(state[name])
        for step in range(16, 24):
            training.one(step)
    assert ["restoring the judge; it begins anew" in line for line in watch.coverage.warnings] == [True]
    assert _after(series(watch), 16) == _after(told, 16)
    assert [alarm.mechanism for alarm in watch.alarms] == ["low-precision attention kernel"]


class Silent:
    """A detector without a state."""

    def update(self, step: int, readings: Any, sites: Any) -> list[Any]:
        return []


class Counting:
    """A monitor with one, of which a NumPy scalar is a part."""

    def __init__(self) -> None:
        self.seen = np.int64(0)

    def update(self, step: int, sites: Any) -> list[Reading]:
        self.seen += 1
        return [Reading("own/seen", None, np.array([float(self.seen)]))]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = np.int64(state["seen"])


class Failing(Counting):
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("not now")


def test_monitors_and_detectors_of_a_user_s_own(one_thread) -> None:
    with watched(None, monitors=["default", Counting()], detectors=[Silent()]) as watch:
        training = Training(watch)
        for step in range(4):
            training.one(step)
        state = saved(watch.state_dict())
    with watched(None, monitors=["default", Counting()], detectors=[Silent()]) as watch:
        watch.load_state_dict(state)
        training = Training(watch)
        for step in range(4, 8):
            training.one(step)
    assert watch.series("own/seen")[1].tolist() == [3, 4]
    with foreshock.Watch(inner="eager", monitors=["default", Failing()]) as watch:
        assert "monitor Failing 0" not in watch.state_dict()["rank0"][0]["parts"]
        assert ["not now" in told for told in watch.coverage.warnings] == [True]


def test_a_state_is_made_of_plain_values_and_tensors(whole) -> None:
    allowed = (str, int, float, bool, type(None), torch.Tensor)

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            assert all(type(key) in (str, int) for key in value)
            value = list(value.values())
        if isinstance(value, list | tuple):
            for entry in value:
                walk(entry)
        else:
            assert type(value) in allowed

    walk(whole[2]["watch"])
    assert plain({"a": (np.float64(1), [np.arange(2)])}) == {"a": (1.0, [[0, 1]])}


# -- the clock -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_only_makes_an_optimizer_s_state_does_not_move_the_clock(whole, kind: Any) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state = whole[2]
    with watched(None) as watch:
        training = Training(watch)
        training.optimizer = kind(training.model.parameters(), lr=1e-3)
        watch.load_state_dict(state["watch"])
        for step in range(16, 20):
            get_optimizer_state_dict(training.model, training.optimizer)
            assert watch.step == step
            training.one(step)
    assert watch.series("optim/lr")[1].tolist() == [np.float32(1e-3)] * 2


# -- the example ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("use_dcp", [False, True])
def test_the_example(one_thread, tmp_path: Path, use_dcp: bool) -> None:
    train = runpy.run_path(str(ROOT / "examples/resume.py"))["train"]
    train(tmp_path, 30, use_dcp)
    with foreshock.open_run(tmp_path / "run") as run:
        expected = series(run)
    watch = train(tmp_path, 30, use_dcp, resume=True)
    assert watch.step == 30
    with foreshock.open_run(tmp_path / "run") as run:
        assert series(run) == expected
        assert most_records_of_a_step(run) == 1
    assert "earlier-1" not in os.listdir(tmp_path / "run")
