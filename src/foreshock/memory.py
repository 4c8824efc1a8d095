"""What a watch without a run folder keeps, and one for which another rank writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from foreshock.pending import Key, Pending
from foreshock.records import Alarm, Array, Coverage, Reading
from foreshock.series import Queries, Steps, Values, join

RECENT_BYTES = 2**24  # 16 MiB: of eight ranks of a machine 128 MiB


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

    def flush(self, now: bool = True) -> None:
        """Nothing to do."""

    def troubles(self) -> list[tuple[str, Exception]]:
        """None."""
        return []

    def close(self) -> None:
        """Nothing to do; the series stay readable."""

    def _keys(self) -> list[Key]:
        return list(self._data)

    def _column(self, metric: str, site: str | None) -> tuple[Steps, Values]:
        return join([(np.array([step], np.int64), values[None]) for step, values in self._data[metric, site]])


class RecentStore(MemoryStore):
    """The newest of it, up to `RECENT_BYTES`, as float32: what a rank keeps for which another one writes."""

    def __init__(self) -> None:
        self._recent = Pending()

    def write(self, step: int, readings: Sequence[Reading]) -> None:
        """Keep the readings of a step, and let the oldest steps go."""
        self._recent.add(step, readings)
        self._recent.trim(RECENT_BYTES)

    def rewind(self, step: int) -> None:
        """Forget what was written at ``step`` and later."""
        self._recent.rewind(step)

    def _keys(self) -> list[Key]:
        return self._recent.keys()

    def _column(self, metric: str, site: str | None) -> tuple[Steps, Values]:
        return join(self._recent.parts((metric, site)))
