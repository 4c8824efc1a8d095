"""Detectors: what the judge asks of one step's readings, and the tests of series that they are made of.

An adapter has ``update(step, readings, sites) -> list[Finding]``; a test of series, `SeriesTest`, sees columns of numbers.
"""

from __future__ import annotations

from foreshock.monitors.detectors.bound import Bound
from foreshock.monitors.detectors.contract import Baseline, SeriesTest
from foreshock.monitors.detectors.cusum import Cusum
from foreshock.monitors.detectors.drift import Drift
from foreshock.monitors.detectors.extrapolation import Extrapolation
from foreshock.monitors.detectors.floors import Floors
from foreshock.monitors.detectors.forecast import Forecast
from foreshock.monitors.detectors.law_test import LawTest
from foreshock.monitors.detectors.limits import Limits
from foreshock.monitors.detectors.moves import Moves
from foreshock.monitors.detectors.nonfinite import NonFinite
from foreshock.monitors.detectors.page_hinkley import PageHinkley
from foreshock.monitors.detectors.quantile_band import QuantileBand
from foreshock.monitors.detectors.reach import Reach
from foreshock.monitors.detectors.robust_z import RobustZ

__all__ = [
    "Baseline",
    "Bound",
    "Cusum",
    "Drift",
    "Extrapolation",
    "Floors",
    "Forecast",
    "LawTest",
    "Limits",
    "Moves",
    "NonFinite",
    "PageHinkley",
    "QuantileBand",
    "Reach",
    "RobustZ",
    "SeriesTest",
]
