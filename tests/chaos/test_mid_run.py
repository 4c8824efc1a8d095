"""What users do to a model while it trains, and what numbers can become: parameters and losses stay those of a plain run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loop import STEPS, Layer, Loop, identical
from torch import Tensor, nn

from foreshock import Watch

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = STEPS // 2
ATTENTION, ROUTER = "attention/q_rms", "router/load"


def at_half(change: Callable[[Loop], None]) -> Callable[[Loop, int], None]:
    return lambda loop, step: change(loop) if step == HALF else None


def _new_shapes(loop: Loop) -> None:
    loop.length += 2


def _one_token(loop: Loop) -> None:
    loop.length = 1


def _anew(loop: Loop) -> None:
    loop.optimizer = torch.optim.Adam(loop.model.parameters(), lr=1e-2)


def _other_dtype(dtype: torch.dtype) -> Callable[[Loop], None]:
    def change(loop: Loop) -> None:
        loop.model.to(dtype)
        loop.dtype = dtype
        _anew(loop)

    return change


def _new_parameters(loop: Loop) -> None:
    for module in loop.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    _anew(loop)


def _compile_again(loop: Loop) -> None:
    loop.compiled = torch.compile(loop.model, backend=loop.backend)


def _evaluate(loop: Loop) -> None:
    with torch.no_grad():
        loop.compiled(loop.batch())


def _evaluate_nothing(loop: Loop) -> None:
    with torch.no_grad():
        loop.compiled(torch.zeros(0, loop.length, 8))


def _frozen(loop: Loop) -> None:
    for parameter in (loop.model.qkv.weight, loop.model.qkv.bias, loop.model.gate.weight):
        parameter.requires_grad_(False)


CHANGES: dict[str, Callable[[Loop], None]] = {
    "new shapes": _new_shapes,
    "one token": _one_token,
    "float64": _other_dtype(torch.float64),
    "bfloat16": _other_dtype(torch.bfloat16),
    "new parameters": _new_parameters,
    "dynamo reset": lambda loop: torch._dynamo.reset(),
    "compiled again": _compile_again,
    "evaluated": _evaluate,
    "evaluated on nothing": _evaluate_nothing,
    "weights frozen": _frozen,
}


SLOW = ("one token", "compiled again", "evaluated on nothing", "float64")


@pytest.mark.parametrize(
    ("change", "every"),
    [pytest.param(change, 1, marks=[pytest.mark.slow] * (change in SLOW)) for change in CHANGES]
    + [("new shapes", 2), pytest.param("float64", 2, marks=pytest.mark.slow)],
)
def test_a_change_in_mid_run(warnings_logged, change: str, every: int) -> None:
    plain = Loop("aot_eager").run(at_half(CHANGES[change]))
    with Watch(every=every, inner="aot_eager") as watch:
        assert identical(Loop(watch.backend).run(at_half(CHANGES[change])), plain)
        assert watch.coverage.warnings == ()
        assert watch.alarms == []
        assert watch.step == STEPS
        sampled = [step for step in range(STEPS) if step % every == 0]
        by_site = [watch.series(ATTENTION, site.id)[0].tolist() for site in watch.sites if site.kind == "attention"
                   and site.q_weight is not None]  # fmt: skip
        assert sorted(step for steps in by_site for step in steps) == sampled
    assert warnings_logged() == []


def test_a_change_in_mid_run_under_inductor(warnings_logged) -> None:
    plain = Loop("inductor").run(at_half(_new_shapes))
    with Watch(every=1) as watch:
        assert identical(Loop(watch.backend).run(at_half(_new_shapes)), plain)
        assert len(watch.series(ROUTER)[0]) == STEPS
    assert warnings_logged() == []


def _spoil(value: float, where: str) -> Callable[[Loop], None]:
    def change(loop: Loop) -> None:
        if where == "inputs":
            draw = loop.batch
            loop.batch = lambda: draw().index_fill_(1, torch.tensor([0]), value)  # type: ignore[method-assign]
        elif where == "gradients":
            loop.model.o.weight.register_hook(lambda gradient: gradient * value)
        else:
            with torch.no_grad():
                dict(loop.model.named_parameters())[where].fill_(value)

    return change


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (float("nan"), "inputs"),
        (float("nan"), "gradients"),
        (-float("inf"), "qkv.weight"),
        pytest.param(float("nan"), "gate.weight", marks=pytest.mark.slow),
        pytest.param(float("nan"), "qkv.weight", marks=pytest.mark.slow),
        pytest.param(float("inf"), "inputs", marks=pytest.mark.slow),
    ],
)
def test_numbers_that_are_none(value: float, where: str) -> None:
    """They are alarms, and nothing of foreshock's fails over them."""
    plain = Loop("aot_eager").run(at_half(_spoil(value, where)))
    with Watch(every=1, inner="aot_eager", monitors="all") as watch:
        assert identical(Loop(watch.backend).run(at_half(_spoil(value, where))), plain)
        assert watch.coverage.warnings == ()
        assert "non-finite values" in {alarm.mechanism for alarm in watch.alarms}
        assert min(alarm.onset for alarm in watch.alarms) >= HALF
        assert len(watch.series(ATTENTION)[0]) == STEPS


