"""The bands and floors of a report are what the run was judged by."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from foreshock.monitors.detectors import Drift
from foreshock.monitors.report_limits import bands
from foreshock.reader import open_run
from foreshock.records import Reading
from foreshock.rejudge import rejudge
from foreshock.store import RunStore

ROUTER, OWN = "router/entropy_norm", "router/conditioning"
FAULT = 800


def run(folder: Path, fault: bool) -> RunStore:
    """A router sampled every ten steps, whose entropy falls from `FAULT` on; its weights are read three steps after."""
    store, rng = RunStore(folder), np.random.default_rng(0)
    for step in range(0, 1500, 10):
        fall = 0.4 * min(max(step - FAULT, 0) / 200, 1) * fault
        readings = [
            Reading(ROUTER, "r", np.array([0.9 - fall + 0.002 * rng.normal()])),
            Reading("optim/lr", None, np.array([1e-3])),
        ]
        store.write(step, [*readings, Reading(OWN, "r", np.array([5.0 + 0.02 * rng.normal()]))])
        store.write(step + 3, [Reading("run/loss", None, np.array([2.0 + 0.01 * rng.normal()]))])
    store.flush()
    return store


def test_a_healthy_series_stays_in_its_band(tmp_path: Path) -> None:
    store = run(tmp_path, fault=False)
    with open_run(tmp_path) as opened:
        found = bands(opened)
        for metric, site in ((ROUTER, "r"), (OWN, "r"), ("run/loss", None)):
            one = found[metric, site]
            steps, values = opened.column(metric, site)
            at = np.searchsorted(steps, one.steps, side="right") - 1
            known = np.isfinite(one.low)
            assert known.sum() > 80
            inside = (one.low <= values[at, 0]) & (values[at, 0] <= one.high)
            assert inside[known].mean() > 0.97
    store.close()


def test_the_band_ends_where_the_series_is_judged_out(tmp_path: Path) -> None:
    store = run(tmp_path, fault=True)
    with open_run(tmp_path) as opened:
        one = bands(opened)[ROUTER, "r"]
        heard = min(alarm.step for alarm in rejudge(opened) if alarm.site == "r")
    store.close()
    before = one.steps < FAULT
    assert np.isfinite(one.low[before][-20:]).all()
    ended = one.steps[np.isnan(one.low) & (one.steps > FAULT)][0]
    assert FAULT < ended <= heard + 10
    last = np.flatnonzero(np.isfinite(one.low) & (one.steps < ended))[-1]
    assert one.low[last] > 0.75, "it has not followed the fall"


def test_the_band_is_what_an_alarm_says_was_expected(tmp_path: Path) -> None:
    store = run(tmp_path, fault=True)
    with open_run(tmp_path) as opened:
        one = bands(opened)[ROUTER, "r"]
        drift, told = Drift(), {}
        for step in range(0, 1500, 10):
            readings = [
                Reading(metric, site, opened.column(metric, site)[1][step // 10])
                for metric, site in ((ROUTER, "r"), ("optim/lr", None))
            ]
            found = [finding for finding in drift.update(step, readings, {}) if finding.metric == ROUTER]
            told.update((step, float(finding.expected.split()[1])) for finding in found)
    store.close()
    middle = dict(zip(one.steps.tolist(), (one.low + one.high) / 2, strict=True))
    compared = [step for step in told if np.isfinite(middle[step])]
    assert compared
    np.testing.assert_allclose([middle[step] for step in compared], [told[step] for step in compared], rtol=2e-3)
