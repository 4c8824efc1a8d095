"""The fault benchmark's arithmetic: peers' rules, clocks, scores, shares, targets and plans, each with a known answer."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, named
from clocks import damage, leaves_band
from outcome import Heard, Outcome
from peers import PEERS, Peer, adaptive, spike, turbulence, z_score
from plan import TIERS, plan
from recording import TWIN, Job
from scoring import FORESHOCK, score, score_all
from summary import Share, case_rows, detector_rows
from tables import all_tables
from targets import targets

ROOT = Path(__file__).parents[2]
STEPS = np.arange(400)


def hits(found: np.ndarray) -> list[int]:
    return np.flatnonzero(found).tolist()


def wave(length: int = 400) -> np.ndarray:
    """One and minus one in turn: mean 0, deviation 1 (a little more, of a sample)."""
    return np.where(np.arange(length) % 2, 1.0, -1.0)


def test_z_score_speaks_at_the_jump_and_not_before_half_a_window() -> None:
    values = wave()
    values[[10, 200, 300]] = 5.5, 5.5, -9.0
    assert hits(z_score(values, 5.0, 128)) == [200]
    assert hits(z_score(values, 6.0, 128)) == []
    assert hits(z_score(values, 5.0, 128, direction=-1)) == [300]
    assert hits(z_score(values, 5.0, 128, least=8)) == [10, 200]


def test_z_score_is_silent_on_a_constant_and_speaks_at_what_is_not_finite() -> None:
    values = np.ones(300)
    assert hits(z_score(values, 5.0, 128)) == []
    values[[50, 60]] = math.nan, math.inf
    assert hits(z_score(values, 5.0, 128)) == [50, 60]


def test_a_spike_is_ten_times_the_first_hundred() -> None:
    values = np.ones(300)
    values[[20, 150, 200, 250]] = 2.0, 19.9, 20.0, math.nan
    assert hits(spike(values, 10.0, 100)) == [200, 250]


def test_turbulence_is_a_fast_average_above_a_slow_one() -> None:
    values = np.where(STEPS < 300, 1.0, 2.0)
    # k steps after the jump the averages are 2 - 0.9^k and 2 - 0.99^k; at k = 1 they are 1.1 and 1.01
    assert hits(turbulence(values, 0.1, 0.01, 1.05, 200))[0] == 300
    assert hits(turbulence(values, 0.1, 0.01, 1.2, 200))[0] == 302, "1.271 / 1.0297 at k = 3, 1.19 / 1.0199 at k = 2"
    assert hits(turbulence(values, 0.1, 0.01, 1.05, 350)) == list(range(350, 400))


def test_adaptive_takes_a_spike_in_only_clipped() -> None:
    values = 2 + 0.1 * wave()
    values[[100, 102]] = 50.0, 50.0
    assert hits(adaptive(values, 2.5, 0.97, 25)) == [100, 102]


def test_alarms_close_together_are_one() -> None:
    peer = Peer("p", "loss", lambda values: values > 0, "")
    values = np.isin(STEPS, [10, 30, 70, 200, 251, 399]).astype(float)
    assert peer.alarms({"loss": (STEPS, values)}) == [10, 200, 251, 399]
    assert peer.alarms({}) == []


def test_damage_counts_from_the_start_of_the_run() -> None:
    twin = [2.0] * 300
    assert damage([*twin[:200], *[3.0] * 100], twin) == 201, "one step of fifty is exactly 0.02"
    assert damage(twin, twin) is None
    assert damage([*twin[:50], *[3.0] * 20, *twin[70:]], twin) is None


def test_the_band_is_left_where_the_smoothed_loss_stays_out() -> None:
    others = [[2.0 + 0.01 * seed] * 300 for seed in (-1, 0, 1)]
    assert leaves_band([*[2.0] * 200, *[2.11] * 100], others, 100) == 222, "23 of 50 steps at +0.11 are above 5 x 0.01"
    assert leaves_band([*[2.0] * 200, *[2.11] * 30, *[0.0] * 70], others, 100) is None, "only for five steps"
    assert leaves_band([3.0] * 300, others, 100) == 100
    assert leaves_band([3.0] * 300, others[:2], 100) is None


NO_PEERS: dict[str, tuple[int, ...]] = {peer.name: () for peer in PEERS}


def outcome(
    case: str, heard: tuple[Heard, ...] = (), seed: int = 1, level: float = 2.0, **peers: tuple[int, ...]
) -> Outcome:
    job = Job("moe", case, seed, 400, 800)
    first = 0 if job.scratch else 400
    losses = (*[2.0] * 400, *[level] * 400)
    return Outcome(job, first, losses, heard, NO_PEERS | peers, 1.0, "text", {"torch": "x"})


def alarm(step: int, mechanism: str, site: str = "layers.0.attention", onset: int = 400) -> Heard:
    return Heard(step, onset, (onset - 10, onset + 10), mechanism, site)


LOW = "low-precision attention kernel"


def test_a_run_is_scored() -> None:
    twin = outcome(TWIN)
    heard = (alarm(390, "unknown"), alarm(410, LOW, onset=405), alarm(450, "unknown"))
    found = score(outcome("kernel/out-away-1-first", heard, level=2.5, **{"loss 6 sigma": (300, 402)}), twin)
    assert found.delays[FORESHOCK] == 10
    assert found.delays["loss 6 sigma"] == 2
    assert found.delays["loss 5 sigma"] is None
    assert found.damaged == 402, "three of fifty steps: 0.5 x 3 / 50 is above 0.02"
    assert found.lead(found.damaged) == -8
    assert found.ahead(found.damaged) is False
    assert (found.right, found.right_ever, found.site_right, found.onset_error, found.within) == (
        True,
        True,
        True,
        5,
        True,
    )
    assert found.left is None
    assert found.mechanisms == (LOW, "unknown")
    assert not found.false_alarms


def test_wrong_answers_are_seen() -> None:
    found = score(
        outcome("kernel/out-away-1-first", (alarm(500, "unknown", "layers.1.attention", onset=450),)), outcome(TWIN)
    )
    assert (found.right, found.right_ever, found.site_right, found.onset_error, found.within) == (
        False,
        False,
        False,
        50,
        False,
    )
    assert found.damaged is None
    assert found.ahead(None) is None


def test_alarms_of_the_twin_are_not_counted_again() -> None:
    heard = (alarm(300, "unknown"), alarm(500, "unknown"))
    fork, whole = score(outcome("odd/no-decay", heard), outcome(TWIN)), score(outcome(TWIN, heard), outcome(TWIN))
    assert (fork.false_alarms[FORESHOCK], fork.steps) == (1, 400)
    assert (whole.false_alarms[FORESHOCK], whole.steps) == (2, 800)
    assert fork.right is whole.right is None


def test_the_summary_adds_up() -> None:
    runs = [
        *(outcome(TWIN, seed=seed) for seed in (1, 2, 3, 4)),
        outcome("odd/no-decay", (alarm(500, "unknown"),), seed=1),
        *(outcome("kernel/out-away-1", (alarm(400 + seed, LOW),), seed=seed, level=2.11) for seed in (1, 2)),
        outcome("kernel/out-away-1", seed=3, level=2.11, **{"loss 6 sigma": (401,)}),
        outcome("control/out-stochastic", (alarm(500, "wrong attention forward"),), seed=1),
    ]
    scores = score_all(runs)
    (row,) = case_rows(scores, "kernel")
    assert (str(row.found), row.delay, str(row.right), row.named) == ("2/3", 1.5, "2/2", f"{LOW} 2")
    assert (row.damaged, str(row.ahead), row.lead) == (409, "2/3", 7.5)
    own, first, *_ = detector_rows(scores)
    assert (own.name, str(own.ahead), own.delay, own.false_alarms, own.steps) == (FORESHOCK, "2/3", 2, 1, 3600)
    assert own.rate == pytest.approx(1e4 / 3600)
    assert (first.name, str(first.ahead), first.delay, first.false_alarms) == ("loss 6 sigma", "1/3", None, 0)
    met = {target.words: target.met for target in targets(scores)}
    assert met["the same within 5 samples at every=10"] is False
    assert met["and the layer named"] is True
    assert met["no control and no data fault called a kernel's or a router's"] is False
    assert met["at most 1 false alarm in 100,000 healthy and odd steps"] is None
    assert met["router ramps before damage"] is None
    assert met["ahead of every peer's rule, on delay and on false alarms"] is False
    for table in all_tables(scores):
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert table.markdown().count("\n") == len(table.rows) + 4


def test_a_share_has_its_interval() -> None:
    assert str(Share.of([True, None, False])) == "1/2"
    low, high = Share(9, 10).interval()
    assert (low, high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))  # Wilson's, of 9 in 10
    assert Share(0, 0).interval() == (0.0, 1.0)


def test_the_standard_plan_has_its_seeds_twins_and_healthy_steps() -> None:
    jobs = plan(TIERS["standard"])
    assert len(set(jobs)) == len(jobs)
    assert {job.seed for job in jobs} == set(range(1, 13))
    assert {job.seed for job in plan(TIERS["standard"], "tuning")} == set(range(100, 112))
    assert all(job.twin(1600) in jobs for job in jobs)
    assert {job.case for job in jobs} == {case.name for case in CASES}
    calm = [job for job in jobs if named(job.case).group in ("healthy", "odd")]
    assert sum(job.cost for job in calm if job.every == 10) >= 100_000
    assert sum(job.cost for job in jobs) < 260_000
    assert len({job.folder(Path()) for job in jobs}) == len(jobs)


def test_a_part_of_a_plan_brings_its_twins() -> None:
    jobs = plan(replace(TIERS["standard"], faults=1), only=["loop/*"])
    assert [(job.case, job.cost) for job in jobs] == [
        (TWIN, 1600),
        ("loop/loss-scale", 1200),
        ("loop/microbatch", 1200),
        ("loop/rotary-offset", 480),
    ]


@pytest.mark.slow
def test_the_smoke_tier_runs_and_hears_its_kernel_faults(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/faults", "--tier", "smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=580)
    report = (tmp_path / "report.md").read_text()
    wanted = (
        "O, P, D, K faults heard within 20 steps",
        "the same within 5 samples",
        "and the layer named",
        "no kernel law alarm",
    )
    for words in wanted:
        (line,) = (line for line in report.splitlines() if line.startswith(f"| {words}"))
        assert line.endswith("| met |"), line
