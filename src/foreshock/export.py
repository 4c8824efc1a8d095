"""A run's series as one long table in a file: step, metric, site, index (head, key/value head or expert), value.

One series is in memory at a time. The file is written beside its name and takes it when it is whole.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.errors import ConfigError, RunError
from foreshock.monitors.sinks.jsonl import named
from foreshock.reader import Run
from foreshock.records import Array
from foreshock.series import nearest

COLUMNS = ("step", "metric", "site", "index", "value")
ROWS = 2**17  # of a block at most, and of a row group in Parquet
Progress = Callable[[int, int], None]  # series done, of how many


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one series: ``steps``, ``index`` and ``values`` are ``[n]``; ``site`` is None for the run's own."""

    metric: str
    site: str | None
    steps: Array
    index: Array
    values: Array


def export(
    run: Run,
    file: str | Path,
    *,
    metrics: Sequence[str] = ("*",),
    progress: Progress = lambda done, of: None,
) -> int:
    """Write the series whose metric fits one of the globs ``metrics`` to ``file``; how many rows that was.

    The suffix says how: .parquet (needs pyarrow), .csv or .jsonl. JSON has no NaN and no infinity, which become their names.
    Raises ConfigError for another suffix, a glob that nothing fits, or a missing pyarrow; RunError where it cannot be written.
    """
    file = Path(file)
    if file.suffix not in WRITERS:
        raise ConfigError(f"exporting to {file}: the suffix must be one of {', '.join(WRITERS)}, got {file.suffix!r}")
    known = run.metrics()
    for glob in metrics:
        if known and not any(fnmatchcase(name, glob) for name in known):
            raise ConfigError(f"exporting {run.path}: no metric fits {glob!r}{nearest(glob, known)}")
    wanted = [name for name in known if any(fnmatchcase(name, glob) for glob in metrics)]
    keys = [(name, site) for name in wanted for site in run.sites_of(name)]
    part, rows = file.with_name(f".{file.name}.part"), 0
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with WRITERS[file.suffix](part) as writer:
            for done, (name, site) in enumerate(keys):
                progress(done, len(keys))
                for block in _blocks(run, name, site):
                    writer.write(block)
                    rows += len(block.values)
        part.replace(file)
    except OSError as error:
        raise RunError(f"exporting to {file}: {error}; free the disk, or give another place") from error
    finally:
        part.unlink(missing_ok=True)
    progress(len(keys), len(keys))
    return rows


def _blocks(run: Run, metric: str, site: str | None) -> Iterator[Block]:
    steps, values = run.series(metric, site)
    table = values.reshape(len(steps), -1)
    width = table.shape[1]
    at_once = max(1, ROWS // max(width, 1))
    for start in range(0, len(steps), at_once):
        own, rows = steps[start : start + at_once], table[start : start + at_once]
        yield Block(metric, site, np.repeat(own, width), np.tile(np.arange(width), len(own)), rows.reshape(-1))


class _Parquet(AbstractContextManager["_Parquet"]):
    def __init__(self, file: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError(
                f"exporting to Parquet: {error}; pip install 'foreshock[parquet]', or give .csv"
            ) from error
        self._arrow = pyarrow
        text = pyarrow.string()
        types = (pyarrow.int64(), text, text, pyarrow.int32(), pyarrow.float64())
        self._schema = pyarrow.schema(list(zip(COLUMNS, types, strict=True)))
        self._file = pyarrow.parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._waiting: list[Any] = []
        self._rows = 0

    def write(self, block: Block) -> None:
        arrow, count = self._arrow, len(block.values)
        site = arrow.nulls(count, arrow.string()) if block.site is None else arrow.repeat(block.site, count)
        index = arrow.array(block.index, arrow.int32())
        columns = [arrow.array(block.steps), arrow.repeat(block.metric, count), site, index, arrow.array(block.values)]
        self._waiting.append(arrow.RecordBatch.from_arrays(columns, schema=self._schema))
        self._rows += count
        if self._rows >= ROWS:  # short series share a row group
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._file.write_table(self._arrow.Table.from_batches(self._waiting), row_group_size=2 * ROWS)
        self._waiting, self._rows = [], 0

    def __exit__(self, *error: object) -> None:
        try:
            self._flush()
        finally:
            self._file.close()


class _Text(AbstractContextManager["_Text"]):
    def __init__(self, file: Path) -> None:
        self._file = file.open("w", encoding="utf-8", newline="")

    def __exit__(self, *error: object) -> None:
        self._file.close()


class _Csv(_Text):
    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._csv = csv.writer(self._file)
        self._csv.writerow(COLUMNS)

    def write(self, block: Block) -> None:
        site = "" if block.site is None else block.site
        rows = zip(block.steps.tolist(), block.index.tolist(), block.values.tolist(), strict=True)
        self._csv.writerows((step, block.metric, site, index, value) for step, index, value in rows)


class _Jsonl(_Text):
    def write(self, block: Block) -> None:
        for step, index, value in zip(block.steps.tolist(), block.index.tolist(), block.values.tolist(), strict=True):
            row = dict(zip(COLUMNS, (step, block.metric, block.site, index, named(value)), strict=True))
            self._file.write(json.dumps(row) + "\n")


WRITERS: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    ".parquet": _Parquet,
    ".csv": _Csv,
    ".jsonl": _Jsonl,
}
