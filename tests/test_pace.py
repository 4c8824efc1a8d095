"""What watching costs and how a budget for it is kept, by a clock that only the test moves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Layer
from torch.fx import GraphModule

import foreshock.watch
from foreshock import Watch, open_run
from foreshock.cost import SAMPLING, SPECTRA, WAITING, Costs
from foreshock.monitors import Spectra
from foreshock.monitors.report import write_report
from foreshock.pace import MOST, Pace, fitted

LEAST = {SAMPLING: 10, SPECTRA: 10}


class Clock:
    """Seconds that pass when `passes` is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


# -- the decision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "periods", "expected"),
    [
        ((0.004, 0.005), (10, 10), (10, 10)),  # fits
        ((0.001, 0.012), (10, 10), (10, 20)),  # the dearest gives way, as far as it must
        ((0.001, 0.030), (10, 10), (10, 40)),
        ((0.008, 0.008), (10, 40), (20, 80)),
        ((0.030, 0.001), (10, 10), (40, 40)),  # spectra go along: between samples nobody judges them
        ((0.030, 0.001), (10, 80), (40, 80)),
        ((9.0, 9.0), (10, 10), (10 * MOST, 10 * MOST)),
        ((0.004, 0.002), (40, 40), (40, 40)),  # half of the budget is not left over
        ((0.001, 0.0005), (40, 40), (20, 40)),  # it is: the dearest comes back, one step at a time
        ((0.001, 0.002), (10, 40), (10, 20)),
        ((0.0001, 0.0001), (10, 10), (10, 10)),  # never more often than was asked for
        ((0.0045, 0.0001), (40, 40), (40, 40)),  # and spectra not more often than samples
    ],
)
def test_the_dearest_gives_way(shares: Any, periods: Any, expected: Any) -> None:
    names = (SAMPLING, SPECTRA)
    found = fitted(dict(zip(names, shares, strict=True)), dict(zip(names, periods, strict=True)), LEAST, 0.01)
    assert found == dict(zip(names, expected, strict=True))


def test_what_was_made_rarer_does_not_come_back_at_once() -> None:
    """Whatever the costs, once they are as predicted nothing is changed any more."""
    random = np.random.default_rng(0)
    for _ in range(500):
        costs = dict(zip(LEAST, random.lognormal(-2, 3, 2), strict=True))
        periods, seen = dict(LEAST), []
        for _ in range(20):
            periods = fitted({name: costs[name] / periods[name] for name in costs}, periods, LEAST, 0.01)
            seen.append(tuple(periods.values()))
        assert len(set(seen)) == 1, costs


def test_without_spectra_only_samples_give_way() -> None:
    assert fitted({SAMPLING: 0.03}, {SAMPLING: 1}, {SAMPLING: 1}, 0.01) == {SAMPLING: 4}


# -- the account ---------------------------------------------------------------------------------------------------------


