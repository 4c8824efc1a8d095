"""Gradient taps: nothing passes through them changed, and what they see arrives in the slot."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional

from foreshock import Watch
from foreshock.passes.taps import ENTER, LEAVE, READ, REST, register_statistics
from foreshock.stages import TwoStages

sdpa = functional.scaled_dot_product_attention
ROLES = ("q", "k", "v")
LAYOUT = dict.fromkeys(ROLES, "b h s d")
LATE = [{"role": "out", "like": "q", "width": 8}]


def _spec(name: str, **facts) -> str:
    return json.dumps({"statistics": {name: 8}, "roles": list(ROLES), "layout": LAYOUT, "late": LATE, **facts})


def _inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 8, generator=g).to(dtype).requires_grad_() for _ in range(3)]


def _tapped(inputs: list[Tensor], slot: Tensor, spec: str) -> Tensor:
    *views, carrier_grad, carrier_out = ENTER(inputs, slot, spec)
    return LEAVE(sdpa(*views), [carrier_grad, carrier_out], "b h s d")


def _compiled(backend: str):
    torch._dynamo.reset()
    return torch.compile(_tapped, backend=backend, fullgraph=True) if backend != "none" else _tapped


def _sums(spec, tensors, gradients) -> dict[str, Tensor]:
    """Of all that a tap sees: sums of the four tensors and of the four gradients."""
    order = (*ROLES, "out")
    return {
        name: torch.stack([t[role].float().sum() * spec.get("factor", 1) for role in order])
        for name, t in (("tensors", tensors), ("gradients", gradients))
    }


register_statistics("test_sums", _sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_output_and_gradients_pass_bitwise(one_thread, backend: str, dtype: torch.dtype) -> None:
    weights = torch.randn(2, 3, 5, 8).to(dtype)
    plain = _inputs(dtype)
    expected = sdpa(*plain)
    (expected * weights).sum().backward()
    inputs, slot = _inputs(dtype), torch.zeros(8, requires_grad=True)
    out = _compiled(backend)(inputs, slot, _spec("test_sums"))
    assert torch.equal(out, expected)
    (out * weights).sum().backward()
    for got, exact in zip(inputs, plain, strict=True):
        assert got.grad.dtype == dtype
        assert torch.equal(got.grad, exact.grad)


@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_statistics_of_every_tensor_and_gradient_arrive_in_the_slot(one_thread, backend: str) -> None:
    inputs, slot = _inputs(), torch.zeros(8, requires_grad=True)
    out = _compiled(backend)(inputs, slot, _spec("test_sums", factor=2))
    do = torch.randn(out.shape)
    out.backward(do)
    tensors, gradients = [*inputs, out], [*(x.grad for x in inputs), do]
    expected = torch.stack([2 * x.detach().float().sum() for x in (*tensors, *gradients)])
    torch.testing.assert_close(slot.grad, expected)


def test_slots_of_two_sites_do_not_mix(one_thread) -> None:
    slot = torch.zeros(16, requires_grad=True)
    first, second = slot.split([8, 8])
    a, b = _inputs(), [x.detach().mul(2).requires_grad_() for x in _inputs()]
    loss = _tapped(a, first, _spec("test_sums")).sum() + _tapped(b, second, _spec("test_sums", factor=0)).sum()
    loss.backward()
    assert slot.grad[:8].abs().sum() > 0
    assert slot.grad[8:].eq(0).all()


def test_an_unused_output_leaves_the_slot_empty(one_thread) -> None:
    inputs, slot = _inputs(), torch.zeros(8, requires_grad=True)
    *views, _, _ = ENTER(inputs, slot, _spec("test_sums"))
    views[0].sum().backward()
    assert slot.grad is None
    assert torch.equal(inputs[0].grad, torch.ones_like(inputs[0]))
    assert inputs[1].grad is None


def test_a_tap_without_a_kernel(one_thread) -> None:
    register_statistics("test_norm", lambda spec, tensors, grads: {"square": grads["logits"].square().sum()})
    logits, slot = torch.randn(4, 3, requires_grad=True), torch.zeros(1, requires_grad=True)
    (view,) = ENTER([logits], slot, json.dumps({"statistics": {"test_norm": 1}, "roles": ["logits"], "layout": {}}))
    (view * 3).sum().backward()
    torch.testing.assert_close(slot.grad, torch.tensor([9.0 * 12]))
    assert torch.equal(logits.grad, torch.full((4, 3), 3.0))


@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_a_statistic_that_fails_leaves_the_backward_as_it_is(one_thread, caplog, backend: str) -> None:
    def fails(spec, tensors, gradients):
        raise ValueError("no statistics today")

    register_statistics("test_fails", fails)
    plain = _inputs()
    sdpa(*plain).sum().backward()
    inputs, slot = _inputs(), torch.zeros(8, requires_grad=True)
    with caplog.at_level(logging.WARNING, logger="foreshock"):
        _compiled(backend)(inputs, slot, _spec("test_fails")).sum().backward()
    assert all(torch.equal(got.grad, exact.grad) for got, exact in zip(inputs, plain, strict=True))
    assert slot.grad.isnan().all()
    assert "no statistics today" in caplog.text


def test_a_statistic_that_fails_is_told_to_whoever_asked(one_thread, caplog) -> None:
    def fails(spec, tensors, gradients):
        raise ValueError("no statistics today")

    told: list[Exception] = []
    register_statistics("test_told", fails, told.append)
    inputs, slot = _inputs(), torch.zeros(8, requires_grad=True)
    _tapped(inputs, slot, _spec("test_told")).sum().backward()
    assert [str(error) for error in told] == ["no statistics today"]
    assert caplog.text == ""


def test_a_second_registration_replaces_the_first(one_thread) -> None:
    for factor in (1.0, 5.0):
        register_statistics("test_again", lambda spec, t, g, factor=factor: {"sum": g["logits"].sum() * factor})
        logits, slot = torch.randn(3, requires_grad=True), torch.zeros(1, requires_grad=True)
        (view,) = ENTER(
            [logits], slot, json.dumps({"statistics": {"test_again": 1}, "roles": ["logits"], "layout": {}})
        )
        view.sum().backward()
        assert slot.grad == 3 * factor


@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_an_operand_made_late_comes_the_way_of_the_output(one_thread, backend: str) -> None:
    """Values that exist only after the logits; output ``[B, S, H, D]``, and carriers of another width than q's."""
    layout = {"q": "b h s d", "k": "b h d s", "v": "b h s d", "out": "b s h d"}
    late = [{"role": "v", "like": "k", "width": 5}, {"role": "out", "like": "q", "width": 5}]
    spec = json.dumps({"statistics": {"test_sums": 8}, "roles": ["q", "k"], "layout": layout, "late": late})

    def attention(q: Tensor, k: Tensor, v: Tensor, slot: Tensor | None) -> Tensor:
        carriers: list[Tensor] = []
        if slot is not None:
            q, k, *carriers = ENTER([q, k], slot, spec)
        p = (q @ k).softmax(-1)
        v = v * 2
        if slot is not None:
            v = LEAVE(v, carriers[:2], layout["v"])
        out = (p @ v).transpose(1, 2)
        return out if slot is None else LEAVE(out, carriers[2:], layout["out"])

    g = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 5, 4), (2, 3, 4, 6), (2, 3, 6, 5))
    given = [torch.randn(*size, generator=g) for size in sizes]
    slot = torch.zeros(8, requires_grad=True)
    torch._dynamo.reset()
    call = torch.compile(attention, backend=backend, fullgraph=True) if backend != "none" else attention
    results = []
    for watched in (None, slot):
        inputs = [x.clone().requires_grad_() for x in given]
        out = (attention if watched is None else call)(*inputs, watched)
        do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        out.backward(do)
        results.append([out.detach(), *(x.grad for x in inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    q, k, v = given
    (dq, dk, dv), out = results[0][1:], results[0][0]
    expected = torch.stack([x.sum() for x in (q, k, 2 * v, out, dq, dk, dv / 2, do)])
    torch.testing.assert_close(slot.grad, expected)


def test_reading_a_boundary_is_no_part_of_the_gradient(one_thread) -> None:
    register_statistics("test_read", lambda spec, t, rows: {"sum": t["x"].sum(), "rows": rows[:2]})
    x, rows = torch.randn(3, requires_grad=True), torch.rand(4)
    spec = json.dumps({"statistics": {"test_read": 3}, "roles": ["x"]})
    vector = torch.compile(lambda: READ([x], rows, spec), backend="aot_eager", fullgraph=True)()
    assert not vector.requires_grad
    torch.testing.assert_close(vector, torch.cat([x.detach().sum().reshape(1), rows[:2]]))


def _two_stages(rest) -> TwoStages:
    return TwoStages(lambda spec, t, rows: {"sum": t["x"].sum(1), "rows": rows}, rest)


def test_a_compiler_sees_the_first_of_two_stages_alone(one_thread) -> None:
    seen: list[object] = []

    def keep(module, inputs):
        seen.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module.forward)

    stages = _two_stages(lambda spec, p: {"square": p["sum"].square().sum() * spec["factor"], "rows": p["rows"][:2]})
    register_statistics("test_stages", stages)
    x, rows = torch.randn(3, 5, requires_grad=True), torch.rand(4)
    spec = {"statistics": {"test_stages": 3}, "roles": ["x"], "factor": 2.0}
    read = torch.compile(lambda: READ([x], rows, json.dumps(spec)), backend=aot_autograd(fw_compiler=keep))
    whole = stages(spec, {"x": x.detach()}, rows)
    assert torch.equal(read(), torch.cat([whole["square"].reshape(1), whole["rows"]]))
    assert REST in seen
    assert torch.ops.aten.mul.Tensor not in seen


def test_a_second_stage_that_fails_as_it_runs_leaves_the_rest_as_it_is(one_thread) -> None:
    def fails(spec, partials):
        raise ValueError("no statistics today")

    told: list[Exception] = []
    register_statistics("test_stage_fails", _two_stages(fails), told.append)
    spec = json.dumps({"statistics": {"test_stage_fails": 3}, "roles": ["x"]})
    read = torch.compile(lambda x: (READ([x], torch.rand(4), spec), x + 1), backend="aot_eager", fullgraph=True)
    vector, more = read(torch.ones(3, 5))
    assert vector.shape == (3,)
    assert vector.isnan().all()
    assert torch.equal(more, torch.full((3, 5), 2.0))
    assert [str(error) for error in told] == ["no statistics today"]


def test_taps_that_stand_right_behind_the_inputs() -> None:
    """Kernels on graph inputs, as behind a graph break: the slot is cut in front of the first of them."""

    def attend(triples: list[list[torch.Tensor]]) -> torch.Tensor:
        return torch.cat([torch.nn.functional.scaled_dot_product_attention(*triple) for triple in triples], 2)

    triples = [[torch.randn(1, 4, 8, 16, requires_grad=True) for _ in range(3)] for _ in range(3)]
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        torch.compile(attend, backend=watch.backend)(triples).sum().backward()
        assert [status.site.heads for status in watch.coverage] == [4, 4, 4]
    mine = [x.grad.clone() for triple in triples for x in triple]
    for x in (x for triple in triples for x in triple):
        x.grad = None
    attend(triples).sum().backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(mine, (x for triple in triples for x in triple), strict=True))
