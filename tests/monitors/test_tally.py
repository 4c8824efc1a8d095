"""What is not finite leaves a count that no later value hides; NaN is a fault only where a number must be finite."""

from __future__ import annotations

import math

import numpy as np
import pytest

from foreshock.monitors.sinks import PrometheusSink
from foreshock.monitors.sinks.selection import Selection
from foreshock.records import Reading


def of(selection: Selection, metric: str, *values: float) -> dict[str, float]:
    return {p.part: p.value for p in selection.points([Reading(metric, "a", np.array(values))])}


def test_counts_of_what_was_not_finite_stay() -> None:
    selection = Selection()
    assert of(selection, "law/hull", 1.0, 2.0) == {"max": 2.0}
    assert of(selection, "law/hull", 1.0, math.nan) == {"max": 1.0, "missing": 1.0}
    assert of(selection, "law/hull", 1.0, -math.inf) == {"max": 1.0, "missing": 1.0, "nonfinite": 1.0}
    assert of(selection, "law/hull", 1.0, 2.0) == {"max": 2.0, "missing": 1.0, "nonfinite": 1.0}
    assert math.isnan(of(selection, "law/hull", math.nan, math.nan)["max"])
    assert of(selection, "law/euler", 1.0) == {"": 1.0}


@pytest.mark.parametrize(
    ("metric", "counted"),
    [
        ("run/loss", {"nonfinite": 1.0}),
        ("optim/grad_norm", {"nonfinite": 1.0}),
        ("router/z", {"nonfinite": 1.0}),
        ("router/conditioning", {"missing": 1.0}),
        ("attention/delta2_effective_rank@50", {"missing": 1.0}),
        ("mine/number", {"missing": 1.0}),
    ],
)
def test_nan_is_a_fault_where_a_number_must_be_finite(metric: str, counted: dict[str, float]) -> None:
    found = of(Selection(), metric, math.nan)
    assert math.isnan(found.pop(""))
    assert found == counted


def test_what_was_not_finite_between_two_scrapes_is_still_counted() -> None:
    core = pytest.importorskip("prometheus_client.core")
    sink = PrometheusSink(0)
    for step, loss in enumerate((1.0, math.nan, 3.0)):
        sink.readings(step, [Reading("run/loss", None, np.array([loss]))])
    sink.close()
    found = {s.name: s.value for family in sink.collect() for s in family.samples}
    assert isinstance(next(iter(sink.collect())), core.GaugeMetricFamily)
    assert (found["foreshock_run_loss"], found["foreshock_nonfinite_total"]) == (3.0, 1.0)
