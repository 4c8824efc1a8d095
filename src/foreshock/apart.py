"""Which rank stands apart: where a series is judged and no law is broken, whether one rank alone makes it what it is.

With each flush a rank tells, of every judged series that it measures by itself, how far its own reading is from where the ranks'
readings were on average at the flush before: the square in the vector that is added, the size with its rank in the one that is
compared. No rank sees another's reading, but all see the sum of squares and whose part of it is the largest. One rank's part may be
most of it by chance; of the last `WINDOW` flushes together it is not. Two ranks differ by as much from what is between them, and
neither is named.

A series is judged folded (`Trend`), and so is told: a number or two a site and trend, whatever its heads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from foreshock.monitors.policy import TRENDS, Trend
from foreshock.records import Array

OWN = "apart"  # what is told, among the quantities of a site
LOSS = "run/loss"  # the one number of the user's own that is judged
OF_LOSS = next(trend for trend in TRENDS if trend.metric == LOSS)
WINDOW = 16  # flushes
LEAST = 3  # ranks
MOST = 0.5  # of the sum of squares, that one rank has where it is named
_FOLDS: Mapping[str, Callable[[Array], Any]] = {"mean": np.nanmean, "max": np.nanmax, "min": np.nanmin}

Where = tuple[str | None, int]  # a site in the run, and number of the shard


def trends_of(metrics: Mapping[str, Array]) -> list[Trend]:
    """The judged series among what a rank measured at a site, in a fixed order."""
    return [trend for trend in TRENDS if trend.metric in metrics]


def folded(trend: Trend, values: Array) -> float:
    """A reading as one number on the trend's scale; NaN where it has none."""
    finite = values[np.isfinite(values)]
    number = float(_FOLDS[trend.fold](finite)) if len(finite) else np.nan
    if trend.scale == "log":
        return float(np.log(number)) if number > 0 else np.nan
    return number


class Apart:
    """``tell`` on each rank, ``hear`` on all with the same numbers; then `rank` says the same everywhere."""

    def __init__(self) -> None:
        self._centres: dict[Where, Array] = {}  # of the ranks' readings, at the flush before
        self._heard: dict[tuple[str, str | None], deque[tuple[float, float, int]]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Where the ranks were, and who stood how far from there."""
        return {
            "centres": [[*where, values.tolist()] for where, values in self._centres.items()],
            "heard": [[*key, [list(one) for one in kept]] for key, kept in self._heard.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, among as many ranks."""
        self._centres = {(site, number): np.array(values, float) for site, number, values in state["centres"]}
        self._heard = {(m, site): deque(map(tuple, kept), maxlen=WINDOW) for m, site, kept in state["heard"]}

    def forget(self) -> None:
        """Ranks have other numbers from now on."""
        self._heard.clear()

    def tell(self, where: Where, own: Array) -> tuple[Array, Array]:
        """For the vector that is added ``[3 n]``, and for the one that is compared ``[n]``: of ``own`` readings ``[n]``, folded."""
        centre = self._centres.get(where, np.full(len(own), np.nan))
        distance = np.abs(own - centre) if len(centre) == len(own) else np.full(len(own), np.nan)
        known = np.isfinite(own)
        square = np.where(np.isfinite(distance), distance, 0.0) ** 2
        return np.concatenate([np.where(known, own, 0.0), known, square]), np.where(
            np.isfinite(distance), distance, np.nan
        )

    def hear(self, where: Where, metrics: Sequence[str], sums: Array, far: Array, ranks: Array) -> None:
        """What all told: ``sums`` as `tell` made them, the largest distances and whose they are; ``metrics`` of each."""
        if len(metrics) != len(far):
            return  # a probe failed on this rank
        total, many, squares = sums.reshape(3, -1)
        with np.errstate(invalid="ignore"):
            self._centres[where] = np.where(many > 0, total / many, np.nan)
        for metric, count, square, distance, rank in zip(metrics, many, squares, far, ranks, strict=True):
            if count >= LEAST and square > 0 and np.isfinite(distance):
                kept = self._heard.setdefault((metric, where[0]), deque(maxlen=WINDOW))
                kept.append((float(square), float(distance) ** 2, int(rank)))

    def rank(self, metric: str, site: str | None) -> int | None:
        """The one rank that has most of the squares of this series of late, if there is one. Of a series that ranks do not measure
        each by itself (weights), the one that stands apart in others at the site or in the loss, if these name no second one."""
        if (metric, site) in self._heard:
            return self._alone(metric, site)
        beside = {self._alone(*key) for key in self._heard if key[1] == site or key == (LOSS, None)} - {None}
        return beside.pop() if len(beside) == 1 else None

    def _alone(self, metric: str, site: str | None) -> int | None:
        kept = self._heard[metric, site]
        if len(kept) < WINDOW // 2:
            return None
        own: dict[int, float] = {}
        for _, largest, rank in kept:
            own[rank] = own.get(rank, 0.0) + largest
        first = max(own, key=own.__getitem__)
        return first if own[first] > MOST * sum(square for square, _, _ in kept) else None
