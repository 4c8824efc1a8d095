"""Readings and alarms as lines of JSON, for whatever reads a text file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from foreshock.monitors.sinks.queued import QueuedSink
from foreshock.monitors.sinks.selection import Selection
from foreshock.records import Alarm, Reading


class JsonlSink(QueuedSink):
    """One line a reading, ``{"step", "metric", "site", "values"}``, and one an alarm, ``{"step", "alarm": {...}}``.

    Lines are added to what the file holds, and flushed a step. Vectors are whole; JSON has no NaN and no infinity, which
    become their names ("nan", "inf", "-inf"). ``metrics``: globs, None is every metric.
    """

    def __init__(
        self, path: str | os.PathLike[str] = "foreshock.jsonl", *, metrics: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.selection = Selection(["*"] if metrics is None else metrics)
        self._file: IO[str] | None = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+", encoding="utf-8")
        if self._file.tell() and _last_byte(self.path) != b"\n":  # a process died in the middle of a line
            self._file.write("\n")

    def _send(self, step: int, readings: Sequence[Reading]) -> None:
        self._write(
            {"step": step, "metric": r.metric, "site": r.site, "values": r.values.tolist()}
            for r in readings
            if self.selection.wants(r.metric)
        )

    def _tell(self, alarm: Alarm) -> None:
        self._write([{"step": alarm.step, "alarm": alarm.to_json()}])

    def _write(self, entries: Any) -> None:
        assert self._file is not None
        self._file.writelines(json.dumps(named(entry), default=str, allow_nan=False) + "\n" for entry in entries)
        self._file.flush()

    def _finish(self) -> None:
        if self._file is not None:
            self._file.close()

    def __str__(self) -> str:
        return f"JsonlSink({str(self.path)!r})"


def named(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by its name."""
    if isinstance(value, dict):
        return {key: named(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [named(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