def test_each_part_is_charged_with_its_own_time_and_each_root_with_all() -> None:
    clock = Clock()
    costs = Costs(clock)
    with costs.of(SAMPLING):
        clock.passes(1)
        with costs.of("judging"):
            clock.passes(2)
            with costs.of(WAITING):
                clock.passes(4)
        with pytest.raises(ZeroDivisionError), costs.of("judging"):
            clock.passes(1 // 0)
        clock.passes(8)
    clock.passes(16)
    assert dict(costs.seconds) == {SAMPLING: 9, "judging": 2, WAITING: 4}
    assert dict(costs.by_root) == {SAMPLING: 11}  # what the device is waited for is the training's


def test_a_graph_costs_what_sampled_steps_take_beyond_plain_ones() -> None:
    """A third of the steps is sampled; some compile, foreshock's own work is no part of them, and steps grow longer in time."""
    clock = Clock()
    costs = Costs(clock)
    for step in range(90):
        clock.passes(1.0 + step / 1000 + 0.25 * (step % 3 == 0) + 60.0 * (step in (0, 1, 40, 42)))
        with costs.of(SAMPLING):
            clock.passes(5.0 * (step % 3 == 1))
        costs.step(step % 3 == 0)
    assert costs.graph is not None
    more, error = costs.graph
    assert more == pytest.approx(0.25, abs=0.02)
    assert error < 0.05
    assert costs.plain_step == pytest.approx(1.08, abs=0.01)


def test_where_every_step_is_sampled_nothing_is_known_of_the_graph() -> None:
    clock = Clock()
    costs = Costs(clock)
    for _ in range(50):
        clock.passes(1.0)
        costs.step(True)
    assert (costs.graph, costs.plain_step) == (None, 1.0)
    assert "not known" in costs.told()["the instrumented graphs"]


# -- the periods ---------------------------------------------------------------------------------------------------------


def paced(
    budget: float | None, every: int, spends: Callable[[int], float], steps: int, **kwargs: Any
) -> tuple[Pace, list[int], list[str]]:
    """A pace, the steps that were sampled, and what was said; a sampled step spends so much of foreshock's time, of one second."""
    clock, said, sampled = Clock(), list[str](), list[int]()
    costs = Costs(clock)
    pace = Pace({SAMPLING: every}, budget, costs, said.append, **kwargs)
    for step in range(steps):
        pace.begin(step)
        assert not pace.begin(step)  # of the same step's second microbatch
        clock.passes(1.0)
        if pace.is_sampled(step):
            sampled.append(step)
            with costs.of(SAMPLING):
                clock.passes(spends(step))
    return pace, sampled, said


def test_a_single_stall_changes_nothing() -> None:
    pace, sampled, said = paced(0.01, 10, lambda step: 500.0 if step in (0, 300) else 0.05, 1000)
    assert (pace.periods, sampled, said) == ({SAMPLING: 10}, list(range(0, 1000, 10)), [])


def test_work_of_every_tenth_sample_is_not_missed() -> None:
    pace, *_ = paced(0.01, 1, lambda step: 0.3 * (step % 10 == 0), 1000)
    assert pace.periods[SAMPLING] > 10


def test_sampling_comes_back_when_it_has_become_cheap() -> None:
    pace, sampled, said = paced(0.01, 5, lambda step: 0.15 if step < 1000 else 0.001, 4000)
    assert pace.periods == {SAMPLING: 5}
    assert max(np.diff(sampled)) == 20
    assert len(said) == 3  # to 20 at once, back to 10 and to 5


def test_no_rarer_than_the_bound_and_said_once() -> None:
    pace, _, said = paced(0.001, 1, lambda step: 9.0, 2000)
    assert pace.periods == {SAMPLING: MOST}
    assert len(said) == 2
    assert "is most" in said[1]


def test_ranks_of_a_job_are_left_in_step() -> None:
    pace, sampled, said = paced(0.001, 2, lambda step: 1.0, 400, may_act=lambda: False)
    assert (pace.periods, sampled) == ({SAMPLING: 2}, list(range(0, 400, 2)))
    assert len(said) == 1
    assert "ranks of a job must sample the same steps" in said[0]


@pytest.mark.parametrize(
    ("least", "budget", "expected"),
    [
        ({SAMPLING: 2, SPECTRA: 10}, 0.01, {SAMPLING: 8, SPECTRA: 20}),
        ({SAMPLING: 10, SPECTRA: 10}, 0.01, {SAMPLING: 40, SPECTRA: 40}),  # other settings: spectra not before samples
        ({SAMPLING: 2}, 0.01, {SAMPLING: 8}),
        ({SAMPLING: 2, SPECTRA: 10}, None, {SAMPLING: 2, SPECTRA: 10}),
    ],
)
def test_a_resumed_run_goes_on_with_its_periods(least: Any, budget: Any, expected: Any) -> None:
    pace = Pace(least, budget, Costs(Clock()), print)
    pace.load_state_dict({SAMPLING: 4, SPECTRA: 2})
    assert pace.periods == expected


# -- a run ---------------------------------------------------------------------------------------------------------------


class Own:
    """A monitor of the user's own that takes its time."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def update(self, step: int, sites: Any) -> list[Any]:
        self.clock.passes(self.seconds)
        return []


@pytest.fixture
def clock(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(foreshock.watch, "Costs", functools.partial(Costs, clock))
    return clock


def train(
    clock: Clock, steps: int, *, graph: float = 0.0, own: float = 0.0, state: Any = None, **settings: Any
) -> Watch:
    """Steps of one second; ``graph`` and ``own``: what an instrumented graph takes longer, and a monitor at a sample."""

    def inner(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        more = graph * any(node.meta.get("foreshock") for node in module.graph.nodes)

        def run(*args: Any) -> Any:
            clock.passes(more)
            return module.forward(*args)

        return run

    torch.manual_seed(0)
    torch._dynamo.reset()
    model, data = Layer(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = Watch(inner=inner, strict=True, windows=(4, 20), monitors=["default", Own(clock, own)], **settings)
    if state is not None:
        watch.load_state_dict(state)
    compiled = torch.compile(model, backend=watch.backend)
    for _ in range(steps):
        clock.passes(1.0)
        compiled(torch.randn(2, 5, 8, generator=data)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return watch


def recorded(watch: Watch, metric: str) -> dict[int, list[float]]:
    steps, values = watch.series(metric)
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


@pytest.fixture
def slow_spectra(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of a second for each measurement."""
    measure = Spectra.update

    def slow(self: Spectra, step: int, sites: Any) -> Any:
        readings = measure(self, step, sites)
        clock.passes(0.2 * bool(readings))
        return readings

    monkeypatch.setattr(Spectra, "update", slow)


@pytest.mark.usefixtures("slow_spectra")
def test_slow_spectra_come_under_the_budget_and_stay_right(clock: Clock) -> None:
    """Of the increments that are still measured each is what it is without a budget, in both windows, and none is left out."""
    free, held = train(clock, 500, every=2), train(clock, 500, every=2, budget=0.01)
    assert held.pace.periods == {SAMPLING: 2, SPECTRA: 32}
    assert free.pace.periods == {SAMPLING: 2, SPECTRA: 4}
    for metric in ("attention/delta2_norm", "attention/delta2_norm@20"):
        all_of_them, some = recorded(free, metric), recorded(held, metric)
        assert some.items() <= all_of_them.items()
        changed = next(step for step in all_of_them if step not in some)
        assert 80 < changed < 200
        assert [b - a for a, b in zip(list(some), list(some)[1:], strict=False) if a > changed] == [32] * (
            len([step for step in some if step > changed]) - 1
        )
    assert recorded(held, "attention/q_rms") == recorded(free, "attention/q_rms")
    (warning,) = held.coverage.warnings
    assert "weight spectra are 32 steps apart (4 asked for)" in warning
    assert "the budget is 1.00%" in warning


def test_dear_samples_come_under_the_budget(clock: Clock) -> None:
    watch = train(clock, 600, every=1, own=0.1, budget=0.02)
    assert watch.pace.periods == {SAMPLING: 8, SPECTRA: 8}
    steps, _ = watch.series("attention/q_rms")
    assert set(np.diff(steps[-20:])) == {8}
    assert "monitor Own" in watch.cost()


def test_a_dear_graph_comes_under_the_budget(clock: Clock) -> None:
    assert train(clock, 400, every=2, graph=0.3, budget=0.05).pace.periods[SAMPLING] == 8


@pytest.mark.parametrize(("graph", "expected"), [(0.3, 8), (0.001, 1)])
def test_where_every_step_is_sampled_a_graph_is_held_against_plain_steps(
    clock: Clock, graph: float, expected: int
) -> None:
    """Then it comes under the budget, or every step is sampled again."""
    watch = train(clock, 600, every=1, graph=graph, budget=0.05)
    assert watch.pace.periods[SAMPLING] == expected
    steps, _ = watch.series("attention/q_rms")
    assert np.diff(steps).tolist().count(2) > 20
    assert any("against plain steps" in warning for warning in watch.coverage.warnings) is (expected == 2)


def test_a_run_within_its_budget_is_left_alone(clock: Clock) -> None:
    free, held = (train(clock, 300, every=3, own=0.01, graph=0.01, budget=budget) for budget in (None, 0.05))
    assert held.coverage.warnings == free.coverage.warnings == ()
    assert held.metrics() == free.metrics()
    for metric in free.metrics():
        assert repr(recorded(held, metric)) == repr(recorded(free, metric)), metric  # NaN equals itself


def test_the_periods_are_in_the_state(clock: Clock) -> None:
    state = train(clock, 300, every=1, own=0.1, budget=0.02).state_dict()
    watch = train(clock, 40, every=1, own=0.1, budget=0.02, state=state)
    assert np.diff(watch.series("attention/q_rms")[0]).tolist() == [8, 8, 8, 8]
    assert train(clock, 5, every=1, own=0.1, state=state).series("attention/q_rms")[0].tolist() == [*range(300, 305)]


def test_the_report_shows_what_each_part_took(clock: Clock, tmp_path: Any) -> None:
    train(clock, 120, every=2, own=0.1, graph=0.25, run=tmp_path / "run", budget=0.5)
    cost = open_run(tmp_path / "run").meta["cost"]
    assert cost["monitor Own"].startswith("6.00 s (4.")
    assert cost["the instrumented graphs"].startswith("250.00 +- 0.00 ms a sampled step, 15.00 s")
    assert cost["sampled steps now"] == "2 steps apart, 17.50% of a plain step's time"
    assert cost["budget"] == "50.00% of a plain step's time"
    page = write_report(open_run(tmp_path / "run"), tmp_path / "report.html").read_text()
    assert "Measured cost" in page
    assert "250.00 +- 0.00 ms a sampled step" in page
