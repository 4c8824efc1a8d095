"""One step's readings folded into a row: a column for every trend at every site.

Values are in quarters of the trend's smallest change that matters (`EFFECT`), so that one number bounds every spread from below.
Shapes: N values of a sheet, M values taken (once for each trend that wants them), K folds, S columns.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from foreshock.monitors.detectors.sheet import Layout, Places, Sheet
from foreshock.monitors.policy import Trend
from foreshock.records import Array, Reading

EFFECT = 4.0  # sigma that the smallest change that matters counts as at most
LARGEST, SMALLEST = "max", "min"


class Columns:
    """``keys`` are the columns so far, (position of the trend, site) each; they are appended to and never move."""

    def __init__(self, trends: Sequence[Trend]) -> None:
        self.trends = tuple(trends)
        self.keys: list[tuple[int, str | None]] = []
        self._wanted: dict[str, list[int]] = {}
        for position, trend in enumerate(trends):
            self._wanted.setdefault(trend.metric, []).append(position)
        self._sheet, self._places = Sheet(self._wanted), Places()
        self._arrange(Layout(()))

    def wants(self, metric: str) -> bool:
        """Whether a trend is judged of this metric."""
        return metric in self._wanted

    def row(self, readings: Sequence[Reading]) -> tuple[Array, Array, Array]:
        """Values in the trend's unit, raw values (NaN: none), and the worst head or expert (-1: none), each ``[S]``."""
        layout, values = self._sheet.read(readings)
        if layout is not self._layout:
            self._arrange(layout)
        x_M = values[self._take]
        finite_M = np.isfinite(x_M)
        folds = self._folds
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = folds.each(np.add, np.where(finite_M, x_M, 0.0)) / folds.each(np.add, finite_M.astype(float))
            largest = folds.each(np.maximum, np.where(finite_M, x_M, -np.inf))
            smallest = folds.each(np.minimum, np.where(finite_M, x_M, np.inf))
            raw_K = np.select([self._fold == LARGEST, self._fold == SMALLEST], [largest, smallest], mean)
            raw_K = np.where(np.isfinite(raw_K), raw_K, np.nan)
            scaled_K = np.where(self._log, np.log(np.where(raw_K > 0, raw_K, np.nan)), raw_K)
        worst_K = folds.first(x_M == np.where(self._down, smallest, largest)[folds.owner_N])
        rows = np.full((3, len(self.keys)), np.nan)
        rows[:, self._columns] = scaled_K * self.units()[self._columns], raw_K, worst_K
        rows[2, self._columns] = np.where(np.isfinite(raw_K) & (folds.lengths_R > 1), worst_K, np.nan)
        return rows[0], rows[1], np.nan_to_num(rows[2], nan=-1).astype(int)

    def units(self) -> Array:
        """What a value on the trend's scale is multiplied by, ``[S]``."""
        return np.array([EFFECT / trend.effect for trend in self.trends])[self.positions()]

    def paced(self) -> Array:
        """Units of the columns that follow the learning rate, 0 for the others, ``[S]``."""
        follow = np.array([trend.follows_rate for trend in self.trends], dtype=float)
        return follow[self.positions()] * self.units()

    def positions(self) -> Array:
        """The trend of each column, ``[S]``."""
        return np.array([position for position, _ in self.keys], dtype=np.int64)

    def sides(self) -> Array:
        """bool ``[2, S]``: which of up and down is judged."""
        judged = np.array([[side in trend.directions for side in (+1, -1)] for trend in self.trends], dtype=bool)
        return judged.reshape(-1, 2)[self.positions()].T

    def _arrange(self, layout: Layout) -> None:
        self._layout = layout
        pairs = [(row, position) for row, (metric, _) in enumerate(layout.keys) for position in self._wanted[metric]]
        rows = [row for row, _ in pairs]
        self._folds = Layout([(*layout.keys[row], int(layout.lengths_R[row])) for row in rows])
        self._take = layout.places([layout.keys[row] for row in rows], self._folds.lengths_R)
        self._columns = self._places.of([(position, layout.keys[row][1]) for row, position in pairs], [1] * len(pairs))
        self.keys = [_column(key) for key in self._places.keys]
        trends = [self.trends[position] for _, position in pairs]
        self._fold = np.array([trend.fold for trend in trends], dtype=object)
        self._log = np.array([trend.scale == "log" for trend in trends], dtype=bool)
        self._down = np.array([trend.directions == (-1,) for trend in trends], dtype=bool)

    def state_dict(self) -> list[list[Hashable]]:
        return self._places.state_dict()

    def load_state_dict(self, state: Sequence[Sequence[Hashable]]) -> None:
        self._places.load_state_dict(state)
        self._arrange(Layout(()))


def _column(key: tuple[Hashable, ...]) -> tuple[int, str | None]:
    position, site, _ = key
    return int(str(position)), None if site is None else str(site)


def fold(trend: Trend, values: Array) -> Array:
    """A recorded series ``[n]`` or ``[n, heads]`` as a column has it, ``[n]``."""
    rows = np.asarray(values, dtype=float).reshape(len(values), -1)
    return Columns((trend,)).row([Reading(trend.metric, str(number), row) for number, row in enumerate(rows)])[0]
