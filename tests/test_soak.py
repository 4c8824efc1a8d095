"""The soak: memory and objects stay flat once histories are full, and the run's file grows by what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


def slopes(out: Path, *arguments: str, timeout: float) -> dict[str, float]:
    """Per step, over the second half: the estimates, not the ends of their intervals."""
    command = [sys.executable, SOAK, *arguments, "--json", out]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=timeout)
    found: dict[str, Any] = json.loads((out / "soak.json").read_text())["found"]["slopes"]
    return {name: middle / 1000 for name, (middle, _, _) in found.items()}


@pytest.mark.slow
def test_a_short_training_does_not_leak(tmp_path: Path) -> None:
    """Histories are still filling: what would show is an object that stays in every second step, or half a kilobyte in each."""
    found = slopes(tmp_path, "--steps", "600", "--look", "30", "--inner", "eager", timeout=590)
    assert found["objects"] < 0.5
    assert found["resident_bytes"] < 512
    assert found["stored_bytes"] < 2048  # by whole pages, and in jumps


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_long_training_does_not_leak(tmp_path: Path) -> None:
    """20,000 steps, of which the first half fills every window and history: what is flat then stays flat."""
    found = slopes(tmp_path, "--steps", "20000", "--look", "400", timeout=7000)
    assert found["objects"] < 0.02  # one in 50 steps
    assert found["resident_bytes"] < 16
    assert 500 < found["stored_bytes"] < 1024  # docs/cost.md: 631
