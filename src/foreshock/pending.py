"""Readings on their way to the disk: they can be read back meanwhile, and where it refuses them for long the oldest go first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foreshock.records import Array, Reading
from foreshock.series import Steps, Values

Key = tuple[str, str | None]
MOST_BYTES = 2**26  # kept while the disk refuses them
OVERHEAD = 300  # bytes that Python takes for one reading beside its numbers


def rounded(readings: Sequence[Reading]) -> list[Reading]:
    """The readings as the store keeps them, to float32: whoever judges the stored run later sees what the judge saw."""
    with np.errstate(over="ignore"):
        return [Reading(r.metric, r.site, r.values.astype(np.float32).astype(np.float64)) for r in readings]


class Pending:
    """``rows`` by step, in the order written, as float32; ``lost`` counts the steps that were dropped."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[Key, Array]] = {}
        self.lost = 0
        self._bytes = 0

    def add(self, step: int, readings: Sequence[Reading]) -> None:
        """A later reading of the same series and step wins."""
        row = self.rows.setdefault(int(step), {})
        with np.errstate(over="ignore"):
            for reading in readings:
                values = np.array(reading.values, "<f4").reshape(-1)
                if values.size:
                    known = row.get((reading.metric, reading.site))
                    self._bytes += values.nbytes - known.nbytes if known is not None else values.nbytes + OVERHEAD
                    row[reading.metric, reading.site] = values

    def trim(self, most: int | None = None) -> None:
        """Drop the oldest steps beyond ``most`` bytes, which are `MOST_BYTES` if not given; the newest stays."""
        while self._bytes > (MOST_BYTES if most is None else most) and len(self.rows) > 1:
            row = self.rows.pop(next(iter(self.rows)))
            self._bytes -= sum(values.nbytes + OVERHEAD for values in row.values())
            self.lost += 1

    def rewind(self, step: int) -> None:
        """Drop ``step`` and what comes later."""
        kept = {at: row for at, row in self.rows.items() if at < step}
        self._bytes -= sum(x.nbytes + OVERHEAD for at, row in self.rows.items() if at >= step for x in row.values())
        self.rows = kept

    def clear(self) -> None:
        self.rows, self._bytes = {}, 0

    def keys(self) -> list[Key]:
        return list(dict.fromkeys(key for row in self.rows.values() for key in row))

    def parts(self, key: Key) -> list[tuple[Steps, Values]]:
        """What waits of one series, for `series.join`."""
        held = [(step, row[key]) for step, row in self.rows.items() if key in row]
        return [(np.array([step], np.int64), values[None].astype(np.float64)) for step, values in held]