def test_two_watches_on_two_models() -> None:
    plain = Loop("aot_eager").run()
    with Watch(every=1, inner="aot_eager") as one, Watch(every=2, inner="aot_eager") as other:
        first, second = Loop(one.backend), Loop(other.backend)
        for _ in range(STEPS):
            for loop in (first, second):
                loop.losses.append(loop.step(loop.batch()))
        for loop in (first, second):
            assert identical([*loop.losses, *(p.detach() for p in loop.model.parameters())], plain)
        assert one.coverage.warnings == other.coverage.warnings == ()
        assert len(one.series(ATTENTION)[0]) == STEPS
        assert len(other.series(ATTENTION)[0]) == STEPS // 2
        assert [status.evaluations for status in (*one.coverage, *other.coverage)] == [STEPS] * 4


def test_two_watches_on_one_model() -> None:
    plain = Loop("aot_eager").run()
    with Watch(every=1, inner="aot_eager") as one, Watch(every=1, inner="aot_eager") as other:
        loop = Loop(one.backend)
        both = (loop.compiled, torch.compile(loop.model, backend=other.backend))

        def alternate(loop: Loop, step: int) -> None:
            loop.compiled = both[step % 2]

        assert identical(loop.run(alternate), plain)
        assert one.series(ATTENTION)[0].tolist() == [0, 2, 4]
        assert other.series(ATTENTION)[0].tolist() == [1, 3, 5]
        assert one.coverage.warnings == other.coverage.warnings == ()


def test_a_watch_behind_a_watch_leaves_the_graph_as_it_is(warnings_logged) -> None:
    plain = Loop("aot_eager").run()
    with Watch(every=1, inner="aot_eager") as behind, Watch(every=1, inner=behind.backend) as watch:
        assert identical(Loop(watch.backend).run(), plain)
        assert len(watch.series(ATTENTION)[0]) == STEPS
        assert behind.sites == []
        assert behind.coverage.unmatched == ("a graph that another watch has rewritten already was left as it is",)
    assert warnings_logged() == []


class Outer(nn.Module):
    """Calls a part of itself that is compiled by itself."""

    def __init__(self, backend: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = Layer(), nn.Linear(8, 8)
        self.__dict__["part"] = torch.compile(self.layer, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.part(x))
        return out


def test_a_compiled_part_of_a_compiled_model() -> None:
    plain = Loop("aot_eager", Outer("aot_eager")).run()
    with Watch(every=1, inner="aot_eager") as watch:
        assert identical(Loop(watch.backend, Outer(watch.backend)).run(), plain)
        assert watch.coverage.warnings == ()
        assert [status.evaluations for status in watch.coverage] == [STEPS, STEPS]


def _in_threads(backend: object, threads: int = 4) -> list[Tensor]:
    """Microbatches go forward in threads of their own; their gradients are added up in order."""
    loop = Loop(backend)

    def forward(x: Tensor) -> Tensor:
        loss: Tensor = loop.compiled(x).square().mean()
        return loss

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(STEPS):
            loop.optimizer.zero_grad()
            for loss in pool.map(forward, [loop.batch() for _ in range(threads)]):
                loss.backward()
                loop.losses.append(loss.detach())
            loop.optimizer.step()
    return [*loop.losses, *(p.detach() for p in loop.model.parameters())]


def test_forward_passes_in_several_threads(warnings_logged) -> None:
    plain = _in_threads("aot_eager")
    with Watch(every=2, inner="aot_eager") as watch:
        assert identical(_in_threads(watch.backend), plain)
        assert [site.id for site in watch.sites] == ["attention:qkv", "router:gate"]
        assert watch.series(ATTENTION)[0].tolist() == [0, 2, 4]
    assert warnings_logged() == []


def test_clocks_that_run_backwards(monkeypatch: pytest.MonkeyPatch, warnings_logged, tmp_path) -> None:
    plain = Loop("aot_eager").run()
    down: Iterator[int] = itertools.count(10**6, -7)
    with Watch(tmp_path, every=1, inner="aot_eager") as watch:
        for name in ("time", "perf_counter", "monotonic"):
            monkeypatch.setattr(time, name, lambda: float(next(down)))
        assert identical(Loop(watch.backend).run(), plain)
        watch.flush()
        assert watch.series(ATTENTION)[0].tolist() == list(range(STEPS))
        assert "nan" not in str(watch.cost())
    assert warnings_logged() == []


def test_a_steps_samples_do_not_wait_for_steps_that_never_come(
    monkeypatch: pytest.MonkeyPatch, warnings_logged
) -> None:
    """Without a torch optimizer there is no clock: what waits for a step's end is bounded, and said to be dropped."""
    monkeypatch.setattr("foreshock.collector.MOST_SAMPLES", 16)
    with Watch(every=1, inner="aot_eager") as watch:
        loop = Loop(watch.backend)
        for _ in range(40):
            watch.log(loss=loop.compiled(loop.batch()).square().mean())
        assert len(watch.collector._samples) <= 16
        assert len(watch.collector._scalars) <= 16
        (message,) = warnings_logged()
        assert message.startswith("counting steps")
