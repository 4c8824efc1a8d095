"""A disk that refuses to be written, for as long as a test says."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


class Refusing:
    """An open file of which every write is refused while ``error`` is set."""

    error: sqlite3.Error | None = None

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        if self.error is not None and not sql.lstrip().startswith(("SELECT", "ROLLBACK")):
            raise self.error
        return self._db.execute(sql, *values)

    def backup(self, other: Refusing) -> None:
        self._db.backup(other._db)


@contextmanager
def refusing() -> Iterator[type[Refusing]]:
    """Files that are opened to be written are `Refusing`; of a locked one 50 ms are waited for."""
    connect = sqlite3.connect

    def connected(path: object, **options: object) -> object:
        db = connect(path, **options)  # type: ignore[call-overload]
        if "uri" in options:
            return db
        db.execute("PRAGMA busy_timeout = 50")
        return Refusing(db)

    with mock.patch("foreshock.store.sqlite3.connect", connected):
        yield Refusing
    Refusing.error = None
