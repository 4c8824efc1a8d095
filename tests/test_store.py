"""What is stored comes back: last write wins, a killed writer loses only what it had not flushed, numbers stay small."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreshock.errors import ConfigError, RunError
from foreshock.memory import MemoryStore, RecentStore
from foreshock.reader import open_run
from foreshock.records import Alarm, Coverage, Reading
from foreshock.store import COMPACT, RunStore

Store = MemoryStore | RunStore
MADE: dict[str, Callable[[Path], Store]] = {
    "memory": lambda path: MemoryStore(),
    "recent": lambda path: RecentStore(),
    "file": RunStore,
}


@pytest.fixture(params=sorted(MADE))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MADE[request.param](tmp_path / "run")


def reading(metric: str, site: str | None, *values: float) -> Reading:
    return Reading(metric, site, np.array(values))


def test_run_level_and_vector_series(store: Store) -> None:
    for step in (1, 2, 3):
        store.write(step, [reading("run/loss", None, step / 2), reading("attention/entropy", "l0", step, -step)])
    steps, loss = store.series("run/loss")
    assert steps.dtype == np.int64
    assert steps.tolist() == [1, 2, 3]
    assert loss.tolist() == [0.5, 1.0, 1.5]
    assert store.series("attention/entropy")[1].tolist() == [[1, -1], [2, -2], [3, -3]]
    assert store.metrics() == ["attention/entropy", "run/loss"]
    assert store.sites_of("run/loss") == [None]


def test_sites_stack_on_the_union_of_steps(store: Store) -> None:
    store.write(1, [reading("router/z", "b", 1.0), reading("router/z", "a", 2.0)])
    store.write(5, [reading("router/z", "a", 3.0)])
    steps, values = store.series("router/z")
    assert steps.tolist() == [1, 5]
    np.testing.assert_array_equal(values, [[1.0, 2.0], [np.nan, 3.0]])
    assert store.series("router/z", "a")[1].tolist() == [2.0, 3.0]


def test_what_cannot_be_asked_says_what_can(store: Store) -> None:
    store.write(1, [reading("router/load", "a", 1, 2), reading("router/load", "b", 1, 2, 3)])
    with pytest.raises(ConfigError, match=r"router/laod.*did you mean router/load"):
        store.series("router/laod")
    with pytest.raises(ConfigError, match=r"lengths differ.*a, b"):
        store.series("router/load")
    with pytest.raises(ConfigError, match=r"at site 'c'.*a, b"):
        store.series("router/load", "c")


@pytest.mark.parametrize("flushed", [1, 40, 1000])
def test_the_last_write_of_a_step_wins(store: Store, flushed: int) -> None:
    """A resumed run goes back in time, through other layouts, flushed at any moment."""
    plan = [*range(600), *range(300, 700)]
    for written, step in enumerate(plan):
        row = [reading("optim/lr", None, written)]
        store.write(step, row if step % 7 else [*row, reading("router/z", "a", written)])
        if written % flushed == 0:
            store.flush()
    steps, values = store.series("optim/lr")
    assert steps.tolist() == list(range(700))
    assert values.tolist() == [*range(300), *range(600, 1000)]


def test_reopened_run_goes_on(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        store = RunStore(tmp_path)
        store.write(1, [reading("run/loss", None, value), reading("optim/lr", None, value)])
        store.write(1 + int(value), [reading("run/loss", None, value)])
        store.close()
    with open_run(tmp_path) as run:
        assert run.series("run/loss")[1].tolist() == [2.0, 1.0, 2.0]
        assert run.series("optim/lr")[1].tolist() == [2.0]


def test_odd_numbers_survive(store: Store) -> None:
    store.write(1, [reading("run/loss", None, np.nan, np.inf, -np.inf, 1e300), reading("empty", None)])
    steps, values = store.series("run/loss")
    assert np.isnan(values[0, 0])
    assert values[0, 1:3].tolist() == [np.inf, -np.inf]
    assert store.metrics() == ["run/loss"]
    assert len(steps) == 1


@pytest.mark.parametrize("width", [1, 7, 3000])
def test_compaction_keeps_every_number(tmp_path: Path, width: int) -> None:
    values = np.random.default_rng(0).normal(size=(COMPACT + 9, width)).astype(np.float32)
    store = RunStore(tmp_path)
    for step, row in enumerate(values):
        store.write(step, [Reading("router/load", "r", row), Reading("router/z", "r", row[:1])])
        store.flush()
    np.testing.assert_array_equal(store.series("router/load")[1].reshape(len(values), -1), values)
    store.close()


def test_two_writers_share_the_series(tmp_path: Path) -> None:
    first, second = RunStore(tmp_path), RunStore(tmp_path)
    for step in range(600):
        (first, second)[step % 2].write(step, [reading("run/loss", None, step)])
        (first, second)[step % 2].flush()
    first.close()
    second.close()
    with open_run(tmp_path) as run:
        assert run.series("run/loss")[1].tolist() == list(range(600))


def test_a_finished_run_is_one_file(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write(1, [reading("run/loss", None, 1.0)])
    store.close()
    with open_run(tmp_path) as run:
        assert len(run.steps) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["run.sqlite"]


def steps_of_sqlite(monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[int, int]:
    """Of its machine: to open a run, and to read one series of it."""
    count, connect = 0, sqlite3.connect

    def progress() -> int:
        nonlocal count
        count += 1
        return 0

    def counting(*args: Any, **options: Any) -> sqlite3.Connection:
        db = connect(*args, **options)
        db.set_progress_handler(progress, 1)
        return db

    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", counting)
        with open_run(path) as run:
            opened = count
            run.series("router/load", "layer3")
    return opened, count - opened


def test_small_and_quick_at_a_million_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening takes the same for any length, reading a series no more than in proportion to what it holds."""
    rng, counts = np.random.default_rng(0), []
    records = COMPACT * 4, 5 * COMPACT * 4
    store = RunStore(tmp_path)
    for step in range(records[1]):
        store.write(step, [Reading("router/load", f"layer{i}", rng.normal(size=40)) for i in range(5)])
        if step % 256 == 255:
            store.flush()
        if step + 1 in records:
            store.close()
            counts.append(steps_of_sqlite(monkeypatch, tmp_path))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) / (records[1] * 5 * 40) <= 4.2
    (opened, read), (opened_later, read_later) = counts
    assert 0 < opened_later <= opened
    assert 0 < read_later <= 5.2 * read
    with open_run(tmp_path) as run:
        steps, values = run.series("router/load", "layer3")
    assert values.shape == (len(steps), 40) == (records[1], 40)


