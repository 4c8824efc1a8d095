"""Weights of one head that jump or stand still are heard; what moves all heads alike is not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from foreshock.monitors import Detector, Finding
from foreshock.monitors.detectors import Moves
from foreshock.records import Reading

SITES = ("a0", "a1")


class Stream:
    """Two sites of four heads, whose increments scatter by 15 %; ``change(n, site, dq)`` may alter those of the queries."""

    def __init__(self, seed: int = 0) -> None:
        self.rng, self.moves, self.n = np.random.default_rng(seed), Moves(), 0

    def run(self, samples: int, change=lambda n, site, dq: dq, rate: float = 1e-3) -> list[Finding]:
        found: list[Finding] = []
        for _ in range(samples):
            readings = [Reading("optim/lr", None, np.array([rate])), Reading("router/row_norm_max", "r", np.ones(1))]
            for site in SITES:
                dq, dk = 0.1 * np.exp(0.15 * self.rng.standard_normal((2, 4)))
                readings += [
                    Reading("attention/dwq_norm", site, change(self.n, site, dq)),
                    Reading("attention/dwk_norm", site, dk),
                ]
            found += self.moves.update(10 * self.n, readings, {})
            self.n += 1
        return found


def one_head(factor: float, start: int, stop: int = 10**9):
    def change(n, site, dq):
        return dq * np.where((np.arange(4) == 2) & (site == "a1") & (start <= n < stop), factor, 1.0)

    return change


def test_a_healthy_run_is_silent_whatever_the_learning_rate_does() -> None:
    stream = Stream()
    assert stream.run(300) == []
    assert stream.run(20, lambda n, site, dq: dq * 10) == []
    assert stream.run(20, lambda n, site, dq: dq * 0.01) == []


def test_one_head_that_jumps_is_named_once() -> None:
    (finding,) = Stream().run(60, one_head(20, 30, 31))
    assert (finding.step, finding.site, finding.index, finding.direction) == (300, "a1", 2, +1)
    assert finding.onset_interval == (290, 300)
    assert finding.extent == 0.0


@pytest.mark.parametrize("factor", [2.0, 1 / 20])
def test_a_small_jump_and_a_fall_are_nothing(factor: float) -> None:
    assert Stream().run(60, one_head(factor, 30)) == []


def test_a_head_that_stands_still_while_others_move() -> None:
    first, *others = Stream().run(60, one_head(0.0, 30))
    assert (first.step, first.index, first.direction, first.value) == (310, 2, -1, 0.0)
    assert len(others) == 28, "repeated for as long as it holds"


def test_weights_may_stand_still_from_the_start_or_with_the_learning_rate() -> None:
    assert Stream().run(60, one_head(0.0, 0)) == []
    stream = Stream()
    stream.run(30)
    assert stream.run(20, one_head(0.0, 30), rate=0.0) == []


def test_a_router_weight_that_jumps() -> None:
    moves = Moves()
    assert [moves.update(n, [Reading("router/row_norm_max", "r", np.array([1 + n / 100]))], {}) for n in range(90)] == [
        []
    ] * 90
    (finding,) = moves.update(90, [Reading("router/row_norm_max", "r", np.array([30.0]))], {})
    assert (finding.site, finding.index, finding.onset_interval) == ("r", None, (89, 90))


def test_it_goes_on_where_it_stopped() -> None:
    assert isinstance(Moves(), Detector)
    whole, first, second = Stream(3), Stream(3), Stream(3)
    expected = whole.run(60, one_head(0.0, 28))
    heard = first.run(29, one_head(0.0, 28))
    second.moves.load_state_dict(json.loads(json.dumps(first.moves.state_dict())))
    second.n, second.rng = first.n, first.rng
    assert heard + second.run(31, one_head(0.0, 28)) == expected


def test_a_restart_that_reaches_one_site_before_the_others_is_no_jump() -> None:
    """Sites are read in turn: the first one's window holds the raised rate already."""
    stream = Stream()
    assert stream.run(100, rate=1e-6) == []
    assert stream.run(1, lambda n, site, dq: dq * (1000 if site == "a0" else 1), rate=1e-3) == []


def test_a_router_that_begins_at_zero_leaps_without_harm() -> None:
    moves = Moves()
    for n, norm in enumerate([0.0, 1e-6, 1e-3, 0.02, 0.1, 0.12, 0.13]):
        assert moves.update(10 * n, [Reading("router/row_norm_max", "r", np.array([norm]))], {}) == []


@pytest.mark.parametrize(("peak", "heard"), [(0.3, 0), (0.97, 1), (None, 1)])
def test_a_jump_of_all_entries_is_a_batch_and_of_one_a_corruption(peak: float | None, heard: int) -> None:
    moves, found = Moves(), []
    for n in range(12):
        jumped = np.where(np.arange(8) == 3, 5.0 if n == 10 else 1.0, 1.0)
        readings = [Reading("attention/dwq_norm", "a", jumped), Reading("attention/dwk_norm", "a", np.ones(8))]
        if peak is not None:
            readings.append(Reading("attention/dwq_peak", "a", np.where(jumped > 1, peak, 0.05)))
        found += moves.update(10 * n, readings, {})
    assert [(f.step, f.index) for f in found] == [(100, 3)] * heard
