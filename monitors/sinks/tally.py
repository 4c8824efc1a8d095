"""How many numbers of each series were not finite so far. A dashboard overwrites values; a count that only grows it cannot lose.

Infinity is a fault wherever it stands, NaN only where a number must be finite; elsewhere NaN is "not available" (docs/metrics.md).
"""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np

from foreshock.monitors.compare import WHOLE
from foreshock.monitors.policy import FINITE
from foreshock.records import Reading

NONFINITE, MISSING = COUNTS = "nonfinite", "missing"


class Tally:
    """Counts from the start of the process: "nonfinite" is faults, "missing" what was not available."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, str | None], Counter[str]] = {}
        self._lock = threading.Lock()  # a sink's own thread counts what it sends, training's what is left out

    def add(self, reading: Reading) -> dict[str, int]:
        """Count ``reading`` in; what was counted of its series so far, empty as long as all of it was finite."""
        key, values = (reading.metric, reading.site), reading.values
        finite = int(np.count_nonzero(np.isfinite(values)))
        with self._lock:
            if finite == values.size:
                return dict(self._counted.get(key, {}))
            infinite = int(np.count_nonzero(np.isinf(values)))
            broken = reading.metric.startswith(WHOLE) or reading.metric in FINITE
            missing = 0 if broken else values.size - finite - infinite
            counted = self._counted.setdefault(key, Counter())
            counted += Counter({NONFINITE: values.size - finite - missing, MISSING: missing})
            return dict(counted)
