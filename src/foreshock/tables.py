"""The tables of ``run.sqlite``: what each holds and how a column is read back out of them.

``tail`` keeps the newest steps, one row a step: all numbers of the step as float32, cut up by ``field``. ``chunk`` keeps
the rest, one row per series and few hundred steps, byte planes deflated (about 3.5 bytes a number). For a series
and a step that both hold, ``tail`` is the newer; among chunks the higher id is.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from foreshock.errors import RunError
from foreshock.records import Array
from foreshock.series import Queries, Steps, Values, join

Counts = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32]
Part = tuple[Steps, Numbers]
FILE = "run.sqlite"
FORMAT = 1
SCHEMA = f"""
PRAGMA page_size = 16384;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA wal_autocheckpoint = 256;
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS coverage (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS alarm (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS series (id INTEGER PRIMARY KEY, metric TEXT NOT NULL, site TEXT);
CREATE TABLE IF NOT EXISTS field (layout INTEGER, series INTEGER, start INTEGER, length INTEGER);
CREATE TABLE IF NOT EXISTS tail (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, layout INTEGER, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS chunk (id INTEGER PRIMARY KEY, series INTEGER, steps BLOB NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS field_series ON field (series);
CREATE INDEX IF NOT EXISTS tail_layout ON tail (layout);
CREATE INDEX IF NOT EXISTS chunk_series ON chunk (series);
PRAGMA user_version = {FORMAT};
COMMIT;
"""
COLUMN = """
SELECT 0 AS newer, id, steps, data FROM chunk WHERE series = :series
UNION ALL
SELECT 1, tail.id, tail.step, substr(data, 4 * start + 1, 4 * length)
FROM field JOIN tail ON tail.layout = field.layout WHERE field.series = :series
ORDER BY newer, id
"""


def pack(values: Array) -> bytes:
    """Float32 numbers as byte planes, deflated: the top one, sign and exponent, apart, as it all but goes."""
    planes = np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(-1, 4).T
    return zlib.compress(planes[3].tobytes(), 1) + zlib.compress(planes[:3].tobytes(), 1)


def unpack(blobs: Sequence[bytes]) -> tuple[Numbers, Counts]:
    """The numbers of chunks, one after the other, and how many each has. Chunk by chunk: its planes stay in the cache."""
    tops, rests = [], []
    for blob in blobs:
        stream = zlib.decompressobj()
        tops.append(stream.decompress(blob))
        rests.append(zlib.decompress(stream.unused_data))
    counts = np.array([len(top) for top in tops], np.int64)
    numbers, end = np.empty((counts.sum(), 4), np.uint8), 0
    for top, rest in zip(tops, rests, strict=True):
        start, end = end, end + len(top)
        for at, plane in enumerate(np.frombuffer(rest, np.uint8).reshape(3, len(top))):
            numbers[start:end, at] = plane
        numbers[start:end, 3] = np.frombuffer(top, np.uint8)
    return numbers.view("<f4").reshape(-1), counts


def pack_steps(steps: Steps) -> bytes:
    return zlib.compress(np.diff(steps, prepend=0).astype("<i8").tobytes(), 1)


def unpack_steps(blobs: Sequence[bytes]) -> tuple[Steps, Counts]:
    """The steps of chunks, one after the other, and how many each has."""
    parts = [zlib.decompress(blob) for blob in blobs]
    counts = np.array([len(part) // 8 for part in parts], np.int64)
    sums = np.cumsum(np.frombuffer(b"".join(parts), "<i8"), dtype=np.int64)
    before = np.concatenate([np.zeros(1, np.int64), sums])[np.cumsum(counts) - counts]
    return sums - np.repeat(before, counts), counts


def dump(value: Any) -> str:
    """JSON; arrays and NumPy or torch scalars become plain numbers, anything else its text."""
    return json.dumps(
        value, skipkeys=True, default=lambda other: other.tolist() if hasattr(other, "tolist") else str(other)
    )


class Tables(Queries):
    """A `Queries` over an open connection. Each answer is one statement, so it is consistent while a writer writes."""

    path: Path

    def _rows(self, sql: str, **values: Any) -> list[Any]:
        try:
            return self._connection().execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise damaged(self.path, error) from error

    def _connection(self) -> sqlite3.Connection:
        raise NotImplementedError

    def _keys(self) -> list[tuple[str, str | None]]:
        return self._rows("SELECT metric, site FROM series ORDER BY id")

    def _column(self, metric: str, site: str | None) -> tuple[Steps, Values]:
        [series, *_] = self._rows(
            "SELECT id FROM series WHERE metric = :metric AND site IS :site", metric=metric, site=site
        )
        parts: list[Part] = []
        rows = self._rows(COLUMN, series=series[0])
        try:
            for (newer, _), group in groupby(rows, key=lambda row: (row[0], row[0] and len(row[3]))):
                if newer:
                    parts.append(_tail(list(group)))
                else:
                    _, _, steps, data = zip(*group, strict=True)
                    parts += chunks(steps, data)
        except (zlib.error, ValueError) as error:
            raise damaged(self.path, error) from error
        return join(parts)

    @property
    def steps(self) -> Steps:
        """Every step at which anything was recorded, rising."""
        try:
            packed, _ = unpack_steps([steps for (steps,) in self._rows("SELECT DISTINCT steps FROM chunk")])
        except (zlib.error, ValueError) as error:
            raise damaged(self.path, error) from error
        tail = np.array([step for (step,) in self._rows("SELECT DISTINCT step FROM tail")], np.int64)
        return np.unique(np.concatenate([tail, packed]))


def chunks(steps: Sequence[bytes], data: Sequence[bytes]) -> list[Part]:
    """Chunks of one series in the order written, those joined that have as many numbers a step."""
    (own, lengths), (numbers, counts) = unpack_steps(steps), unpack(data)
    widths = counts // lengths
    if (widths * lengths != counts).any():
        raise ValueError("a chunk has more or fewer numbers than its steps")
    starts = np.flatnonzero(np.diff(widths, prepend=-1))
    ends = [np.cumsum(of)[starts[1:] - 1] for of in (lengths, counts)]
    parts = zip(np.split(own, ends[0]), np.split(numbers, ends[1]), widths[starts], strict=True)
    return [(steps_N, numbers_N.reshape(len(steps_N), width)) for steps_N, numbers_N, width in parts]


def _tail(rows: list[tuple[int, int, int, bytes]]) -> Part:
    values = np.frombuffer(b"".join(data for *_, data in rows), "<f4")
    return np.array([step for _, _, step, _ in rows], np.int64), values.reshape(len(rows), -1)


def damaged(path: Path, error: Exception) -> RunError:
    return RunError(
        f"reading {path}: not a foreshock run, or a damaged one ({error}); restore it from a copy, or start a new run folder"
    )
