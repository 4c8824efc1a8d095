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
from foreshock.monitors.sinks.tally import COUNTS, Tally
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
    """One number for one curve. ``part`` is "min", "mean" or "max" over a vector, the index of one entry, "" for a metric that is
    one number, or one of the counts of a `Tally`, "nonfinite" or "missing"."""

    metric: str
    site: str | None
    part: str
    value: float

    @property
    def name(self) -> str:
        """``attention.entropy_norm/attention:layers.0/min``: dashboards make a group of what stands before the first slash.

        Counts are a group of their own, ``nonfinite/run/loss``: below the name of a number MLflow's files have no room for another.
        """
        if self.part in COUNTS:
            return "/".join((self.part, Point(self.metric, self.site, "", self.value).name))
        if self.site is None:
            return "/".join(filter(None, (self.metric, self.part)))
        return "/".join(filter(None, (self.metric.replace("/", "."), self.site, self.part)))


class Selection:
    """The series that ``metrics`` (globs over names, None: `DEFAULT` and whatever metric is the user's own) lets through.

    A vector becomes its folds: those that are judged, of others min, mean and max; ``each``: one point an entry instead. Folds are
    over the entries that are not NaN. Once a number of a series was not finite, its counts go out beside it (`Tally`).
    """

    def __init__(self, metrics: Sequence[str] | None = None, each: bool = False) -> None:
        if isinstance(metrics, str) or not all(isinstance(glob, str) for glob in metrics or ()):
            raise ConfigError(f"choosing metrics: got {metrics!r}; give a list of names or globs, as in ['law/*']")
        self.globs = None if metrics is None else tuple(metrics)
        self.each = each
        self._verdicts: dict[str, bool] = {}
        self._tally = Tally()

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

    def skip(self, readings: Sequence[Reading]) -> None:
        """These do not go out; what of them is not finite is counted all the same."""
        for reading in readings:
            if self.wants(reading.metric):
                self._tally.add(reading)

    def _points(self, reading: Reading) -> Iterator[Point]:
        metric, site, values = reading.metric, reading.site, reading.values
        if values.size == 1:
            yield Point(metric, site, "", float(values[0]))
        elif self.each:
            yield from (Point(metric, site, str(index), float(value)) for index, value in enumerate(values))
        else:
            yield from (Point(metric, site, fold, folded(fold, values)) for fold in JUDGED.get(metric, FOLDS))
        yield from (Point(metric, site, part, float(count)) for part, count in self._tally.add(reading).items())


def folded(fold: str, values: Array) -> float:
    """``fold`` ("min", "mean" or "max") over what of ``values`` is not NaN; NaN where that is nothing."""
    available = values[~np.isnan(values)]
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
