"""A disk that is full, lost, read-only or locked: the run goes on in memory, is told once, stays readable, and is written later."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from disks import Refusing, refusing
from loop import STEPS, Loop, identical

from foreshock import RunError, Watch, open_run
from foreshock.pending import MOST_BYTES
from foreshock.records import Reading
from foreshock.store import COMPACT, RunStore

HALF = STEPS // 2
ATTENTION = "attention/q_rms"


@pytest.fixture(name="refusing")
def _refusing() -> Iterator[type[Refusing]]:
    with refusing() as refuses:
        yield refuses


def _full(run: Path) -> None:
    Refusing.error = sqlite3.OperationalError("database or disk is full")


def _free(run: Path) -> None:
    Refusing.error = None


def _read_only(run: Path) -> None:
    Refusing.error = sqlite3.OperationalError("attempt to write a readonly database")


def _in_the_way(run: Path) -> None:
    """The folder is lost, and something stands where it was."""
    shutil.rmtree(run)
    run.write_text("in the way")


def _out_of_the_way(run: Path) -> None:
    run.unlink()


_locks: list[sqlite3.Connection] = []


def _lock(run: Path) -> None:
    """Another process is at it for long."""
    _locks.append(sqlite3.connect(run / "run.sqlite", isolation_level=None))
    _locks[0].execute("BEGIN IMMEDIATE")


def _unlock(run: Path) -> None:
    other = _locks.pop()
    other.execute("COMMIT")
    other.close()


DISKS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], str]] = {
    "full": (_full, _free, "disk is full"),
    "read-only": (_read_only, _free, "readonly"),
    "locked": (_lock, _unlock, "locked"),
    "lost": (_in_the_way, _out_of_the_way, "run.sqlite"),
}


@pytest.mark.parametrize(
    ("disk", "recovers"),
    [("full", True), ("lost", True), ("locked", True), ("read-only", False)]
    + [pytest.param(*row, marks=pytest.mark.slow) for row in (("full", False), ("lost", False), ("read-only", True))],
)
def test_a_disk_that_fails_in_mid_run(
    one_thread, warnings_logged, refusing, tmp_path, disk: str, recovers: bool
) -> None:
    breaks, mends, told = DISKS[disk]
    run, read = tmp_path / "run", []

    def between(loop: Loop, step: int) -> None:
        if step == HALF:
            breaks(run)
        if step == STEPS - 1:
            read.extend(watch.series(ATTENTION)[0].tolist())
            if recovers:
                mends(run)

    plain = Loop("aot_eager").run()
    with Watch(run, every=1, inner="aot_eager") as watch:
        assert identical(Loop(watch.backend).run(between), plain)
        assert read == list(range(STEPS - 1))
        assert watch.series(ATTENTION)[0].tolist() == list(range(STEPS))
        (listed,) = [warning for warning in watch.coverage.warnings if "deleted" not in warning]
        assert listed.startswith("writing to the store")
        assert told in listed
    assert [message.partition(":")[0] for message in warnings_logged() if "deleted" not in message] == [
        "writing to the store"
    ]
    if recovers:
        with open_run(run) as stored:
            assert stored.series(ATTENTION)[0].tolist() == list(range(STEPS))


@pytest.mark.parametrize("disk", DISKS)
def test_a_ledger_told_at_every_step_to_a_disk_that_fails_warns_once(
    one_thread, warnings_logged, refusing, monkeypatch, tmp_path, disk: str
) -> None:
    monkeypatch.setattr("foreshock.collector.RECORDED", -1.0)
    breaks, mends, _ = DISKS[disk]
    plain = Loop("aot_eager").run()
    with Watch(tmp_path / "run", every=1, inner="aot_eager") as watch:
        broken = Loop(watch.backend).run(lambda loop, step: breaks(tmp_path / "run") if step == HALF else None)
        assert identical(broken, plain)
        mends(tmp_path / "run")
    told = [message.partition(":")[0] for message in warnings_logged() if "deleted" not in message]
    assert told == ["writing to the store"]
    with open_run(tmp_path / "run") as stored:
        assert len(stored.sites) == 2


def test_a_disk_that_fails_from_the_start(one_thread, warnings_logged, tmp_path) -> None:
    (tmp_path / "run").write_text("in the way")
    plain = Loop("aot_eager").run()
    with Watch(tmp_path / "run", every=1, inner="aot_eager") as watch:
        assert identical(Loop(watch.backend).run(), plain)
        assert watch.series(ATTENTION)[0].tolist() == list(range(STEPS))
        assert len(watch.coverage.warnings) == 1
        (tmp_path / "run").unlink()
    assert len(warnings_logged()) == 1
    with open_run(tmp_path / "run") as stored:
        assert stored.series(ATTENTION)[0].tolist() == list(range(STEPS))
        assert len(stored.sites) == 2


def test_a_folder_that_is_deleted_in_mid_run_is_made_anew_with_all_of_it(one_thread, warnings_logged, tmp_path) -> None:
    run = tmp_path / "run"
    plain = Loop("aot_eager").run()
    with Watch(run, every=1, inner="aot_eager") as watch:
        assert identical(
            Loop(watch.backend).run(lambda loop, step: shutil.rmtree(run) if step == HALF else None), plain
        )
    (message,) = warnings_logged()
    assert message.startswith("keeping the run's file")
    with open_run(run) as stored:
        assert stored.series(ATTENTION)[0].tolist() == list(range(STEPS))


def _readings(step: int, width: int = 4) -> list[Reading]:
    return [Reading("router/load", "r", np.full(width, step)), Reading("run/loss", None, np.array([step / 4]))]


def test_what_waits_is_bounded_and_what_was_dropped_is_told(tmp_path, refusing, monkeypatch) -> None:
    monkeypatch.setattr("foreshock.pending.MOST_BYTES", 2**16)
    store = RunStore(tmp_path)
    store.write(0, _readings(0))
    store.flush()
    _full(tmp_path)
    for step in range(1, 1001):
        store.write(step, _readings(step))
        if step == 1:
            with pytest.raises(RunError, match="full"):
                store.flush()
    assert store._pending._bytes <= 2**16 < MOST_BYTES
    ((_, error),) = store.troubles()
    assert "dropped" in str(error)
    held = store.series("run/loss")[0]
    assert held[0] == 0
    assert held[-1] == 1000
    kept = len(held) - 1
    assert 2**16 / 1000 < kept < 1000
    _free(tmp_path)
    store.close()
    with open_run(tmp_path) as run:
        assert run.series("run/loss")[0].tolist() == [0, *range(1001 - kept, 1001)]
        assert run.meta["steps_lost"] == 1000 - kept


def test_series_join_the_file_and_what_waits(tmp_path, refusing) -> None:
    """A later write of a step wins, wherever it is; a series may be in the buffer alone."""
    store = RunStore(tmp_path)
    for step in range(COMPACT + 5):
        store.write(step, _readings(step))
    store.flush()
    _full(tmp_path)
    store.write(3, [Reading("run/loss", None, np.array([99.0]))])
    store.write(COMPACT + 5, [*_readings(COMPACT + 5), Reading("optim/lr", None, np.array([0.5]))])
    with pytest.raises(RunError):
        store.flush()
    steps, values = store.series("run/loss")
    assert steps.tolist() == store.steps.tolist() == list(range(COMPACT + 6))
    assert values[3] == 99.0
    assert values[4] == 1.0
    assert store.series("optim/lr")[1].tolist() == [0.5]
    assert store.metrics() == ["optim/lr", "router/load", "run/loss"]
    _free(tmp_path)
    store.close()


def test_a_locked_file_is_not_waited_for_at_every_step(tmp_path) -> None:
    store = RunStore(tmp_path)
    store.write(0, _readings(0))
    store.flush()
    assert store._db is not None
    store._db.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(tmp_path / "run.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store.write(1, _readings(1))
    with pytest.raises(RunError, match="locked"):
        store.flush(now=False)
    for step in range(2, 50):
        store.write(step, _readings(step))
        store.flush(now=False)  # at once, and without an error: 50 ms were waited for
    assert store.series("run/loss")[0].tolist() == list(range(50))
    other.execute("COMMIT")
    other.close()
    store.flush()
    store.close()
    with open_run(tmp_path) as run:
        assert run.series("run/loss")[0].tolist() == list(range(50))
