"""The curves of recorded healthy runs, by step or by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from foreshock.errors import ConfigError
from foreshock.monitors.detectors.columns import fold
from foreshock.monitors.detectors.quantile_band import Curve, common_grid
from foreshock.monitors.policy import Trend
from foreshock.records import Array

ALIGNMENTS = ("step", "tokens")
TOKENS = "run/tokens"  # what was trained on so far: `watch.log(tokens=...)`
NO_CURVE = (np.empty(0), np.empty(0))


class Run(Protocol):
    """A recorded run."""

    def series(self, metric: str, site: str | None = None) -> tuple[Array, Array]:
        """Steps ``[n]`` and values ``[n]`` or ``[n, heads]``."""
        ...


class References:
    """``align`` is "step" or "tokens"; raises ConfigError for another. By tokens, a run that counted none is left out."""

    def __init__(self, runs: Sequence[Run], align: str = "step") -> None:
        if align not in ALIGNMENTS:
            raise ConfigError(f"aligning references: by {' or '.join(ALIGNMENTS)}, got {align!r}")
        self.align = align
        clocks = [_tokens(run) if align == "tokens" else None for run in runs]
        self._runs = [
            (run, clock) for run, clock in zip(runs, clocks, strict=True) if clock is None or len(clock[0]) > 1
        ]

    def __bool__(self) -> bool:
        return bool(self._runs)

    def grid(self, curves: Sequence[Sequence[Curve]]) -> Array:
        """One grid for these series."""
        return common_grid([places for series in curves for places, _ in series])

    def curves(self, trend: Trend, site: str | None) -> list[Curve]:
        """Of every run that has the series, where it was recorded and what it was, in the trend's unit."""
        found = [_curve(run, clock, trend, site) for run, clock in self._runs]
        return [curve for curve in found if len(curve[0]) > 1]


def _curve(run: Run, clock: Curve | None, trend: Trend, site: str | None) -> Curve:
    try:
        steps, values = run.series(trend.metric, site)
    except (KeyError, ConfigError):
        return NO_CURVE
    places, folded = np.asarray(steps, dtype=float), fold(trend, values)
    if clock is not None:
        places = np.interp(places, *clock, left=np.nan, right=np.nan)
    kept = np.isfinite(folded) & np.isfinite(places)
    return places[kept], folded[kept]


def _tokens(run: Run) -> Curve:
    """Steps at which the count of tokens rose, and the count."""
    try:
        steps, counts = run.series(TOKENS)
    except (KeyError, ConfigError):
        return NO_CURVE
    counts = np.asarray(counts, dtype=float)
    rising = np.isfinite(counts) & (counts > np.concatenate([[-np.inf], np.fmax.accumulate(counts)[:-1]]))
    return np.asarray(steps, dtype=float)[rising], counts[rising]
