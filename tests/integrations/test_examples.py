"""The examples as people start them, on one rank and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import foreshock

EXAMPLES = Path(__file__).parents[2] / "examples"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("healthy", [False, True])
@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        ([], "huggingface_trainer"),
        ([], "lightning_callback"),
        ([], "accelerate_loop"),
        ([], "fabric_loop"),
        (TWO, "huggingface_trainer"),
    ],
    ids=["trainer", "lightning", "accelerate", "fabric", "trainer on two ranks"],
)
def test_the_alarm_is_printed_from_the_frameworks_log(
    tmp_path: Path, launcher: list[str], name: str, healthy: bool
) -> None:
    command = [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), "--folder", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *["--healthy"] * healthy], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ranks = 2 if launcher else 1
    told = [line for line in done.stdout.splitlines() if line.startswith("in the ")]
    assert len(told) == (0 if healthy else ranks)
    assert done.stdout.count("60 steps, 0 alarms") == (ranks if healthy else 0)


WAYS = [["--plain"], ["--by-name"], []]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=["launched", "by name", "a watch"])
def test_a_loop_of_ones_own_in_three_ways(tmp_path: Path, way: list[str], broken: bool) -> None:
    launcher = ["-m", "foreshock.run", "--run-dir", "run"] if way == ["--plain"] else []
    command = [sys.executable, *launcher, str(EXAMPLES / "adopt.py"), *way, *["--broken"] * broken]
    settings = {"FORESHOCK_RUN": "run", "FORESHOCK_INNER": "eager", "FORESHOCK_EVERY": "5", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with foreshock.open_run(tmp_path / ("runs/adopt" if way == [] else "run")) as run:
        assert {alarm.mechanism for alarm in run.alarms} == ({"low-precision attention kernel"} if broken else set())
    assert ("step 10: low-precision attention kernel" in done.stderr) == broken


def test_a_loop_of_ones_own_is_told_in_the_terminal(
    example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], warnings_logged: Callable[[], list[str]]
) -> None:
    example("adopt").main(["--broken"])
    assert "alarms: 2" in capsys.readouterr().out
    assert sum("low-precision attention kernel" in line for line in warnings_logged()) == 2
