"""Fixtures shared by the tests: a captured graph with its sites, a deterministic process, a small training loop."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.fx import GraphModule, Node

from foreshock.patterns import Findings, GraphView, Match, Pattern, find


@dataclass(eq=False)
class Captured:
    """One graph as Dynamo handed it out, with the sites found in it."""

    module: GraphModule
    inputs: list[Any]
    view: GraphView
    findings: Findings
    result: Any

    @property
    def output(self) -> Node:
        """The first node that the graph returns."""
        return next(iter(reversed(self.module.graph.nodes))).args[0][0]

    @property
    def match(self) -> Match:
        (match,) = self.findings.matches
        return match

    @property
    def reasons(self) -> list[str]:
        return [miss.reason for miss in self.findings.misses]


@pytest.fixture
def capture() -> Iterator[Callable[..., Captured]]:
    """``capture(callable, *args, extra=(patterns,))``: the single graph of one call, run eagerly."""

    def run(call: Any, *args: Any, extra: tuple[Pattern, ...] = (), **kwargs: Any) -> Captured:
        seen: list[Captured] = []

        def backend(module: GraphModule, inputs: list[Any]) -> Any:
            names = {id(p): n for n, p in call.named_parameters()} if isinstance(call, nn.Module) else None
            view = GraphView.of(module.graph, inputs, lambda parameter: (names or {}).get(id(parameter)))
            seen.append(Captured(module, list(inputs), view, find(view, extra), None))
            return module.forward

        torch._dynamo.reset()
        result = torch.compile(call, backend=backend, fullgraph=True)(*args, **kwargs)
        (captured,) = seen
        captured.result = result
        return captured

    yield run
    torch._dynamo.reset()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, fresh Dynamo caches, a fixed seed: what bitwise comparisons need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def warnings_logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What foreshock said at level WARNING or above so far."""
    caplog.set_level(logging.WARNING, logger="foreshock")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "foreshock"]
