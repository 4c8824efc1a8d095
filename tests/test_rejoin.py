"""Merged ranks that were killed go on as if they never had been, wherever they saved and as however many: `tests/rejoined.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import same
from rejoined import BROKEN, STEPS, named
from resumed import most_records_of_a_step
from test_resume import series

import foreshock

SCRIPT = Path(__file__).with_name("rejoined.py")
SAVED = "saved by 2 ranks, now"


def trained(out: Path, plan: dict[str, Any]) -> Path:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(out), json.dumps(plan)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def went_on(folder: Path) -> None:
    """Two ranks again: bit for bit the run that was never killed, in the folder of the one that was."""
    with foreshock.open_run(folder.with_name("two") / "run") as run:
        expected, alarms = series(run), run.alarms
    with foreshock.open_run(folder / "run") as run:
        assert series(run) == expected
        assert run.alarms == alarms
        assert most_records_of_a_step(run) == 1
        assert run.coverage.warnings == ()
        assert run.meta["steps"] == STEPS
    assert not (folder / "run/earlier-1").exists()
    told = [json.loads((folder / f"told{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    assert [foreshock.Alarm.from_json(alarm) for alarm in told[0]["alarms"]] == alarms


def arrays(run: foreshock.Run) -> dict[str, Any]:
    columns = {key: run._column(*key) for key in run._keys()}
    found = {f"{metric}|{site}|steps": steps for (metric, site), (steps, _) in columns.items()}
    return found | {f"{metric}|{site}|values": values for (metric, site), (_, values) in columns.items()}


def changed(folder: Path, ranks: int) -> tuple[str, ...]:
    """Other ranks: the numbers of the run that was never killed, of two ranks and of one process; what the ledger says."""
    for name in ("two", "one"):
        with foreshock.open_run(folder.with_name(name) / "run") as run:
            expected, alarms = arrays(run), run.alarms
        with foreshock.open_run(folder / "run") as run:
            same(expected, arrays(run))
            alike(run.alarms, alarms)
            assert most_records_of_a_step(run) == 1
            warnings = run.coverage.warnings
    for rank in range(ranks):  # and every rank has heard them
        told = json.loads((folder / f"told{rank}.json").read_text())
        alike([foreshock.Alarm.from_json(alarm) for alarm in told["alarms"]], alarms)
    return warnings


def alike(found: list[foreshock.Alarm], expected: list[foreshock.Alarm]) -> None:
    assert expected
    assert [told(alarm) for alarm in found] == [told(alarm) for alarm in expected]
    values = [[alarm.value for alarm in alarms] for alarms in (found, expected)]
    assert np.allclose(*values, rtol=1e-6, atol=0)


def told(alarm: foreshock.Alarm) -> foreshock.Alarm:
    """All but the number, and the rank that had it: of one process there is none."""
    evidence = tuple(line for line in alarm.evidence if not line.startswith("worst on"))
    return replace(alarm, value=0.0, message="", ranks=(), evidence=evidence)


def test_ranks_that_are_killed_go_on_from_any_step(tmp_path: Path) -> None:
    """The kernel breaks on rank 1 at step 7: of a state saved after it the flush with the alarm is under way. The alarm's action
    saves too, between two flushes. A job that went on saves before its ranks have met, and is killed there."""
    of: dict[str, Any] = {"flash": True}
    before_they_met = [2, "8", 2, "9 dcp"]
    resumed = [[2, "1"], [2, "8 dcp"], [2, "9"], [2, "alarm"], before_they_met]
    plan = {
        "1": {**of, "saves": [1, 8, 9], "killed": 13, "resumed": resumed},
        "2": {**of, "saves": [9], "killed": 14, "resumed": [[2, "9"]]},
        # After step 21 nothing is sampled any more.
        "10": {**of, "saves": [11, 20, 21], "killed": 23, "resumed": [[2, "11"], [2, "20 dcp"], [2, "21"]]},
    }
    trained(tmp_path, plan)
    for every, planned in plan.items():
        with foreshock.open_run(tmp_path / every / "two/run") as run:
            broken = [alarm for alarm in run.alarms if alarm.metric.startswith("law/")]
            assert [alarm.ranks for alarm in broken] == [(1,)]
            assert broken[0].step == {"1": BROKEN, "2": 8, "10": 10}[every]
        for jobs in planned["resumed"]:
            went_on(tmp_path / every / named(jobs))


@pytest.mark.slow
def test_two_ranks_go_on_as_one_process(tmp_path: Path) -> None:
    """What the two had not merged is merged by the one, also where its file does not hold all of it."""
    of: dict[str, Any] = {"flash": False}
    plan = {
        "1": {**of, "saves": [9], "killed": 12, "resumed": [[1, "9"], [1, "9 first"]]},
        "10": {**of, "saves": [20], "killed": 24, "resumed": [[1, "20 dcp"]]},
    }
    trained(tmp_path, plan)
    goes_on = f"{SAVED} 1; rank 0 goes on with what it knew, and what the other ranks knew is left"
    assert changed(tmp_path / "1/9 on 1", 1) == (f"resuming at step 9: {goes_on}",)
    assert changed(tmp_path / "10/20 dcp on 1", 1) == (f"resuming at step 20: {goes_on}",)
    # Nothing was sampled since the last flush, but what was logged waited, and is written before any other step.
    for folder, sampled in (("1/9 on 1", list(range(9))), ("10/20 dcp on 1", [0, 10])):
        loaded = json.loads((tmp_path / folder / "loaded.json").read_text())
        begin = json.loads((tmp_path / folder / "told0.json").read_text())["begin"]
        assert loaded["run/loss|None"] == loaded["run/step|None"] == list(range(begin))
        assert loaded["attention/q_rms|attention:layers.0"] == sampled
    with foreshock.open_run(tmp_path / "1/9 first on 1/run") as run:
        assert run.series("attention/q_rms", "attention:layers.0")[0].tolist() == list(range(STEPS))
        assert run.coverage.warnings[1:] == (
            "resuming at step 9: what waited to be merged of rank 1 was not loaded; steps 7 to 8 are told without",
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_ranks_go_on_as_four(tmp_path: Path) -> None:
    again = [[4, "9", 2, "10 dcp"], [4, "9 dcp", 1, "10"], [2, "9", 4, "10", 2, "11 dcp"]]
    resumed = [[4, "9"], [4, "9 dcp"], [4, "9 first"], *again]
    plan = {"1": {"flash": False, "saves": [9], "killed": 12, "resumed": resumed}}
    trained(tmp_path, plan)
    for load in ("9", "9 dcp"):
        told = changed(tmp_path / f"1/{load} on 4", 4)
        assert told == (f"resuming at step 9: {SAVED} 4; rank 0 goes on with what it knew",)
    for jobs in again:
        changed(tmp_path / "1" / named(jobs), jobs[-2])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("every", [1, 2, 10])
def test_every_step_is_one_to_save_at(tmp_path: Path, every: int) -> None:
    saves = [*range(1, 15), 20, 21, 22]
    resumed = [[2, str(step)] for step in saves]
    trained(tmp_path, {str(every): {"flash": True, "saves": saves, "killed": 23, "resumed": resumed}})
    for step in saves:
        went_on(tmp_path / f"{every}/{step} on 2")
