"""The readings of one step as one flat array, with the way back: laid out once, for as long as the same series come.

Shapes: N values, R readings, of which none is empty.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence

import numpy as np

from foreshock.records import Array, Reading

Key = tuple[str, str | None]  # metric, site


class Layout:
    """Where each reading's values lie in the flat array."""

    def __init__(self, shape: Sequence[tuple[str, str | None, int]]) -> None:
        self.keys: list[Key] = [(metric, site) for metric, site, _ in shape]
        self.row = {key: row for row, key in enumerate(self.keys)}
        self.lengths_R = np.array([length for _, _, length in shape], dtype=np.int64)
        self.starts_R = np.cumsum(self.lengths_R) - self.lengths_R
        self.owner_N = np.repeat(np.arange(len(shape)), self.lengths_R)
        self.offset_N = np.arange(len(self.owner_N)) - self.starts_R[self.owner_N]

    def each(self, combine: np.ufunc, x_N: Array) -> Array:
        """``combine`` over each reading's values, ``[R]``."""
        return np.asarray(combine.reduceat(x_N, self.starts_R) if len(self.keys) else x_N[:0])

    def first(self, mask_N: Array) -> Array:
        """The place within each reading of its first True, ``[R]``; its length where there is none."""
        return self.each(np.minimum, np.where(mask_N, self.offset_N, self.lengths_R[self.owner_N]))

    def places(self, keys: Sequence[Key], lengths: Array) -> Array:
        """Where the values of each key in turn lie, as many as ``lengths`` asks: one past the end for a key that is not here.

        A key with fewer values gives its last one again: a scalar serves every head.
        """
        rows = np.array([self.row.get(key, len(self.keys)) for key in keys], dtype=np.int64)
        asked = np.repeat(np.arange(len(keys)), lengths)
        offset = np.arange(len(asked)) - (np.cumsum(lengths) - lengths)[asked]
        starts, widths = np.append(self.starts_R, len(self.owner_N))[rows], np.append(self.lengths_R, 1)[rows]
        return np.asarray(starts[asked] + np.minimum(offset, widths[asked] - 1))

    def span(self, row: int) -> slice:
        """Of the flat array, one reading's values."""
        return slice(int(self.starts_R[row]), int(self.starts_R[row] + self.lengths_R[row]))

    def chosen(self, keys: Sequence[Key]) -> Layout:
        """These readings alone, in this order."""
        return Layout([(*key, int(self.lengths_R[self.row[key]])) for key in keys])

    def index(self, row: int, offset: int) -> int | None:
        """A head or expert as findings name it: a scalar has none."""
        return int(offset) if self.lengths_R[row] > 1 else None


class Sheet:
    """Lays out the readings of ``metrics``, in the order in which they come."""

    def __init__(self, metrics: Collection[str]) -> None:
        self.metrics = frozenset(metrics)
        self._shape: list[tuple[str, str | None, int]] = []
        self._layout = Layout(())

    def read(self, readings: Sequence[Reading]) -> tuple[Layout, Array]:
        """The layout, the same object as long as nothing changed, and the values ``[N]``."""
        chosen = [reading for reading in readings if reading.metric in self.metrics and len(reading.values)]
        shape = [(reading.metric, reading.site, len(reading.values)) for reading in chosen]
        if shape != self._shape:
            self._shape, self._layout = shape, Layout(shape)
        values = [reading.values for reading in chosen]
        return self._layout, np.concatenate(values, dtype=float) if values else np.empty(0)


class Places:
    """Gives every key a run of columns that it keeps."""

    def __init__(self) -> None:
        self.size = 0
        self.keys: list[tuple[Hashable, ...]] = []  # each with the number of its columns at the end
        self._start: dict[tuple[Hashable, ...], int] = {}

    def of(self, keys: Iterable[tuple[Hashable, ...]], lengths: Iterable[int]) -> Array:
        """The columns of each key in turn, all in one array; keys that were not met before get new ones at the end."""
        found = [
            self._begin((*key, int(length))) + np.arange(length) for key, length in zip(keys, lengths, strict=True)
        ]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _begin(self, key: tuple[Hashable, ...]) -> int:
        if key not in self._start:
            self._start[key] = self.size
            self.keys.append(key)
            self.size += int(key[-1])  # type: ignore[call-overload]
        return self._start[key]

    def state_dict(self) -> list[list[Hashable]]:
        return [list(key) for key in self.keys]

    def load_state_dict(self, state: Sequence[Sequence[Hashable]]) -> None:
        self.size, self.keys, self._start = 0, [], {}
        for key in state:
            self._begin(tuple(key))
