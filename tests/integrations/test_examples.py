"""The examples as people start them, on one rank and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("healthy", [False, True])
@pytest.mark.parametrize(
    ("launcher", "name"),
    [([], "huggingface_trainer"), ([], "lightning_callback"), (TWO, "huggingface_trainer")],
    ids=["trainer", "lightning", "trainer on two ranks"],
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
