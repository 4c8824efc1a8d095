"""The band that healthy reference runs keep to, at the same step or the same token count.

Shapes: P places of a common grid, S series, W samples of a window, N of a curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foreshock.monitors.detectors.forecast import quantile
from foreshock.records import Array

GRID = 512  # places at most: healthy curves bend slowly
WINDOW = 15  # samples around a place, of each run, that show its noise; between runs they show the seeds' own spread
SIGMA = (0.1587, 0.8413)  # the quantiles one standard deviation from a normal median

Curve = tuple[Array, Array]  # places, rising, and values, each [N]


class QuantileBand:
    """The `Baseline` of S series: the median of the references around a place, and the distance of its band's farther edge.

    ``grid`` holds the places; ``add`` appends a series. ``least`` is the smallest spread. ``place`` says where the run stands
    (None: at its step). Nothing is expected outside the references, and nothing is learned.
    """

    def __init__(self, grid_P: Array, least: float = 0.0) -> None:
        self.grid, self.least = np.asarray(grid_P, dtype=float), least
        self.place: float | None = None
        self._middle = np.empty((len(self.grid), 0))
        self._spread = np.empty((len(self.grid), 0))

    def add(self, series: Sequence[Sequence[Curve]]) -> None:
        """Append series, each with its curve in every run that has it."""
        bands = [band(self.grid, curves) for curves in series]
        if bands:
            middle, spread = (np.stack(parts, axis=1) for parts in zip(*bands, strict=True))
            self._middle, self._spread = np.hstack([self._middle, middle]), np.hstack([self._spread, spread])

    def expect(self, step: int, series: int) -> tuple[Array, Array]:
        """Middle and spread, ``[S]``, between the two places of the grid around this one."""
        place = float(step) if self.place is None else self.place
        nothing = np.full(series, np.nan)
        if not len(self.grid) or not self.grid[0] <= place <= self.grid[-1]:
            return nothing, nothing
        right = int(np.clip(np.searchsorted(self.grid, place), 1, len(self.grid) - 1)) if len(self.grid) > 1 else 0
        left = max(right - 1, 0)
        share = (place - self.grid[left]) / (self.grid[right] - self.grid[left]) if right > left else 0.0
        found = [_between(rows[left], rows[right], share) for rows in (self._middle, self._spread)]
        middle, spread = (np.concatenate([x[:series], nothing[: max(series - len(x), 0)]]) for x in found)
        return middle, np.fmax(spread, self.least)

    def learn(self, step: int, x_S: Array, calm_S: Array) -> None:
        """The references alone say what is healthy."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of the running run is in it."""


def _between(left_S: Array, right_S: Array, share: float) -> Array:
    """Linear between two rows; a row alone counts where the place is exactly there."""
    if share in (0.0, 1.0):
        return right_S if share else left_S
    return np.asarray(left_S + share * (right_S - left_S))


def band(grid_P: Array, curves: Sequence[Curve]) -> tuple[Array, Array]:
    """Middle and spread of one series at every place, ``[P]``; NaN where no run is."""
    parts = [np.full((0, len(grid_P)), np.nan)]
    for places, values in curves:
        if len(places) < 2:
            continue
        width = min(WINDOW, len(places))
        start = np.clip(np.searchsorted(places, grid_P) - width // 2, 0, len(places) - width)
        near_WP = values[start + np.arange(width)[:, None]]
        parts.append(np.where((places[0] <= grid_P) & (grid_P <= places[-1]), near_WP, np.nan))
    near = np.concatenate(parts)
    low, middle, high = (quantile(near, share) for share in (SIGMA[0], 0.5, SIGMA[1]))
    return middle, np.fmax(high - middle, middle - low)


def common_grid(runs: Sequence[Array]) -> Array:
    """Places of several curves as one grid: at most `GRID` of the densest run's, and both ends of each."""
    runs = [places for places in runs if len(places)]
    if not runs:
        return np.empty(0)
    densest = max(runs, key=len)
    kept = densest[np.unique(np.linspace(0, len(densest) - 1, GRID).round().astype(int))]
    return np.unique(np.concatenate([kept, *(places[[0, -1]] for places in runs)]))
