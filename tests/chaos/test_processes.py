"""How a training process may end or multiply: the run is whole afterwards, and no handle of it is used in two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from loop import STEPS, Loop, identical
from torch.utils.data import DataLoader, Dataset

from foreshock import Watch, open_run

ATTENTION = "attention/q_rms"

DRIVER = """
import json, os, resource, signal, sys
import torch
from loop import Loop, identical
from foreshock import Watch
codes = {}
for number, (how, script, waits) in enumerate(json.loads(sys.argv[2])):
    folder = os.path.join(sys.argv[1], str(number))
    heard, ready = os.pipe()
    child = os.fork()
    if not child:  # leaves the loop, and the interpreter, in the way that the script says
        os.dup2(os.open(f"{folder}.errors", os.O_WRONLY | os.O_CREAT), 2)
        break
    if waits:
        os.read(heard, 1)
        os.kill(child, signal.SIGTERM)
    codes[how] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
else:
    print(json.dumps(codes))
    os._exit(0)
exec(script)
"""
TRAINING = """
watch = Watch(folder, every=1, inner="aot_eager")
def leave(*_):
    {handler}
{install}
def between(loop, step):
    if step == 4:
        {end}
Loop(watch.backend).run(between, steps=6)
"""
WAIT = "os.write(ready, b'!'); signal.pause()"
INSTALL = "signal.signal(signal.SIGTERM, leave)"
ENDS = {  # what the handler of SIGTERM does, whether it is installed, what happens at step 4; exit code; the steps stored
    "SIGTERM": ("pass", "", WAIT, -signal.SIGTERM, range(3)),
    "SIGTERM, and the user exits": ("sys.exit(3)", INSTALL, WAIT, 3, range(4)),
    "SIGTERM, and the user closes the watch": ("watch.close(); os._exit(4)", INSTALL, WAIT, 4, range(4)),
    "an exception": ("pass", "", "raise ValueError('the script is wrong')", 1, range(4)),
    "SIGINT": ("pass", "", "os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, range(4)),
    "os._exit": ("pass", "", "os._exit(5)", 5, range(3)),
    "the end, and never closed": ("pass", "", "pass", 0, range(6)),
}
# A child may use the model: it goes on unwatched. It writes nothing, and its exit closes nothing.
FORKING = """
watch = Watch(folder, every=1, inner="aot_eager")
def between(loop, step):
    if step == 3:
        child = os.fork()
        if not child:
            loop.losses.append(loop.step(loop.batch()))
            watch.log(loss=1.0)
            watch.flush()
            sys.exit(7 if watch.closed and watch.step == 3 else 8)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 7, status
Loop(watch.backend).run(between)
assert watch.coverage.warnings == (), watch.coverage.warnings
"""
# Whatever was written by step 3 may stay; not a byte may be added to any file.
LIMITED = """
plain = Loop("aot_eager").run()
watch = Watch(folder, every=1, inner="aot_eager")
def between(loop, step):
    if step == 3:
        watch.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
assert identical(Loop(watch.backend).run(between), plain)
assert watch.series("attention/q_rms")[0].tolist() == [0, 1, 2, 3, 4, 5]
(listed,) = watch.coverage.warnings
assert listed.startswith("writing to the store"), listed
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
watch.close()
"""
# From step 3 on nothing under the run's folder can be reached by its name.
FORBIDDEN = """
plain = Loop("aot_eager").run()
watch = Watch(folder, every=1, inner="aot_eager")
def between(loop, step):
    if step == 3:
        os.seteuid(65534)
assert identical(Loop(watch.backend).run(between), plain)
assert watch.series("attention/q_rms")[0].tolist() == [0, 1, 2, 3, 4, 5]
(listed,) = watch.coverage.warnings
assert listed.startswith("writing to the store") and "ermission" in listed, listed
os.seteuid(0)
watch.close()
"""
SCRIPTS = {how: TRAINING.format(handler=row[0], install=row[1], end=row[2]) for how, row in ENDS.items()}
SCRIPTS |= {"forked": FORKING, "a file that may not grow": LIMITED}
SCRIPTS |= {"a folder that may not be entered": FORBIDDEN} if os.getuid() == 0 else {}


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """Exit code, what was printed as an error, and the run folder of each script: forks of one process, to import torch once."""
    folder = tmp_path_factory.mktemp("ended")
    folder.chmod(0o700)
    given = json.dumps([(how, script, WAIT in script) for how, script in SCRIPTS.items()])
    command = [sys.executable, "-c", DRIVER, str(folder), given]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=True, timeout=500)
    codes = json.loads(done.stdout)
    return {
        how: (codes[how], (folder / f"{number}.errors").read_text(), folder / str(number))
        for number, how in enumerate(SCRIPTS)
    }


@pytest.mark.parametrize("how", ENDS)
def test_the_run_is_whole_however_the_process_ends(ended, how: str) -> None:
    code, errors, folder = ended[how]
    *_, expected, stored = ENDS[how]
    assert code == expected, errors
    assert "training goes on" not in errors
    with open_run(folder) as run:
        assert run.series(ATTENTION)[0].tolist() == list(stored)


@pytest.mark.parametrize("how", [how for how in SCRIPTS if how not in ENDS])
def test_nothing_is_lost_to_a_fork_or_a_disk_that_recovers(ended, how: str) -> None:
    code, errors, folder = ended[how]
    assert code == 0, errors
    with open_run(folder) as run:
        assert run.series(ATTENTION)[0].tolist() == list(range(STEPS))
        assert len(run.sites) == 2
        assert "run/loss" not in run.metrics()


def _held(run: Path) -> list[str]:
    """The files in the folder ``run`` that this process holds open."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            targets.append(os.readlink(link))
    return [target for target in targets if Path(target).is_relative_to(run)]


class Batches(Dataset[torch.Tensor]):
    def __init__(self, where: Path) -> None:
        self.where = where

    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        if _held(self.where.parent / "run"):
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
        assert _held(tmp_path / "run"), "the trainer itself does hold it"
    assert list(held.iterdir()) == []
    assert warnings_logged() == []
    with open_run(tmp_path / "run") as run:
        assert run.series(ATTENTION)[0].tolist() == list(range(3 * STEPS))


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
