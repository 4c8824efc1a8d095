"""Which series leave for a dashboard, and as how many curves: by default what is judged, folded over heads as it is judged.

All of it would be a hundred metrics times sites times heads; that is in the run folder, and in a `JsonlSink`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from foreshock.errors import ConfigError, ForeshockError
from foreshock.monitors.metrics import metric as known
from foreshock.monitors.policy import LAWS, LIMITS, TRENDS
from foreshock.records import Array, Reading

FOLDS = ("min", "mean", "max")


def _judged() -> dict[str, tuple[str, ...]]:
    """Metric -> the folds over heads or experts that the judge looks at."""
    found: dict[str, list[str]] = {}
    for trend in TRENDS:
        found.setdefault(trend.metric, []).append(trend.fold)
    for name in (*(limit.metric for limit in LIMITS), *LAWS):
        found.setdefault(name, []).append("max")
    return {name: tuple(dict.fromkeys(folds)) for name, folds in found.items()} | {"law/bias_t": ("min", "max")}


JUDGED = _judged()
DEFAULT = (*JUDGED, "law/bias_site_t", "router/z", "optim/*", "run/*")


@dataclass(frozen=True, slots=True)
class Point:
    """One number for one curve. ``part`` is "min", "mean" or "max" over a vector, the index of one entry, "missing" for how many
    entries are NaN, or "" for a metric that is one number."""

    metric: str
    site: str | None
    part: str
    value: float

    @property
    def name(self) -> str:
        """``attention.entropy_norm/attention:layers.0/min``: dashboards make a group of what stands before the first slash."""
        if self.site is None:
            return "/".join(filter(None, (self.metric, self.part)))
        return "/".join(filter(None, (self.metric.replace("/", "."), self.site, self.part)))


class Selection:
    """The series that ``metrics`` (globs over names, None: `DEFAULT` and whatever metric is the user's own) lets through.

    A vector becomes its folds: those that are judged, of others min, mean and max; ``each``: one point an entry instead. NaN is
    "not available": folds are over the other entries, and "missing" counts it where it happens. Infinity stays what it is.
    """

    def __init__(self, metrics: Sequence[str] | None = None, each: bool = False) -> None:
        if isinstance(metrics, str) or not all(isinstance(glob, str) for glob in metrics or ()):
            raise ConfigError(f"choosing metrics: got {metrics!r}; give a list of names or globs, as in ['law/*']")
        self.globs = None if metrics is None else tuple(metrics)
        self.each = each
        self._verdicts: dict[str, bool] = {}
        self._missing: set[tuple[str, str | None]] = set()

    def wants(self, metric: str) -> bool:
        """Whether a series of this name goes out."""
        if metric not in self._verdicts:
            globs = DEFAULT if self.globs is None else self.globs
            chosen = any(fnmatchcase(metric, glob) for glob in globs)
            self._verdicts[metric] = chosen or (self.globs is None and _is_own(metric))
        return self._verdicts[metric]

    def points(self, readings: Sequence[Reading]) -> Iterator[Point]:
        """What of ``readings`` goes out, as single numbers."""
        for reading in readings:
            if self.wants(reading.metric):
                yield from self._points(reading)

    def _points(self, reading: Reading) -> Iterator[Point]:
        metric, site, values = reading.metric, reading.site, reading.values
        if values.size == 1:
            yield Point(metric, site, "", float(values[0]))
            return
        if self.each:
            yield from (Point(metric, site, str(index), float(value)) for index, value in enumerate(values))
            return
        available = values[~np.isnan(values)]
        for fold in JUDGED.get(metric, FOLDS):
            yield Point(metric, site, fold, _folded(fold, available))
        missing, key = values.size - available.size, (metric, site)
        if missing or key in self._missing:  # once it has happened, its end is told as well
            self._missing.add(key)
            yield Point(metric, site, "missing", float(missing))


def _folded(fold: str, available: Array) -> float:
    if not available.size:
        return float("nan")
    with np.errstate(invalid="ignore"):  # the mean of infinities of both signs
        return float(available.min() if fold == "min" else available.max() if fold == "max" else available.mean())


def _is_own(metric: str) -> bool:
    """Whether nobody has told foreshock what it is: a user's own."""
    try:
        known(metric)
    except ForeshockError:
        return True
    return False
