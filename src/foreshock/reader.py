"""Reads a run, live or finished, without ever writing to it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from foreshock.errors import RunError
from foreshock.records import Alarm, Coverage, Site
from foreshock.tables import FILE, FORMAT, Tables, damaged

if TYPE_CHECKING:
    import pandas as pd


class Run(Tables):
    """A stored run. Every property asks the file again, so a live run shows what its last flush wrote."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db

    @property
    def name(self) -> str:
        """The run folder's own name."""
        return self.path.resolve().parent.name

    @property
    def alarms(self) -> list[Alarm]:
        return [Alarm.from_json(self._json(value)) for (value,) in self._rows("SELECT value FROM alarm ORDER BY id")]

    @property
    def coverage(self) -> Coverage:
        """The ledger as last stored; an empty one if there is none yet."""
        rows = self._rows("SELECT value FROM coverage")
        return Coverage.from_json(self._json(rows[0][0])) if rows else Coverage()

    @property
    def sites(self) -> list[Site]:
        """The watched sites, one each, in the order of the ledger."""
        return list({status.site.id: status.site for status in self.coverage}.values())

    @property
    def meta(self) -> dict[str, Any]:
        return {key: self._json(value) for key, value in self._rows("SELECT key, value FROM meta ORDER BY key")}

    def to_pandas(self) -> pd.DataFrame:
        """A long frame: step, metric, site, index (head, key/value head or expert), value."""
        try:
            import pandas as pd
        except ImportError as error:
            raise RunError(
                f"turning {self.path} into a frame: pandas is not installed; pip install 'foreshock[pandas]'"
            ) from error
        columns: dict[str, list[Any]] = {"step": [], "metric": [], "site": [], "index": [], "value": []}
        for metric, site in self._keys():
            steps, values = self._column(metric, site)
            count, width = values.shape
            columns["step"].append(np.repeat(steps, width))
            columns["metric"].append(np.full(values.size, metric, object))
            columns["site"].append(np.full(values.size, site, object))
            columns["index"].append(np.tile(np.arange(width), count))
            columns["value"].append(values.reshape(-1))
        return pd.DataFrame({name: np.concatenate(parts) if parts else [] for name, parts in columns.items()})

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connection(self) -> sqlite3.Connection:
        return self._db

    def _json(self, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise damaged(self.path, error) from error


def open_run(path: str | Path) -> Run:
    """Open a run folder (or its ``run.sqlite``) for reading, while it is written or after.

    Raises RunError, in one line, for a folder that is missing, holds no run, or holds a damaged one.
    """
    folder = Path(path)
    file = folder if folder.is_file() else folder / FILE
    if not file.is_file():
        raise RunError(f"opening the run {folder}: {_why(folder)}")
    last: sqlite3.Error = sqlite3.OperationalError("cannot be opened")
    for mode in ("mode=ro", "mode=ro&immutable=1"):  # the second for a run on a medium where nothing can be written
        db = sqlite3.connect(f"{file.resolve().as_uri()}?{mode}", uri=True, timeout=5, isolation_level=None)
        try:
            [(found,)] = db.execute("PRAGMA user_version")
            db.execute("SELECT 1 FROM series, field, tail, chunk, alarm, coverage, meta LIMIT 1")
        except sqlite3.OperationalError as error:
            empty = _is_empty(db)
            db.close()
            if empty:
                told = "nothing is recorded there yet; wait for the run's first flush"
                raise RunError(f"opening the run {folder}: {told}") from None
            last = error
            if file.with_name(file.name + "-wal").exists():
                break
        except sqlite3.Error as error:
            db.close()
            raise damaged(file, error) from error
        else:
            if found <= FORMAT:
                return Run(file, db)
            db.close()
            raise RunError(f"opening {file}: format {found}, this foreshock reads up to {FORMAT}; upgrade foreshock")
    raise damaged(file, last)


def _is_empty(db: sqlite3.Connection) -> bool:
    """Whether the writer has made the file and no more: it was killed there, or is at it."""
    try:
        return not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.Error:
        return False


def _why(folder: Path) -> str:
    if not folder.exists():
        return "there is no such folder; pass the one that was given to Watch(...), --run or FORESHOCK_RUN"
    inside = sorted(found.parent for found in folder.glob(f"*/{FILE}"))[:5]
    if inside:
        return f"it is no run itself, but holds some; pass one of {', '.join(str(run) for run in inside)}"
    return f"it holds no {FILE}; pass a folder that was given to Watch(...), or wait for the run's first flush"
