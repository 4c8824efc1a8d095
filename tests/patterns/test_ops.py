"""Every spelling of an op has one name, in the graphs that Dynamo really makes."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Graph
from torch.nn import functional

from foreshock.patterns.ops import argument, op, shape, tensor


def _names(captured) -> list[str]:
    return [op(node) for node in captured.module.graph.nodes if node.op not in ("placeholder", "output")]


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("softmax", lambda x, y: torch.softmax(x, -1)),
        ("softmax", lambda x, y: functional.softmax(x, dim=-1)),
        ("softmax", lambda x, y: x.softmax(-1)),
        ("softmax", lambda x, y: torch.nn.Softmax(-1)(x)),
        ("softmax", lambda x, y: torch.ops.aten.softmax.int(x, -1)),
        ("softmax", lambda x, y: torch.ops.aten._softmax(x, -1, False)),
        ("log_softmax", lambda x, y: functional.log_softmax(x, -1)),
        ("sigmoid", lambda x, y: x.sigmoid()),
        ("sigmoid", lambda x, y: functional.sigmoid(x)),
        ("sigmoid", lambda x, y: x.sigmoid_()),
        ("matmul", lambda x, y: x @ y),
        ("matmul", lambda x, y: torch.matmul(x, y)),
        ("matmul", lambda x, y: x.matmul(y)),
        ("matmul", lambda x, y: torch.mm(x, y)),
        ("matmul", lambda x, y: x.mm(y)),
        ("matmul", lambda x, y: torch.bmm(x[None], y[None])),
        ("matmul", lambda x, y: torch.ops.aten.mm.default(x, y)),
        ("reshape", lambda x, y: x.view(16)),
        ("reshape", lambda x, y: x.reshape(-1)),
        ("reshape", lambda x, y: torch.flatten(x)),
        ("reshape", lambda x, y: x.unflatten(0, (2, 2))),
        ("reshape", lambda x, y: x.unsqueeze(0)),
        ("reshape", lambda x, y: torch.unsqueeze(x, 0)),
        ("reshape", lambda x, y: x.squeeze()),
        ("reshape", lambda x, y: x.view_as(y)),
        ("cast", lambda x, y: x.float()),
        ("cast", lambda x, y: x.to(torch.bfloat16)),
        ("cast", lambda x, y: x.half()),
        ("cast", lambda x, y: x.type_as(y)),
        ("cast", lambda x, y: x.double()),
        ("identity", lambda x, y: x.contiguous()),
        ("identity", lambda x, y: x.clone()),
        ("identity", lambda x, y: x.detach()),
        ("transpose", lambda x, y: x.transpose(0, 1)),
        ("transpose", lambda x, y: torch.transpose(x, 0, 1)),
        ("transpose", lambda x, y: x.swapaxes(0, 1)),
        ("t", lambda x, y: x.T),
        ("t", lambda x, y: x.t()),
        ("t", lambda x, y: torch.t(x)),
        ("mT", lambda x, y: x.mT),
        ("expand", lambda x, y: x.expand(2, 4, 4)),
        ("expand", lambda x, y: torch.broadcast_to(x, (2, 4, 4))),
        ("cat", lambda x, y: torch.cat([x, y])),
        ("cat", lambda x, y: torch.concat([x, y])),
        ("add", lambda x, y: x + y),
        ("add", lambda x, y: torch.add(x, y)),
        ("add", lambda x, y: x.add_(y)),
        ("add", lambda x, y: operator.iadd(x, y)),
        ("mul", lambda x, y: x * y),
        ("mul", lambda x, y: torch.multiply(x, y)),
        ("mul", lambda x, y: x.mul_(2.0)),
        ("mul", lambda x, y: operator.imul(x, 2.0)),
        ("sub", lambda x, y: x.subtract(y)),
        ("sub", lambda x, y: operator.isub(x, y)),
        ("div", lambda x, y: x / y),
        ("div", lambda x, y: torch.true_divide(x, y)),
        ("div", lambda x, y: operator.itruediv(x, 2.0)),
        ("neg", lambda x, y: -x),
        ("neg", lambda x, y: torch.negative(x)),
        ("masked_fill", lambda x, y: x.masked_fill_(y > 0, 0.0)),
        ("scaled_dot_product_attention", lambda x, y: functional.scaled_dot_product_attention(x, y, y)),
        ("linear", lambda x, y: functional.linear(x, y)),
        ("addmm", lambda x, y: torch.addmm(y[0], x, y)),
    ],
)
def test_spellings(capture, name: str, spelling) -> None:
    assert name in _names(capture(spelling, torch.randn(4, 4), torch.randn(4, 4)))


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("split", lambda x: x.split(2)),
        ("split", lambda x: torch.split(x, [1, 3])),
        ("chunk", lambda x: x.chunk(2, -1)),
        ("chunk", lambda x: torch.chunk(x, 2)),
        ("unbind", lambda x: x.unbind(0)),
        ("topk", lambda x: torch.topk(x, 2)),
        ("topk", lambda x: x.topk(2)),
    ],
)
def test_spellings_with_several_results(capture, name: str, spelling) -> None:
    captured = capture(lambda x: spelling(x)[0] + 1, torch.randn(4, 4))
    assert _names(captured)[:2] == [name, "getitem"]


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.ops.aten.view.default, "reshape"),
        (torch.ops.aten._unsafe_view.default, "reshape"),
        (torch.ops.aten._to_copy.default, "cast"),
        (torch.ops.aten.bmm, "matmul"),
        (torch.ops.aten.topk.default, "topk"),
        (torch.ops.mkldnn._linear_pointwise.default, "mkldnn::_linear_pointwise"),
    ],
)
def test_aten_ops_lose_their_namespace_and_others_keep_it(target, name: str) -> None:
    graph = Graph()
    assert op(graph.call_function(target, (graph.placeholder("x"),))) == name


def _foreign(x):
    return x


def test_a_function_of_another_module_never_passes_for_torch() -> None:
    graph = Graph()
    _foreign.__name__ = "softmax"
    name = op(graph.call_function(_foreign, (graph.placeholder("x"),)))
    assert name.endswith("::softmax")
    assert name != "softmax"


def test_placeholder_and_output_are_their_own_names() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    assert (op(x), op(graph.output(x))) == ("placeholder", "output")


def test_dunders_and_a_trailing_underscore_are_told_apart() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    assert op(graph.call_method("clamp_", (x,))) == "clamp"
    assert op(graph.call_method("__foo__", (x,))) == "__foo__"
    assert op(graph.call_method("__getitem__", (x, 0))) == "getitem"


def test_argument_by_place_and_by_name(capture) -> None:
    by_place = capture(lambda x: torch.topk(x, 3), torch.randn(4, 4)).module.graph
    by_name = capture(lambda x: torch.topk(x, dim=0, k=3), torch.randn(4, 4)).module.graph
    (first,) = (node for node in by_place.nodes if op(node) == "topk")
    (second,) = (node for node in by_name.nodes if op(node) == "topk")
    assert [argument(first, 1, "k"), argument(first, 2, "dim", -1)] == [3, -1]
    assert [argument(second, 1, "k"), argument(second, 2, "dim", -1)] == [3, 0]


def test_shapes_of_tensors_tuples_and_complex_numbers(capture) -> None:
    captured = capture(lambda x: torch.view_as_complex(x.split(2)[0].contiguous()), torch.randn(4, 3, 2))
    nodes = {op(node): node for node in captured.module.graph.nodes}
    assert shape(nodes["split"]) is None
    assert tensor(nodes["split"]) is None
    assert shape(nodes["getitem"]) == (2, 3, 2)
    assert shape(nodes["view_as_complex"]) == (2, 3, 2)
    assert shape(3) is None


def test_symbolic_sizes_show_their_hint(capture) -> None:
    x = torch.randn(6, 4)
    torch._dynamo.mark_dynamic(x, 0)
    captured = capture(lambda x: x.softmax(-1), x)
    (node,) = (node for node in captured.module.graph.nodes if op(node) == "softmax")
    assert shape(node) == (6, 4)