WRITER = """
import sys, numpy as np
from foreshock.records import Reading
from foreshock.store import RunStore
store = RunStore(sys.argv[1])
for step in range(10**6):
    store.write(step, [Reading("run/loss", None, np.array([step / 4])), Reading("router/load", "r", np.full(8, step))])
    if step % 10 == 9:
        store.flush()
        print(step, flush=True)
"""


def test_a_killed_writer_leaves_all_it_flushed_and_can_be_read_while_it_writes(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) % 300 == 299:
                with open_run(tmp_path) as live:
                    assert live.series("run/loss")[0][-1] >= int(line)
            if int(line) >= 900:
                break
        writer.kill()
        last = int((line + writer.stdout.read()).split()[-1])
    with open_run(tmp_path) as run:
        steps, values = run.series("router/load", "r")
    assert steps.tolist() == list(range(len(steps)))
    assert len(steps) > last
    assert (values == steps[:, None]).all()


def test_alarms_ledger_and_facts(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    alarm = Alarm(
        np.int64(9), 7, "l0", "law/euler", np.float64(np.inf), "< 1", "critical", "?", ("one",), "off", head=2
    )  # type: ignore[arg-type]
    store.alarm(alarm)
    store.coverage(Coverage(graph_breaks=("one",)))
    store.coverage(Coverage(graph_breaks=("one", "two")))
    store.meta(cost={"share": np.float32(0.5)}, every=10)
    store.meta(every=5)
    store.close()
    with open_run(tmp_path) as run:
        assert run.alarms == [alarm]
        assert run.coverage.graph_breaks == ("one", "two")
        assert run.meta == {"cost": {"share": 0.5}, "every": 5}


def test_a_disk_that_refuses_raises_only_from_flush_and_keeps_the_buffer(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    store = RunStore(tmp_path / "run")
    store.write(1, [reading("run/loss", None, 1.0)])
    with pytest.raises(RunError, match=r"writing .*run.sqlite.*free the disk"):
        store.flush()
    (tmp_path / "run").unlink()
    store.flush()
    assert store.series("run/loss")[1].tolist() == [1.0]
    store.close()


def test_a_failed_transaction_leaves_no_half(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write(1, [reading("run/loss", None, 1.0)])
    store.flush()
    assert store._db is not None
    store._db.execute("PRAGMA max_page_count = 1")  # the disk is full
    rng = np.random.default_rng(0)
    for step in range(2, 60):
        store.write(step, [Reading("router/load", "r", rng.normal(size=999))])
    with pytest.raises(RunError, match="full"):
        store.flush()
    with open_run(tmp_path) as run:
        assert run.metrics() == ["run/loss"]
    store.close()
    with open_run(tmp_path) as run:
        assert len(run.series("router/load")[0]) == 58


def test_what_is_kept_for_a_rank_that_does_not_write_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much more is written than is kept, and memory is held to what the bound says."""
    monkeypatch.setattr("foreshock.memory.RECENT_BYTES", 2**20)
    store, sites = RecentStore(), [f"attention:layers.{number}" for number in range(50)]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for step in range(300):
        store.write(step, [Reading("attention/q_rms", site, np.full(32, step)) for site in sites])
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert taken < 2 * 2**20
    steps, values = store.series("attention/q_rms", sites[0])
    assert steps.tolist() == list(range(300 - len(steps), 300))
    assert 20 < len(steps) < 60
    assert (values == steps[:, None]).all()
