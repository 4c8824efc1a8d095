"""torchtitan, the real one where it is installed (`make test-torchtitan`): a broken kernel in its log and its TensorBoard."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import ROOT, blocks

pytest.importorskip(
    "torchtitan", reason="torchtitan is not installed; make test-torchtitan makes an environment with it"
)

SCRIPT = ROOT / "examples/torchtitan_llama.py"


def train(folder: Path, *args: str) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """What torchtitan wrote to its log, and every curve of its TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [sys.executable, str(SCRIPT), "--folder", str(folder), *args]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (events,) = {file.parent for file in folder.glob("tb/**/events.*")}
    board = EventAccumulator(str(events)).Reload()
    return done.stderr, {t: [(s.step, s.value) for s in board.Scalars(t)] for t in board.Tags()["scalars"]}


def test_a_broken_kernel_stands_in_the_log_and_in_tensorboard(tmp_path: Path) -> None:
    told, curves = train(tmp_path)
    assert "foreshock: low-precision attention kernel since step 1" in told
    ((step, _),) = curves["foreshock/low-precision attention kernel"]
    assert 13 <= step <= 20
    assert 12 <= curves["foreshock/onset"][0][1] <= 15
    assert any(tag.startswith("foreshock/law/euler/") for tag in curves)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [f"step-{step}"]  # it stopped there


def test_a_healthy_run_is_silent(tmp_path: Path) -> None:
    told, curves = train(tmp_path, "--healthy")
    assert "foreshock:" not in told
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-30"]
    assert not [tag for tag in curves if "alarms" in tag]


def test_the_code_of_the_page_makes_a_configuration(tmp_path: Path) -> None:
    """Behind the example's stand-ins for a GPU, without which torchtitan's configurations are not to be imported."""
    page = (ROOT / "docs/adopting.md").read_text(encoding="utf-8")
    [code] = [b.code for b in blocks(page) if b.language == "python" and "integrations.torchtitan" in b.code]
    (tmp_path / "page.py").write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\nimport torchtitan_llama\n{code}\n"
        "config = llama3_watched()\nprint(type(config).__qualname__, config.metrics.readings, config.compile.backend)\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "page.py")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "ForeshockTrainer.Config ['law/euler'] foreshock\n", done.stderr[-4000:]
