"""Torch code written into a graph, node by node, and taken back when it fails."""

from __future__ import annotations

import pytest
import torch

from foreshock import _torch
from foreshock.passes.record import Recorder, Value


def _recorder(captured) -> Recorder:
    fakes = [node.meta.get("example_value") for node in captured.module.graph.nodes]
    return Recorder(captured.module.graph, _torch.fake_mode_of(fakes), "a_pass", "a site")


def _write(captured, function):
    """``function`` of the graph's first output, written in front of the output node."""
    recorder = _recorder(captured)
    graph = captured.module.graph
    last = next(iter(reversed(graph.nodes)))
    with recorder.before(last):
        result = function(Value(captured.output, recorder))
    return recorder, result


def _evaluate(captured, result, *inputs):
    output = next(iter(reversed(captured.module.graph.nodes)))
    output.args = ((result.node,),)
    captured.module.recompile()
    (value,) = captured.module(*inputs)
    return value


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.square().mean((0, 1)),
        lambda x: torch.logsumexp(x, -1) + 1,
        lambda x: torch.where(x > 0, x, float("-inf")).amax(-1),
        lambda x: torch.arange(x.shape[0], device=x.device) + x[:, 0],
        lambda x: torch.zeros(x.shape[0]).scatter_add(0, torch.arange(4) // 2, x[:, 0]),
        lambda x: torch.cat([x, -x], dim=x.ndim - 1).reshape(-1, 2),
        lambda x: x.to(torch.float64) if x.dtype == torch.float32 else x,
        lambda x: torch.stack([(~torch.isfinite(x)).sum().float(), x.sum()]),
        lambda x: x[1, ..., ::2] @ torch.ones(x.shape[1] // 2, dtype=x.dtype),
    ],
)
def test_what_is_written_computes_what_the_function_computes(capture, function) -> None:
    x = torch.randn(4, 6)
    captured = capture(lambda x: x * 2, x)
    recorder, result = _write(captured, function)
    captured.module.graph.lint()
    expected = function(x * 2)
    assert torch.equal(_evaluate(captured, result, x), expected)
    assert (result.shape, result.dtype, result.ndim) == (tuple(expected.shape), expected.dtype, expected.ndim)
    for node in recorder.nodes:
        assert node.meta["foreshock"] == {"pass": "a_pass", "site": "a site"}
        assert node.meta["example_value"] is not None


def test_factories_are_nodes_inside_and_tensors_outside(capture) -> None:
    captured = capture(lambda x: x * 2, torch.randn(3))
    recorder, result = _write(captured, lambda x: torch.arange(3) * x)
    assert [node.target for node in recorder.nodes if node.target is torch.arange] == [torch.arange]
    assert isinstance(result, Value)
    assert isinstance(torch.arange(3), torch.Tensor)


def test_written_nodes_carry_no_gradient(capture) -> None:
    captured = capture(lambda x: x * 2, torch.randn(3, requires_grad=True))
    recorder, result = _write(captured, lambda x: x.detach().sum())
    assert not result.fake.requires_grad
    assert all(not node.meta["example_value"].requires_grad for node in recorder.nodes)


def test_a_failure_takes_everything_back(capture) -> None:
    captured = capture(lambda x: (x * 2).softmax(-1), torch.randn(3, 3))
    before, nodes = str(captured.module.graph), list(captured.module.graph.nodes)
    users = {node: list(node.users) for node in nodes}

    def fails(x):
        y = torch.arange(3) + x.square()
        raise ValueError(f"stop at {y.ndim}")

    with pytest.raises(ValueError, match="stop at 2"):
        _write(captured, fails)
    assert str(captured.module.graph) == before
    assert list(captured.module.graph.nodes) == nodes
    assert {node: list(node.users) for node in nodes} == users


def test_an_op_that_fits_no_shape_fails_while_it_is_written(capture) -> None:
    captured = capture(lambda x: x * 2, torch.randn(3, 4))
    before = str(captured.module.graph)
    with pytest.raises(RuntimeError, match="reduction dim"):
        _write(captured, lambda x: x @ torch.ones(3, 5))
    assert str(captured.module.graph) == before


def test_a_second_failure_keeps_what_stood_before_it(capture) -> None:
    captured = capture(lambda x: x * 2, torch.randn(3))
    recorder, result = _write(captured, lambda x: x.exp())
    kept = str(captured.module.graph)
    last = next(iter(reversed(captured.module.graph.nodes)))

    def again() -> None:
        with recorder.before(last):
            result.log()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        again()
    assert str(captured.module.graph) == kept
    assert recorder.nodes == [result.node]


def test_symbolic_sizes_are_read_at_run_time(capture) -> None:
    x = torch.randn(5, 3)
    torch._dynamo.mark_dynamic(x, 0)
    captured = capture(lambda x: x * 2, x)
    _, result = _write(captured, lambda x: x.sum() / x.shape[0] + torch.arange(x.shape[0]).sum())
    inputs = [node for node in captured.module.graph.nodes if node.op == "placeholder"]
    for rows in (5, 7):
        y = torch.randn(rows, 3)
        values = [y if isinstance(node.meta["example_value"], torch.Tensor) else rows for node in inputs]
        torch.testing.assert_close(_evaluate(captured, result, *values), (y * 2).sum() / rows + sum(range(rows)))


def test_no_autocast_reaches_what_is_written(capture) -> None:
    x = torch.randn(4, 4)
    captured = capture(lambda x: x * 2, x)
    recorder = _recorder(captured)
    last = next(iter(reversed(captured.module.graph.nodes)))
    with recorder.before(last), recorder.without_autocast("cpu", True):
        result = Value(captured.output, recorder) @ torch.ones(4, 4)
    assert result.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert _evaluate(captured, result, x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
