"""torchtitan, the real one where it is installed (`make test-torchtitan`): a broken kernel in its log and its TensorBoard."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "torchtitan", reason="torchtitan is not installed; make test-torchtitan makes an environment with it"
)

SCRIPT = Path(__file__).with_name("titan.py")


def train(folder: Path, *args: int) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """What torchtitan wrote to its log, and every curve of its TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {
        "FORESHOCK_INNER": "eager",
        "FORESHOCK_EVERY": "5",
        "FORESHOCK_RUN": str(folder / "run"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, args)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (events,) = {file.parent for file in folder.glob("tb/**/events.*")}
    board = EventAccumulator(str(events)).Reload()
    return done.stderr, {t: [(s.step, s.value) for s in board.Scalars(t)] for t in board.Tags()["scalars"]}


def test_a_broken_kernel_stands_in_the_log_and_in_tensorboard(tmp_path: Path) -> None:
    told, curves = train(tmp_path, 30, 12)
    assert "foreshock: low-precision attention kernel since step 1" in told
    ((step, _),) = curves["foreshock/low-precision attention kernel"]
    assert 13 <= step <= 20
    assert 12 <= curves["foreshock/onset"][0][1] <= 15
    assert any(tag.startswith("foreshock/law/euler/") for tag in curves)


def test_a_healthy_run_is_silent(tmp_path: Path) -> None:
    told, curves = train(tmp_path, 30)
    assert "foreshock:" not in told
    assert not [tag for tag in curves if "alarms" in tag]
