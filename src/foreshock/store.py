"""Where readings, alarms and the ledger go: one SQLite file of a run, or memory.

`RunStore` buffers until `flush`, which is one transaction: a process killed at any moment leaves everything up to its last
flush readable, and readers never wait for the writer. Values are kept as float32. Nothing is written to the disk, and nothing
raises, outside `flush` and `close`.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.agreement import this_rank
from foreshock.errors import RunError
from foreshock.records import Alarm, Array, Coverage, Reading
from foreshock.rewind import discard, holds_steps, set_aside
from foreshock.series import Queries, Steps, Values, join
from foreshock.tables import FILE, FORMAT, SCHEMA, Tables, damaged, dump, pack, pack_steps

_log = logging.getLogger("foreshock")
Key = tuple[str, str | None]
COMPACT = 256  # tail rows of one layout that become chunks
CHUNK = 512  # about the numbers in a chunk: small beside a page, so that pages fill up
PENDING = 4096  # steps kept in memory while the disk refuses them; the oldest go first


class MemoryStore(Queries):
    """Everything in memory, nothing written: what a `Watch` without a run path keeps."""

    def __init__(self) -> None:
        self._data: dict[Key, list[tuple[int, Array]]] = {}

    def write(self, step: int, readings: Sequence[Reading]) -> None:
        """Keep the readings of a step; a later one of the same series and step wins."""
        for reading in readings:
            values = np.array(reading.values, np.float64).reshape(-1)
            if values.size:
                self._data.setdefault((reading.metric, reading.site), []).append((int(step), values))

    def rewind(self, step: int) -> None:
        """Forget what was written at ``step`` and later."""
        for key, rows in list(self._data.items()):
            self._data[key] = [(at, values) for at, values in rows if at < step]
        self._data = {key: rows for key, rows in self._data.items() if rows}

    def alarm(self, alarm: Alarm) -> None:
        """Nothing to do: the watch itself holds its alarms."""

    def coverage(self, coverage: Coverage) -> None:
        """Nothing to do: the watch itself holds its ledger."""

    def meta(self, **values: Any) -> None:
        """Nothing to do: the watch itself holds its settings."""

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do; the series stay readable."""

    def _keys(self) -> list[Key]:
        return list(self._data)

    def _column(self, metric: str, site: str | None) -> tuple[Steps, Values]:
        return join([(np.array([step], np.int64), values[None]) for step, values in self._data[metric, site]])


class RunStore(Tables):
    """The writer of ``<path>/run.sqlite``; an existing run is continued. Safe to call from several threads.

    ``anew``: a run that is there already is another one. Before the first record is written it is set aside, in
    ``<path>/earlier-1`` (or 2, ...), unless `rewind` was called.
    """

    def __init__(self, path: str | Path, *, anew: bool = False) -> None:
        self.path = Path(path) / FILE
        self._other = anew and holds_steps(self.path)
        self._start: int | None = None  # what is in the file from this step on is to be discarded
        self._db: sqlite3.Connection | None = None
        self._lock = threading.RLock()
        self._buffer: dict[int, dict[Key, Array]] = {}
        self._alarms: list[Alarm] = []
        self._coverage: Coverage | None = None
        self._meta: dict[str, Any] = {}
        self._failing = False
        self._forget()

    def write(self, step: int, readings: Sequence[Reading]) -> None:
        """Buffer the readings of a step; a later one of the same series and step wins."""
        with self._lock, np.errstate(over="ignore"):
            row = self._buffer.setdefault(int(step), {})
            for reading in readings:
                values = np.array(reading.values, "<f4").reshape(-1)
                if values.size:
                    row[reading.metric, reading.site] = values
            if self._failing and len(self._buffer) > PENDING:
                del self._buffer[next(iter(self._buffer))]

    def rewind(self, step: int) -> None:
        """Go on with the run that is there, at ``step``: what it has of that step and later is discarded by the next flush."""
        with self._lock:
            if self._other:  # what was written so far is not of the run that goes on
                self._other, self._buffer, self._alarms = False, {}, []
            self._start = step if self._start is None else min(step, self._start)
            self._buffer = {at: row for at, row in self._buffer.items() if at < step}
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

    def flush(self) -> None:
        """Write all that is buffered, in one transaction. Raises RunError if it cannot; then the buffer is kept."""
        with self._lock:
            if self._other and not self._buffer:
                return  # nothing that would be worth to set another run aside
            try:
                db = self._connection()
                if self._other:
                    _log.warning("%s holds another run: it is now in %s", self.path, set_aside(db, self.path.parent))
                    self._other, self._start = False, 0
                db.execute("BEGIN IMMEDIATE")
                if self._start is not None:
                    self._compact(db, 1)
                    discard(db, self._start)
                    self._forget()
                self._write_records(db)
                for step, row in self._buffer.items():
                    self._write_row(db, step, row)
                self._compact(db, COMPACT)
                db.execute("COMMIT")
            except Exception as error:
                self._rollback()
                self._failing = True
                if isinstance(error, RunError):
                    raise
                raise RunError(
                    f"writing {self.path}: {error}; free the disk or make the folder writable; "
                    f"the last {PENDING} steps are kept in memory until then"
                ) from error
            self._failing, self._start = False, None
            self._buffer, self._alarms, self._coverage, self._meta = {}, [], None, {}

    def close(self) -> None:
        """Flush and let go of the file; a store that is written again opens it again."""
        with self._lock:
            try:
                if self._buffer or self._alarms or self._coverage or self._meta or self._start is not None:
                    self.flush()
            finally:
                if self._db is not None:
                    with suppress(sqlite3.Error):  # a reader is still there: then the log file stays beside the run
                        self._db.executescript("PRAGMA busy_timeout = 0; PRAGMA journal_mode = DELETE;")
                    self._db.close()
                self._db = None
                self._forget()

    def series(self, metric: str, site: str | None = None) -> tuple[Steps, Values]:
        """As `Queries.series`, after a flush."""
        self.flush()
        return super().series(metric, site)

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
            try:
                if (found := db.execute("PRAGMA user_version").fetchone()[0]) > FORMAT:
                    raise damaged(self.path, sqlite3.Error(f"format {found}, this foreshock writes {FORMAT}"))
                db.executescript(SCHEMA)
                self._remember(db)
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _forget(self) -> None:
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

    def _rollback(self) -> None:
        """Undo the transaction and what was remembered of it: the next flush opens the file anew."""
        if self._db is not None:
            self._db.close()
        self._db = None
        self._forget()

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


def is_first_rank() -> bool:
    """Whether this process writes for all ranks of its job."""
    return this_rank()[0] == 0


def store_of_this_rank(run: str, merged: bool) -> MemoryStore | RunStore:
    """Where a process of a distributed job keeps its run: merged, rank 0 writes ``RUN`` for all, else each has ``RUN/rank3``."""
    rank, ranks = this_rank()
    if ranks < 2 or (merged and rank == 0):
        return RunStore(run, anew=True)
    return MemoryStore() if merged else RunStore(os.path.join(run, f"rank{rank}"), anew=True)
