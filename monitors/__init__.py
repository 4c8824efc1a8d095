"""What is measured and judged: metrics, weight monitors, laws, detectors, diagnosis and sinks."""

from __future__ import annotations

from foreshock.monitors.finding import Detector, Finding, Monitor
from foreshock.monitors.judge import Judge
from foreshock.monitors.laws import BiasLaw, floor
from foreshock.monitors.metrics import METRICS, Metric, family, metric
from foreshock.monitors.sinks import ConsoleSink, Sink
from foreshock.monitors.spectra import Spectra
from foreshock.monitors.weights import RouterWeights

__all__ = [
    "METRICS",
    "BiasLaw",
    "ConsoleSink",
    "Detector",
    "Finding",
    "Judge",
    "Metric",
    "Monitor",
    "RouterWeights",
    "Sink",
    "Spectra",
    "family",
    "floor",
    "metric",
]
