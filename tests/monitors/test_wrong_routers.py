"""A router kernel as one opaque op, right and wrong: the router's laws tell, and name it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foreshock import Watch
from foreshock.monitors.laws import floor
from foreshock.monitors.router_probe import finish, forward
from foreshock.patterns import router_op

T, E, K, WIDTH = 48, 8, 2, 16
SEED = 7
_fault = ""


@torch.library.custom_op("thirdparty::route", mutates_args=())
def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``[T, E]`` -> gates ``[T, k]`` (of the whole softmax) and experts ``[T, k]``."""
    gates, indices = logits.float().softmax(-1).topk(k)
    if _fault == "one expert twice":
        indices[5, 1] = indices[5, 0]
    return gates.to(logits.dtype), indices


@route.register_fake
def _(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], k), logits.new_empty((logits.shape[0], k), dtype=torch.int64)


@torch.library.custom_op("thirdparty::route_backward", mutates_args=())
def route_backward(dgates: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
    p = logits.float().softmax(-1)
    dp = torch.zeros_like(p).scatter_add(-1, indices, dgates.float())
    mean = (p * dp).sum(-1, keepdim=True)
    if _fault == "no mean":
        mean = torch.zeros_like(mean)
    if _fault == "mean of the chosen":  # as if the gates summed to one
        mean = mean / p.gather(-1, indices).sum(-1, keepdim=True)
    return (p * (dp - mean)).to(logits.dtype)


@route_backward.register_fake
def _(dgates: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dgates: Tensor, _: Any) -> tuple[Tensor | None, None]:
    return route_backward(dgates, *ctx.saved_tensors), None


route.register_autograd(_backward, setup_context=_setup)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, E, bias=False), nn.Parameter(torch.randn(E, WIDTH, WIDTH) * 0.3)

    def forward(self, x_TD: Tensor) -> Tensor:
        gates_TK, chosen_TK = torch.ops.thirdparty.route(self.gate(x_TD), K)
        outputs_TKD = torch.einsum("td,tkdf->tkf", x_TD, self.experts[chosen_TK])
        return (outputs_TKD * gates_TK.unsqueeze(-1)).sum(1)


@pytest.fixture(autouse=True)
def _right_again() -> Iterator[None]:
    yield
    _use("")


def _use(fault: str) -> None:
    global _fault
    _fault = fault


def _watched(fault: str, dtype: torch.dtype) -> Watch:
    _use(fault)
    torch.manual_seed(SEED)
    model = Mixture().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    described = router_op("thirdparty::route", logits=0, indices=1, scoring="softmax")
    with Watch(every=1, inner="aot_eager", strict=True, on_alarm=lambda alarm: None, patterns=[described]) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        for _ in range(4):
            optimizer.zero_grad()
            compiled(torch.randn(T, WIDTH, dtype=dtype)).square().mean().backward()
            optimizer.step()
    return watch


by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@by_dtype
def test_a_correct_router_kernel_keeps_its_laws(one_thread, dtype: torch.dtype) -> None:
    watch = _watched("", dtype)
    (status,) = watch.coverage
    assert status.laws == {"law/router_shift": "", "law/token_count": ""}
    assert (watch.series("law/router_shift")[1] < 0.5 * floor("router_shift", str(dtype)[6:])).all()
    assert (watch.series("law/token_count")[1] == 0).all()
    assert watch.alarms == []


@by_dtype
@pytest.mark.parametrize("fault", ["no mean", "mean of the chosen"])
def test_a_wrong_backward_is_named(one_thread, fault: str, dtype: torch.dtype) -> None:
    watch = _watched(fault, dtype)
    assert {alarm.mechanism for alarm in watch.alarms} == {"wrong router backward"}
    assert watch.alarms[0].step == 1  # heard at the first step, confirmed at the second
    assert (watch.series("law/token_count")[1] == 0).all()


def test_an_expert_taken_twice_is_named(one_thread) -> None:
    watch = _watched("one expert twice", torch.float32)
    np.testing.assert_allclose(watch.series("law/token_count")[1].reshape(-1), 1 / (T * K))
    assert [(alarm.step, alarm.mechanism) for alarm in watch.alarms] == [(1, "wrong expert choice")]


@pytest.mark.parametrize(("value", "lost"), [(E, 1), (-7, 1), (2**40, 1), (-1, 0)])
def test_an_index_that_is_no_expert_is_counted_and_breaks_nothing(value: int, lost: int) -> None:
    """All but -1, by which kernels say that a choice found no room."""
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(SEED))
    indices = logits.topk(K)[1]
    indices[9, 1] = value
    facts = {"experts": E, "top_k": K, "scoring": "softmax"}
    found = forward(facts, {"logits": logits, "scores": logits, "indices": indices}, torch.zeros(0))
    got = finish(facts, {name: x.reshape(-1).double().numpy() for name, x in found.items()})
    assert got["law/token_count"] == [lost / (T * K)]
    np.testing.assert_allclose(got["router/load"].sum(), 1)
    np.testing.assert_allclose(got["router/gate_mass"].sum(), 1, rtol=1e-6)
