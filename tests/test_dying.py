"""A rank that is killed, stopped or fails in the middle of a merged run: the others give it up, and train on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dying import DYING, TIMEOUT
from jobs import told
from merged import STEPS
from torch.distributed import TCPStore

from foreshock import open_run

SLACK = 12.0  # seconds for a step, on a machine with other jobs


class Ranks:
    """Processes that are ranks of one job, with the store in this one: launched so, none ends another."""

    def __init__(self, out: Path, ranks: int, name: str) -> None:
        self.out, self.name = out, name
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        command = [sys.executable, str(Path(__file__).with_name("dying.py")), str(out), name]
        self.processes = [
            subprocess.Popen(
                command,
                env=os.environ | place | {"RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def ends(self, rank: int) -> int:
        """The exit code, waited for."""
        process = self.processes[rank]
        _, said = process.communicate(timeout=240)
        assert process.returncode in (0, -signal.SIGKILL), said
        return process.returncode

    def told(self, rank: int) -> dict[str, Any]:
        return told(self.out, self.name, rank)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def gives_up(ranks: Ranks, rank: int, within: float) -> None:
    """Whether ``rank`` trained to the end, said once that it merges no more, and was held up no longer than ``within`` seconds."""
    assert ranks.ends(rank) == 0
    told = ranks.told(rank)
    (warning,) = told["warnings"]
    assert warning.startswith("merging what the ranks measured; this rank watches no more")
    assert told["step"] == STEPS
    assert max(told["took"][DYING:]) < within
    assert sum(told["took"][DYING:]) < within + SLACK
    with np.load(ranks.out / f"{ranks.name}.{rank}.npz") as series:
        steps = series["attention/q_rms|attention:layers.0|steps"].tolist()
    # The last flush was begun when the rank went, and may be over by then.
    assert steps in ([*range(DYING - 2)], [*range(DYING - 1)])


@pytest.mark.parametrize(
    ("name", "ranks", "victim"),
    [("killed", 2, 1), pytest.param("writer killed", 3, 0, marks=pytest.mark.slow)],
)
def test_a_rank_that_is_killed_is_given_up_at_once(tmp_path: Path, name: str, ranks: int, victim: int) -> None:
    """Its connections break, and nobody waits. What was written of the run by then opens, whoever was killed."""
    job = Ranks(tmp_path, ranks, name)
    try:
        assert job.ends(victim) == -signal.SIGKILL
        for rank in {*range(ranks)} - {victim}:
            gives_up(job, rank, TIMEOUT)
    finally:
        job.close()
    with open_run(tmp_path / "run") as run:
        steps, losses = run.series("attention/q_rms", "attention:layers.0")[0], run.series("run/loss")[0]
    assert steps.tolist() in ([*range(DYING - 2)], [*range(DYING - 1)])
    assert losses.tolist() == steps.tolist()


@pytest.mark.slow
def test_a_rank_that_stands_still_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    job = Ranks(tmp_path, 3, "stopped")
    try:
        for rank in (0, 2):
            gives_up(job, rank, TIMEOUT + SLACK)
        assert max(max(job.told(rank)["took"][DYING:]) for rank in (0, 2)) > TIMEOUT - 1
        assert job.processes[1].poll() is None  # it stands there still
    finally:
        job.close()


@pytest.mark.slow
def test_an_error_on_one_rank_is_not_held_up_by_the_others(tmp_path: Path) -> None:
    job = Ranks(tmp_path, 2, "failing")
    try:
        assert job.ends(0) == 0
        told = job.told(0)
        assert told["step"] == DYING
        assert told["took"][-1] < TIMEOUT
    finally:
        job.close()
