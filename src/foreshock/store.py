"""Where readings, alarms and the ledger go: one SQLite file of a run, or memory.

`RunStore` buffers until `flush`, which is one transaction: a process killed at any moment leaves everything up to its last
flush readable, and readers never wait for the writer. Values are kept as float32. Nothing raises outside `flush` and `close`.

While the disk is full, lost or read-only the buffer grows to a bound; series are read from what can be read of the file and
from the buffer, and the first flush that succeeds writes all of it. A file that was deleted is made anew from the open handle.
No handle lives across a fork: see `_stores`.
"""

from __future__ import annotations

import functools
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.agreement import this_rank
from foreshock.errors import RunError
from foreshock.memory import MemoryStore
from foreshock.pending import MOST_BYTES, Key, Pending
from foreshock.reader import open_run
from foreshock.records import Alarm, Array, Coverage, Reading
from foreshock.rewind import discard, holds_steps, set_aside
from foreshock.series import Steps, Values, join
from foreshock.tables import FILE, FORMAT, SCHEMA, Tables, damaged, dump, pack, pack_steps

_log = logging.getLogger("foreshock")
COMPACT = 256  # tail rows of one layout that become chunks
CHUNK = 512  # about the numbers in a chunk: small beside a page, so that pages fill up
REST = 20  # times as long as a flush took to fail, before one is tried again: a locked file may not hold training up


