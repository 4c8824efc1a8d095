"""The step clock: optimizer steps are counted with no word from the training script, and each sample belongs to one."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from foreshock import Watch
from foreshock.clock import StepClock


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


def _x(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


def _steps(watch: Watch, metric: str = "attention/q_rms", site: str | None = None) -> list[int]:
    return watch.series(metric, site)[0].tolist()


@pytest.fixture
def watch(one_thread):
    with Watch(every=1, inner="eager", strict=True) as watch:
        yield watch


def test_gradient_accumulation_is_one_step(watch) -> None:
    model = Layer()
    compiled, optimizer = torch.compile(model, backend=watch.backend), torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(3):
        for micro in range(4):
            compiled(_x(micro)).sum().backward()
            assert watch.step == step
        optimizer.step()
        assert watch.step == step + 1
    (status,) = watch.coverage
    assert (status.evaluations, status.sampled) == (12, 12)
    assert _steps(watch) == [0, 1, 2]


def test_only_sampled_steps_run_the_instrumented_graph(one_thread) -> None:
    with Watch(every=3, inner="eager", strict=True) as watch:
        model = Layer()
        compiled, optimizer = torch.compile(model, backend=watch.backend), torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(8):
            for _ in range(2):
                compiled(_x()).sum().backward()
            optimizer.step()
        (status,) = watch.coverage
        assert (status.evaluations, status.sampled) == (16, 6)
        assert _steps(watch) == [0, 3, 6]


def test_evaluation_in_between_is_no_step_and_no_sample(watch) -> None:
    model = Layer()
    compiled, optimizer = torch.compile(model, backend=watch.backend), torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        compiled(_x()).sum().backward()
        optimizer.step()
        with torch.no_grad():
            compiled(_x(1) * 100)
    compiled(_x(1) * 100)  # with gradients on, and none asked for
    watch.flush()
    assert watch.step == 2
    steps, values = watch.series("attention/q_absmax")
    assert steps.tolist() == [0, 1]
    assert values.max() < 20


def test_two_optimizers_of_one_model_make_one_tick(watch) -> None:
    model = Layer()
    compiled = torch.compile(model, backend=watch.backend)
    pair = [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (model.qkv, model.o)]
    for step in range(4):
        compiled(_x()).sum().backward()
        for optimizer in pair if step % 2 else reversed(pair):
            optimizer.step()
        assert watch.step == step + 1
    assert _steps(watch) == [0, 1, 2, 3]


def test_a_model_and_its_adversary_take_turns(watch) -> None:
    models = [Layer(), Layer()]
    compiled = [torch.compile(model, backend=watch.backend) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
    seen = []
    for _ in range(5):
        for model, optimizer in zip(compiled, optimizers, strict=True):
            model(_x()).sum().backward()
            optimizer.step()
        seen.append(watch.step)
    assert [after - before for before, after in itertools.pairwise(seen)] == [1, 1, 1, 1]
    sites = [site.id for site in watch.sites]
    assert len(sites) == 2
    for site in sites:
        steps = _steps(watch, site=site)
        assert len(steps) == 5
        assert steps == sorted(set(steps))


def test_several_steps_of_one_for_one_of_the_other(watch) -> None:
    critic, actor = Layer(), Layer()
    compiled = [torch.compile(model, backend=watch.backend) for model in (critic, actor)]
    fast, slow = (torch.optim.SGD(model.parameters(), lr=1e-3) for model in (critic, actor))
    for _ in range(3):
        for _ in range(4):
            compiled[0](_x()).sum().backward()
            fast.step()
        compiled[1](_x()).sum().backward()
        slow.step()
    watch.close()
    # The slow one is met first after the fast one's steps and goes ahead by one, so that two fast steps fall into one.
    assert [len(_steps(watch, site=site.id)) for site in watch.sites] == [11, 3]
    assert watch.step == 12


def test_the_optimizer_of_another_model_does_not_move_the_clock(watch) -> None:
    model, other = Layer(), nn.Linear(3, 3)
    compiled, optimizer = torch.compile(model, backend=watch.backend), torch.optim.SGD(model.parameters(), lr=1e-3)
    elsewhere = torch.optim.SGD(other.parameters(), lr=1e-3)
    for step in range(3):
        compiled(_x()).sum().backward()
        optimizer.step()
        for _ in range(5):
            other(torch.randn(2, 3)).sum().backward()
            elsewhere.step()
        assert watch.step == step + 1


def test_an_optimizer_replaced_in_mid_run_goes_on_counting(watch) -> None:
    model = Layer()
    compiled = torch.compile(model, backend=watch.backend)
    for step in range(6):
        if step in (0, 3):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            gc.collect()
        compiled(_x()).sum().backward()
        optimizer.step()
        assert watch.step == step + 1
    assert _steps(watch) == list(range(6))


def test_an_optimizer_of_weights_beside_the_sites_counts(watch) -> None:
    """As in adapters: what feeds the sites is frozen, and only other weights of the graph are trained."""
    model = Layer()
    model.qkv.requires_grad_(False)
    compiled, optimizer = torch.compile(model, backend=watch.backend), torch.optim.SGD(model.o.parameters(), lr=1e-3)
    for step in range(3):
        compiled(_x()).sum().backward()
        optimizer.step()
        assert watch.step == step + 1


def test_adapters(watch) -> None:
    class Adapted(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 24, bias=False)

        def forward(self, x):
            q, k, v = (
                y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (self.qkv(x) + self.up(self.down(x))).chunk(3, -1)
            )
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o(out.transpose(1, 2).flatten(2))

    model = Adapted()
    compiled = torch.compile(model, backend=watch.backend)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        compiled(_x()).sum().backward()
        optimizer.step()
    assert watch.step == 3
    assert _steps(watch, "law/key_shift") == [0, 1, 2]


def test_an_optimizer_of_masters_counts(watch) -> None:
    """Sharded optimizers and those with fp32 copies hold no parameter that a graph ever sees."""
    model = Layer()
    compiled = torch.compile(model, backend=watch.backend)
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=1e-3)
    for step in range(3):
        model.zero_grad()
        compiled(_x()).sum().backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.clone()
        optimizer.step()
        assert watch.step == step + 1
    assert _steps(watch) == [0, 1, 2]


def test_a_step_that_is_skipped_by_a_gradient_scaler_is_no_step(watch) -> None:
    model = Layer()
    compiled, optimizer = torch.compile(model, backend=watch.backend), torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(3):
        loss = compiled(_x()).sum() * (float("inf") if step == 1 else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert watch.step == 2


def test_a_clock_goes_on_where_it_was_saved() -> None:
    class Optimizer:
        pass

    clock, optimizer = StepClock(), Optimizer()
    for _ in range(5):
        clock.forward()
        clock.tick(optimizer)
    resumed = StepClock()
    resumed.load_state_dict(clock.state_dict())
    fresh = Optimizer()
    resumed.forward()
    resumed.tick(fresh)
    assert (clock.step, resumed.step, resumed.forward_step) == (5, 6, 5)


def test_a_model_and_its_adversary_take_turns_also_after_a_resume(one_thread) -> None:
    def steps(stops: tuple[int, ...]) -> list[int]:
        state, seen = None, []
        for start, stop in zip((0, *stops), (*stops, 7), strict=True):
            torch._dynamo.reset()
            with Watch(every=1, inner="eager", strict=True) as watch:
                models = [Layer(), Layer()]
                compiled = [torch.compile(model, backend=watch.backend) for model in models]
                optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
                if state is not None:
                    watch.load_state_dict(state)
                for _ in range(start, stop):
                    for model, optimizer in zip(compiled, optimizers, strict=True):
                        model(torch.randn(2, 5, 8)).sum().backward()
                        optimizer.step()
                    seen.append(watch.step)
                state = watch.state_dict()
        return seen

    assert steps((2, 5)) == steps(())
    assert steps(())[-1] == 8


def test_a_warm_up_from_a_learning_rate_of_zero_counts(watch) -> None:
    model = Layer()
    compiled, optimizer = torch.compile(model, backend=watch.backend), torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(3):
        compiled(_x()).sum().backward()
        optimizer.step()
        assert watch.step == step + 1


def test_a_clock_holds_no_optimizer_alive() -> None:
    class Optimizer:
        param_groups = ({"params": []},)

    clock, optimizer = StepClock(), Optimizer()
    clock.concerns(optimizer, [1])
    clock.tick(optimizer)
    del optimizer
    gc.collect()
    assert len(clock._counts) == len(clock._relevant) == 0


def test_before_anything_is_watched_every_optimizer_counts() -> None:
    class Optimizer:
        def __init__(self, *parameters) -> None:
            self.param_groups = ({"params": list(parameters)},)

    clock, weight, other = StepClock(), torch.zeros(1), torch.zeros(1)
    mine, elsewhere = Optimizer(weight), Optimizer(other)
    assert clock.concerns(elsewhere, [])
    assert clock.concerns(mine, [id(weight)])
    assert not clock.concerns(elsewhere, [id(weight)])


def test_samples_do_not_pile_up_where_no_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreshock.collector.MOST_SAMPLES", 5)
    with Watch(every=1, inner="eager") as watch:
        compiled = torch.compile(Layer(), backend=watch.backend)
        for _ in range(12):
            compiled(_x()).sum().backward()
        assert len(watch.collector._samples) <= 5
        assert ["counting steps" in warning for warning in watch.coverage.warnings] == [True]
