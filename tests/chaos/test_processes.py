"""How a training process may end or multiply: the run is whole afterwards, and no handle of it is used in two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from training import STEPS, Loop, identical

from foreshock import Watch, open_run

ATTENTION = "attention/q_rms"

TRAINING = """
import os, signal, sys
from training import Loop
from foreshock import Watch
watch = Watch(sys.argv[1], every=1, inner="aot_eager")
def leave(*_):
    {handler}
{install}
def between(loop, step):
    if step == 4:
        print("ready", flush=True)
        {end}
Loop(watch.backend).run(between, steps=6)
{last}
"""
WAIT = "signal.pause()"
INSTALL = "signal.signal(signal.SIGTERM, leave)"
ENDS = {  # (the handler of SIGTERM, whether it is installed, what happens at step 4, the last line), exit code, steps stored
    "SIGTERM": (("pass", "", WAIT, ""), -signal.SIGTERM, 3),
    "SIGTERM, the user exits": (("sys.exit(3)", INSTALL, WAIT, ""), 3, 4),
    "SIGTERM, the user closes the watch": (("watch.close(); os._exit(4)", INSTALL, WAIT, ""), 4, 4),
    "an exception": (("pass", "", "raise ValueError('the script is wrong')", ""), 1, 4),
    "os._exit": (("pass", "", "os._exit(5)", ""), 5, 3),
    "the end, never closed": (("pass", "", "", ""), 0, 6),
    "SIGINT": (("pass", "", "os.kill(os.getpid(), signal.SIGINT)", ""), -signal.SIGINT, 4),
}


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("how", ENDS)
def test_the_run_is_whole_however_the_process_ends(tmp_path: Path, how: str) -> None:
    (handler, install, end, last), code, least = ENDS[how]
    script = TRAINING.format(handler=handler, install=install, end=end, last=last)
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    ) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == "ready\n"
        if end == WAIT:
            training.send_signal(signal.SIGTERM)
        _, errors = training.communicate(timeout=120)
    assert training.returncode == code, errors
    assert "training goes on" not in errors
    with open_run(tmp_path) as run:
        steps = run.series(ATTENTION)[0].tolist()
        assert steps == list(range(len(steps)))
        assert len(steps) >= least
        assert [site.id for site in run.sites] == (["attention:qkv", "router:gate"] if code >= 0 or how == "SIGINT" else [])


class Batches(Dataset[torch.Tensor]):
    def __init__(self, where: Path) -> None:
        self.where = where

    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        for held in Path("/proc/self/fd").iterdir():  # what this worker holds of the run
            if held.is_symlink() and "run.sqlite" in os.readlink(held):
                (self.where / f"held by {os.getpid()}").touch()
        return torch.randn(5, 8, generator=torch.Generator().manual_seed(index))


def _over_loader(backend: object, where: Path, epochs: int = 3) -> list[torch.Tensor]:
    """Workers are forked anew in every epoch, while the run is being written."""
    loop = Loop(backend)
    for _ in range(epochs):
        for x in DataLoader(Batches(where), batch_size=2, num_workers=2, multiprocessing_context="fork"):
            loop.losses.append(loop.step(x))
    return [*loop.losses, *(p.detach() for p in loop.model.parameters())]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads which files a process holds")
def test_forked_workers_hold_nothing_of_the_run(one_thread, warnings_logged, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    plain = _over_loader("aot_eager", held)
    with Watch(tmp_path / "run", every=1, inner="aot_eager") as watch:
        assert identical(_over_loader(watch.backend, held), plain)
        watch.flush()
        assert [path for path in Path("/proc/self/fd").iterdir() if _is_run(path)], "the trainer itself does hold it"
    assert list(held.iterdir()) == []
    assert warnings_logged() == []
    with open_run(tmp_path / "run") as run:
        assert run.series(ATTENTION)[0].tolist() == list(range(3 * STEPS))


def _is_run(path: Path) -> bool:
    return path.is_symlink() and "run.sqlite" in os.readlink(path)


FORKING = """
import os, sys
from training import Loop
from foreshock import Watch
watch = Watch(sys.argv[1], every=1, inner="aot_eager")
def between(loop, step):
    if step == 3:
        child = os.fork()
        if not child:
            loop.losses.append(loop.step(loop.batch()))  # a child may use the model: it goes on unwatched
            watch.log(loss=1.0)
            watch.flush()
            sys.exit(7 if watch.closed and watch.step == 3 else 8)  # and its exit closes nothing
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7, status
Loop(watch.backend).run(between, steps=6)
assert watch.coverage.warnings == (), watch.coverage.warnings
"""


def test_a_forked_child_writes_nothing_and_closes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    with open_run(tmp_path) as run:
        assert run.series(ATTENTION)[0].tolist() == list(range(6))
        assert "run/loss" not in run.metrics()


HANDLED = """
import signal, sys
import numpy as np
from foreshock.records import Reading
from foreshock.store import RunStore
store = RunStore(sys.argv[1])
heard = 0
def handler(*_):
    global heard
    heard += 1
    store.flush()
    if heard > 200:
        raise SystemExit(0)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
step = 0
try:
    while True:
        store.write(step, [Reading("router/load", "r", np.full(64, step))])
        store.flush()
        step += 1
finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    store.close()
    print(step)
"""


def test_signal_handlers_may_flush_in_the_middle_of_a_flush_and_leave_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANDLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    with open_run(tmp_path) as run:
        steps, values = run.series("router/load", "r")
    assert len(steps) >= int(done.stdout)
    assert steps.tolist() == list(range(len(steps)))
    assert (values == steps[:, None]).all()