class RunStore(Tables):
    """The writer of ``<path>/run.sqlite``; an existing run is continued. Safe to call from several threads.

    ``anew``: a run that is there already is another one. Before the first record is written it is set aside, in
    ``<path>/earlier-1`` (or 2, ...), unless `rewind` was called.
    """

    def __init__(self, path: str | Path, *, anew: bool = False) -> None:
        self.path = Path(path) / FILE
        self._other = anew and holds_steps(self.path)
        self._aside = False  # whether that other one was copied
        self._start: int | None = None  # what is in the file from this step on is to be discarded
        self._db: sqlite3.Connection | None = None
        self._file = (0, 0)  # device and inode of what is open
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._pending = Pending()
        self._alarms: list[Alarm] = []
        self._coverage: Coverage | None = None
        self._meta: dict[str, Any] = {}
        self._troubles: list[tuple[str, Exception]] = []
        self._busy = self._failing = (
            False  # busy: a signal handler that comes in between finds all as it is, and leaves it so
        )
        self._failed_at = self._rest = 0.0
        self._forget()
        _stores().add(self)

    def write(self, step: int, readings: Sequence[Reading]) -> None:
        """Buffer the readings of a step; a later one of the same series and step wins."""
        with self._lock:
            busy, self._busy = self._busy, True
            try:
                self._pending.add(step, readings)
            finally:
                self._busy = busy
            if self._failing:
                before = self._pending.lost
                self._pending.trim()
                if self._pending.lost and not before:
                    told = f"more than {MOST_BYTES >> 20} MiB wait for {self.path}; the oldest steps are dropped"
                    self._troubles.append(("keeping what cannot be written", RunError(told)))

    def rewind(self, step: int) -> None:
        """Go on with the run that is there, at ``step``: what it has of that step and later is discarded by the next flush."""
        with self._lock:
            if self._other:  # what was written so far is not of the run that goes on
                self._other, self._alarms = False, []
                self._pending.clear()
            self._start = step if self._start is None else min(step, self._start)
            self._pending.rewind(step)
            self._alarms = [alarm for alarm in self._alarms if alarm.step < step]

    def alarm(self, alarm: Alarm) -> None:
        with self._lock:
            self._alarms.append(alarm)

    def coverage(self, coverage: Coverage) -> None:
        """The ledger as it now stands; it replaces the one before."""
        with self._lock:
            self._coverage = coverage

    def meta(self, **values: Any) -> None:
        """Facts about the run, by name; anything JSON can say, NumPy values included."""
        with self._lock:
            self._meta |= values

    def troubles(self) -> list[tuple[str, Exception]]:
        """What was being done and what went wrong beside the errors of `flush` since this was last asked."""
        with self._lock:
            found, self._troubles = self._troubles, []
            return found

    def flush(self, now: bool = True) -> None:
        """Write all that is buffered, in one transaction. Raises RunError if it cannot; then the buffer is kept.

        ``now=False`` leaves a disk that refused a short while ago in peace.
        """
        with self._lock:
            if self._busy or (self._other and not self._pending.rows):
                return  # in the latter case nothing that would be worth to set another run aside
            began = time.monotonic()
            if not now and self._failing and 0 <= began - self._failed_at < self._rest:
                return
            self._busy = True
            try:
                self._write_all()
            except BaseException as error:
                self._rollback()
                self._failing, self._failed_at = True, time.monotonic()
                self._rest = REST * (self._failed_at - began)
                if isinstance(error, RunError) or not isinstance(error, Exception):
                    raise
                raise RunError(
                    f"writing {self.path}: {error}; free the disk or make the folder writable; "
                    f"the newest {MOST_BYTES >> 20} MiB of readings are kept in memory until then"
                ) from error
            finally:
                self._busy = False
            self._failing = self._other = False
            self._start = None
            self._pending.clear()
            self._alarms, self._coverage, self._meta = [], None, {}

    def close(self) -> None:
        """Flush and let go of the file; a store that is written again opens it again."""
        with self._lock:
            if self._busy:
                return
            try:
                if self._pending.rows or self._alarms or self._coverage or self._meta or self._start is not None:
                    self.flush()
            finally:
                if self._db is not None:
                    with suppress(sqlite3.Error):  # a reader is still there: then the log file stays beside the run
                        self._db.executescript("PRAGMA busy_timeout = 0; PRAGMA journal_mode = DELETE;")
                self._let_go()
                self._forget()

    def series(self, metric: str, site: str | None = None) -> tuple[Steps, Values]:
        """As `Queries.series`, from the file and from what waits for it."""
        with self._lock:
            with suppress(RunError):  # which the next flush will say
                self.flush(now=False)
            return super().series(metric, site)

    def _keys(self) -> list[Key]:
        with self._lock:
            return list(dict.fromkeys([*super()._keys(), *self._pending.keys()]))

    def _column(self, metric: str, site: str | None) -> tuple[Steps, Values]:
        with self._lock:
            stored = [super()._column(metric, site)] if (metric, site) in super()._keys() else []
            return join([*stored, *self._pending.parts((metric, site))])

    @property
    def steps(self) -> Steps:
        with self._lock:
            return np.union1d(super().steps, np.array(list(self._pending.rows), np.int64))

    def _rows(self, sql: str, **values: Any) -> list[Any]:
        """While the file cannot be written it may still be read; where it cannot, or is another run's, it holds nothing."""
        if self._other:
            return []
        if self._db is not None:
            return super()._rows(sql, **values)
        try:
            with open_run(self.path) as run:
                return run._rows(sql, **values)
        except RunError:
            return []

    def _write_all(self) -> None:
        if os.getpid() != self._process:
            raise RunError(
                f"writing {self.path}: this process was forked from the one that writes it, and writes nothing"
            )
        db = self._writable()
        if self._pending.lost:
            self._meta["steps_lost"] = self._pending.lost
        if self._other and not self._aside:
            _log.warning("%s holds another run: it is now in %s", self.path, set_aside(db, self.path.parent))
            self._aside = True
        start = 0 if self._other else self._start
        db.execute("BEGIN IMMEDIATE")
        if start is not None:
            self._compact(db, 1)
            discard(db, start)
            self._forget()
            self._known = True  # nothing, of which everything is asked anew
        self._write_records(db)
        for step, row in self._pending.rows.items():
            self._write_row(db, step, row)
        self._compact(db, COMPACT)
        db.execute("COMMIT")

    def _connection(self) -> sqlite3.Connection:
        assert self._db is not None
        return self._db

    def _writable(self) -> sqlite3.Connection:
        """The file, open and known. After a failure it is opened anew; the old handle, which can still read it, goes last."""
        if self._db is not None and self._file != _identity(self.path):
            self._restore(self._db)
        elif self._db is None or self._failing:
            self._take(self._opened())
        assert self._db is not None
        if not self._known:
            self._remember(self._db)
        return self._db

    def _opened(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            if (found := db.execute("PRAGMA user_version").fetchone()[0]) > FORMAT:
                raise damaged(self.path, sqlite3.Error(f"format {found}, this foreshock writes {FORMAT}"))
            db.executescript(SCHEMA)
        except BaseException:
            db.close()
            raise
        return db

    def _take(self, db: sqlite3.Connection) -> None:
        self._let_go()
        file = _identity(self.path)
        if self._file != file:
            self._forget()
        self._db, self._file = db, file

    def _restore(self, gone: sqlite3.Connection) -> None:
        """The file was deleted or replaced while open: make it anew, with what the open handle still holds."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            partial = self.path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            copy = sqlite3.connect(partial)
            try:
                gone.backup(copy)
            finally:
                copy.close()
            partial.rename(self.path)
        self._take(self._opened())
        told = f"{self.path} was deleted or replaced while it was written; it was made anew, with what it held"
        self._troubles.append(("keeping the run's file", RunError(told)))

    def _forget(self) -> None:
        self._known = False  # whether the following is what the file holds
        self._series: dict[Key, int] = {}
        self._newest = 0  # the largest id among them
        self._layouts: dict[tuple[tuple[int, int], ...], int] = {}
        self._last: dict[int, int] = {}  # series -> the last step written to the tail since it was last emptied

    def _remember(self, db: sqlite3.Connection) -> None:
        """Take up an existing run: its tail becomes chunks, so that whatever comes is newer."""
        self._forget()
        db.execute("BEGIN IMMEDIATE")
        self._compact(db, 1)
        db.execute("COMMIT")
        self._known = True

    def _rollback(self) -> None:
        """Undo the transaction and forget what was remembered of it. The handle stays, for the file may still be read."""
        self._forget()
        if self._db is not None and self._db.in_transaction:
            try:
                self._db.execute("ROLLBACK")
            except sqlite3.Error:
                self._let_go()

    def _let_go(self) -> None:
        if self._db is not None:
            self._db.close()
        self._db = None

    def _write_records(self, db: sqlite3.Connection) -> None:
        db.executemany("INSERT INTO alarm (value) VALUES (?)", [(dump(alarm.to_json()),) for alarm in self._alarms])
        db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", [(key, dump(v)) for key, v in self._meta.items()])
        if self._coverage is not None:
            db.execute("INSERT OR REPLACE INTO coverage VALUES (0, ?)", (dump(self._coverage.to_json()),))

    def _write_row(self, db: sqlite3.Connection, step: int, row: dict[Key, Array]) -> None:
        if not row:
            return
        ids = [self._id(db, key) for key in row]
        if any(step <= self._last.get(id_, step - 1) for id_ in ids):
            self._compact(db, 1)  # a step written again: what is older goes below, where the tail outranks it
        self._last |= dict.fromkeys(ids, step)
        layout = self._layout(db, tuple((id_, len(values)) for id_, values in zip(ids, row.values(), strict=True)))
        data = np.concatenate(list(row.values())).tobytes()
        db.execute("INSERT INTO tail (step, layout, data) VALUES (?, ?, ?)", (step, layout, data))

    def _id(self, db: sqlite3.Connection, key: Key) -> int:
        if key not in self._series:  # another process may have added it
            for id_, metric, site in db.execute("SELECT id, metric, site FROM series WHERE id > ?", (self._newest,)):
                self._series[metric, site] = self._newest = int(id_)
        if key not in self._series:
            made = db.execute("INSERT INTO series (metric, site) VALUES (?, ?)", key).lastrowid
            self._series[key] = self._newest = int(made or 0)
        return self._series[key]

    def _layout(self, db: sqlite3.Connection, fields: tuple[tuple[int, int], ...]) -> int:
        if fields not in self._layouts:
            [(layout,)] = db.execute("SELECT coalesce(max(layout), 0) + 1 FROM field")
            ends = np.cumsum([length for _, length in fields])
            rows = [(layout, id_, int(end) - length, length) for (id_, length), end in zip(fields, ends, strict=True)]
            db.executemany("INSERT INTO field VALUES (?, ?, ?, ?)", rows)
            self._layouts[fields] = layout
        return self._layouts[fields]

    def _compact(self, db: sqlite3.Connection, least: int) -> None:
        """Turn the tail rows of every layout that has ``least`` of them into one chunk per series."""
        full = db.execute("SELECT layout FROM tail GROUP BY layout HAVING count(*) >= ?", (least,)).fetchall()
        for (layout,) in full:
            rows = db.execute("SELECT step, data FROM tail WHERE layout = ? ORDER BY id", (layout,)).fetchall()
            steps = np.array([step for step, _ in rows], np.int64)
            table = np.frombuffer(b"".join(data for _, data in rows), "<f4").reshape(len(rows), -1)
            fields = db.execute("SELECT series, start, length FROM field WHERE layout = ?", (layout,)).fetchall()
            for series, start, length in fields:
                parts = np.array_split(np.arange(len(rows)), max(1, round(len(rows) * length / CHUNK)))[: len(rows)]
                chunks = (
                    (series, pack_steps(steps[part]), pack(table[part, start : start + length])) for part in parts
                )
                db.executemany("INSERT INTO chunk (series, steps, data) VALUES (?, ?, ?)", chunks)
            db.execute("DELETE FROM tail WHERE layout = ?", (layout,))
        if least == 1:
            self._last = {}


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode of a file; of none where there is no such file."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


@functools.cache
def _stores() -> weakref.WeakSet[RunStore]:
    """Every store of this process. Before a fork (of `DataLoader` workers, say) each lets go of its file and opens it again when
    it is next written: SQLite forbids a handle in two processes, even to close it in one of them."""
    known: weakref.WeakSet[RunStore] = weakref.WeakSet()
    forking = threading.local()

    def before() -> None:
        forking.held = list(known)
        for store in forking.held:
            store._lock.acquire()
            if not store._busy:
                store._let_go()

    def after() -> None:
        for store in forking.held:
            store._lock.release()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after)
    return known


def store_of_this_rank(run: str | None, merged: bool) -> RunStore | MemoryStore:
    """Where a process of a distributed job keeps its run: ``RUN/rank3``, but of ranks that are merged the first has ``RUN``. None
    is kept in memory."""
    if run is None:
        return MemoryStore()
    rank, ranks = this_rank()
    alone = ranks < 2 or (merged and rank == 0)
    return RunStore(run if alone else os.path.join(run, f"rank{rank}"), anew=True)
