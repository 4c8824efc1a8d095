"""Whatever a model is made of, watching it changes no bit, loses no node, happens once and never fails. Searched by hypothesis."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from loop import identical
from programs import LENGTH, WIDTH, Program, programs
from torch import Tensor, nn
from torch.fx import GraphModule

from foreshock import Watch
from foreshock._torch import lookup_backend

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {"deadline": None, "database": None, "suppress_health_check": [*HealthCheck], "print_blob": True}
FEW = settings(**COMMON, max_examples=8, derandomize=True)
MANY = settings(**COMMON, max_examples=300, derandomize="CI" in os.environ)

Graph = list[tuple[str, str]]


class Recording:
    """An inner compiler that keeps the nodes of each graph it is given: foreshock's own apart from the model's."""

    def __init__(self, inner: str) -> None:
        self.inner = lookup_backend(inner)
        self.graphs: list[tuple[Graph, int]] = []

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        own = [node for node in module.graph.nodes if "foreshock" in node.meta]
        model = [node for node in module.graph.nodes if "foreshock" not in node.meta]
        self.graphs.append(([(node.op, str(node.target)) for node in model], len(own)))
        compiled: Callable[..., Any] = self.inner(module, inputs)
        return compiled


def _results(model: nn.Module, compiled: Any) -> list[Tensor | None] | str:
    """Output and gradients of two passes, or what PyTorch says where the model itself is none."""
    found: list[Tensor | None] = []
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(2):
            x = torch.randn(2, LENGTH, WIDTH, generator=generator).requires_grad_()
            out = compiled(x)
            found.append(out.detach())
            if out.requires_grad:
                out.square().mean().backward()
            found += [x.grad, *(p.grad for p in model.parameters())]
            model.zero_grad()
    except RuntimeError as error:  # a tensor that the backward needs was written in place: so it is without foreshock
        if "modified by an inplace operation" not in str(error):
            raise
        return "modified in place"
    return found


def _equal(one: list[Tensor | None] | str, other: list[Tensor | None] | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return len(one) == len(other) and all(
        (a is None and b is None) or (a is not None and b is not None and identical([a], [b]))
        for a, b in zip(one, other, strict=True)
    )


def _compiled(model: nn.Module, backend: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


def _check(program: Program, inner: str) -> None:
    plain = Recording(inner)
    expected = _results(program, _compiled(program, plain))
    recording = Recording(inner)
    with (
        Watch(every=1, inner=recording, strict=True) as behind,
        Watch(every=1, inner=behind.backend, strict=True) as watch,
    ):
        matches: list[str] = []
        watch.on_match = lambda view, match: matches.append(match.kind)
        got = _results(program, _compiled(program, watch.backend))
        assert _equal(got, expected)
        assert behind.sites == [], "a graph that is watched already got a second set of probes"
        assert watch.coverage.warnings == behind.coverage.warnings == ()
        graphs = [graph for graph, _ in plain.graphs]
        for graph, own in recording.graphs:
            assert graph in graphs, "a node of the model was lost, moved or added without a mark"
            assert own or not matches or len(recording.graphs) > 1
        for kind in sorted(set(matches)) or ["nothing"]:
            event(kind)


@given(programs())
@FEW
def test_graphs_as_dynamo_hands_them_out(program: Program) -> None:
    _check(program, "eager")


@given(programs())
@FEW
def test_graphs_through_autograd(program: Program) -> None:
    _check(program, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_many_graphs(inner: str) -> None:
    @given(programs())
    @MANY
    def search(program: Program) -> None:
        _check(program, inner)

    search()
