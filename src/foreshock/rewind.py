"""What becomes of an earlier run's records in a folder that is written again: discarded from a step on, or set aside."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
from pathlib import Path

from foreshock.tables import FILE, chunks, pack, pack_steps, unpack_steps

EARLIER = "earlier-"


def holds_steps(file: Path) -> bool:
    """Whether ``file`` is a run with anything recorded; one that cannot be read holds nothing that could be lost."""
    if not file.is_file():
        return False
    try:
        db = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=5)
        try:
            return db.execute("SELECT 1 FROM tail UNION ALL SELECT 1 FROM chunk LIMIT 1").fetchone() is not None
        finally:
            db.close()
    except sqlite3.Error:
        return False


def set_aside(db: sqlite3.Connection, folder: Path) -> Path:
    """Copy the whole run to ``folder/earlier-N``, complete or not at all, whoever else reads it; the new folder."""
    aside = next(path for n in itertools.count(1) if not (path := folder / f"{EARLIER}{n}" / FILE).exists())
    aside.parent.mkdir(exist_ok=True)
    part = aside.with_suffix(".part")
    part.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(part),))
    os.replace(part, aside)
    return aside.parent


def discard(db: sqlite3.Connection, start: int) -> None:
    """Delete what was recorded at ``start`` and later, alarms too, in the transaction under way. The tail must be empty.

    From step 0 on it is all of a run, with its ledger.
    """
    reach = [id_ for id_, steps in db.execute("SELECT id, steps FROM chunk") if unpack_steps([steps])[0].max() >= start]
    for id_ in reach:
        [(steps, data)] = db.execute("SELECT steps, data FROM chunk WHERE id = ?", (id_,))
        [(own, values)] = chunks([steps], [data])
        kept = own < start
        if kept.any():
            row = (pack_steps(own[kept]), pack(values[kept]), id_)
            db.execute("UPDATE chunk SET steps = ?, data = ? WHERE id = ?", row)
        else:
            db.execute("DELETE FROM chunk WHERE id = ?", (id_,))
    late = [id_ for id_, text in db.execute("SELECT id, value FROM alarm") if json.loads(text)["step"] >= start]
    db.executemany("DELETE FROM alarm WHERE id = ?", [(id_,) for id_ in late])
    for table in ("field", "coverage", "meta") if start == 0 else ("field",):
        db.execute(f"DELETE FROM {table}")
    db.execute("DELETE FROM series WHERE id NOT IN (SELECT series FROM chunk)")
