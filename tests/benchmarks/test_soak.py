"""The soak, short: memory and objects stay flat once histories are full, and the run's file grows by what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_a_long_training_does_not_leak(tmp_path: Path) -> None:
    command = [sys.executable, SOAK, "--steps", "2000", "--look", "50", "--inner", "aot_eager", "--json", tmp_path]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=590)
    found = json.loads((tmp_path / "soak.json").read_text())["found"]
    _, low, _ = found["slopes"]["objects"]
    assert low < 200  # one object that stays in five steps
    _, low, _ = found["slopes"]["resident_bytes"]
    assert low < 2**20  # a kilobyte that stays in a step
    _, low, high = found["slopes"]["stored_bytes"]
    assert high > 0
    assert low < 2**20
