"""What is measured and judged: metrics, weight monitors, laws, detectors, diagnosis and sinks."""

from __future__ import annotations

from foreshock.monitors.budget import Budget
from foreshock.monitors.detectors import (
    Cusum,
    Drift,
    Extrapolation,
    Forecast,
    LawTest,
    Limits,
    NonFinite,
    PageHinkley,
    QuantileBand,
    RobustZ,
    SeriesTest,
)
from foreshock.monitors.finding import Detector, Finding, Monitor
from foreshock.monitors.judge import Judge
from foreshock.monitors.laws import BiasLaw, floor
from foreshock.monitors.metrics import METRICS, Metric, family, metric, register_metrics
from foreshock.monitors.policy import Limit, Trend
from foreshock.monitors.sinks import ConsoleSink, Sink, receivers
from foreshock.monitors.spectra import Spectra
from foreshock.monitors.weights import RouterWeights, SharedRouterWeights
from foreshock.records import Probe, Reading

__all__ = [
    "METRICS",
    "BiasLaw",
    "Budget",
    "ConsoleSink",
    "Cusum",
    "Detector",
    "Drift",
    "Extrapolation",
    "Finding",
    "Forecast",
    "Judge",
    "LawTest",
    "Limit",
    "Limits",
    "Metric",
    "Monitor",
    "NonFinite",
    "PageHinkley",
    "Probe",
    "QuantileBand",
    "Reading",
    "RobustZ",
    "RouterWeights",
    "SeriesTest",
    "SharedRouterWeights",
    "Sink",
    "Spectra",
    "Trend",
    "family",
    "floor",
    "metric",
    "receivers",
    "register_metrics",
]
