"""What a framework's log is told between two of its entries: nothing that is not finite is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

import foreshock
from foreshock.integrations.entries import Entries
from foreshock.records import Reading

SITE = "attention:layers.0"


@pytest.fixture
def entries() -> Iterator[Entries]:
    with foreshock.Watch() as watch:
        yield Entries(watch, ["run/*", "law/*"])


def read(entries: Entries, metric: str, *samples: list[float]) -> dict[str, float | str]:
    """The entry after ``samples`` that came since the last."""
    site = None if metric.startswith("run/") else SITE
    for step, values in enumerate(samples):
        entries.readings(step, [Reading(metric, site, np.array(values))])
    return entries.latest()


def test_what_a_later_reading_overwrites_is_counted(entries: Entries) -> None:
    assert read(entries, "run/loss", [1.0], [2.0]) == {"foreshock/run/loss": 2.0}
    assert read(entries, "run/loss", [math.nan], [math.inf], [2.0]) == {
        "foreshock/run/loss": 2.0,
        "foreshock/nonfinite/run/loss": 2.0,
    }
    assert read(entries, "run/loss", [3.0])["foreshock/nonfinite/run/loss"] == 2.0
    assert entries.latest() == {}
    assert read(entries, "optim/grad_norm", [math.nan]) == {}  # of metrics that were not asked for nothing is told


def test_entries_of_a_vector_are_counted(entries: Entries) -> None:
    name = f"law/hull/{SITE}"
    assert read(entries, "law/hull", [1.0, math.nan], [1.0, -math.inf], [1.0, 2.0]) == {
        f"foreshock/{name}/mean": 1.5,
        f"foreshock/{name}/max": 2.0,
        f"foreshock/nonfinite/{name}": 1.0,
        f"foreshock/missing/{name}": 1.0,
    }
    found = read(entries, "law/hull", [math.nan, math.nan])
    assert all(math.isnan(found[f"foreshock/{name}/{fold}"]) for fold in ("mean", "max"))
    assert found[f"foreshock/missing/{name}"] == 3.0
    assert read(entries, "law/hull", [math.inf, -math.inf])[f"foreshock/{name}/max"] == math.inf
