"""The state that the passes share: the copied graph, its sites, and the layout of what will come out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from foreshock.patterns import Match
from foreshock.records import Facts, Probe


@dataclass(frozen=True, slots=True)
class Quantity:
    """A stretch of a packed vector: ``size`` numbers of site ``site``, merged over microbatches by ``merge``."""

    site: int
    name: str
    size: int
    merge: str


@dataclass(eq=False)
class SitePlan:
    """A match in the copied graph with the probe chosen for it."""

    index: int
    label: str
    match: Match
    probe: Probe
    facts: Facts


@dataclass(eq=False)
class Plan:
    """One graph being rewritten."""

    module: GraphModule
    sites: list[SitePlan]
    fake_mode: Any
    device: torch.device
    rows: int
    strict: bool
    report: Callable[[str, Exception], None] | None = None  # for failures that show only once the graph runs
    forward: list[Quantity] = field(default_factory=list)
    backward: list[Quantity] = field(default_factory=list)
    pieces: list[Node] = field(default_factory=list)
    packed: list[Node] = field(default_factory=list)
    failures: list[tuple[str, Exception]] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        return self.module.graph

    @property
    def slot_size(self) -> int:
        return sum(quantity.size for quantity in self.backward)

    def needs_autocast_guard(self) -> bool:
        """Whether an autocast region, of the caller or in the graph, could reach inserted arithmetic."""
        if torch.is_autocast_enabled(self.device.type):
            return True
        return any("autocast" in getattr(node.target, "__name__", "") for node in self.graph.nodes)

    def fail(self, what: str, error: Exception) -> None:
        """Record a failure and go on; under ``strict`` it is raised."""
        if self.strict:
            raise error
        self.failures.append((what, error.with_traceback(None)))  # frames would keep the first batch alive
