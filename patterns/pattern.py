"""What a pattern is: an anchor op, and a check of its surroundings that yields a match or says why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch.fx import Node

from foreshock.patterns.graph import GraphView
from foreshock.records import WeightView


class Edge(NamedTuple):
    """Where a tensor enters a kernel: an argument of a node, by position or keyword."""

    node: Node
    where: int | str

    @property
    def source(self) -> Node:
        """What stands there now."""
        found = self.node.kwargs[self.where] if isinstance(self.where, str) else self.node.args[self.where]
        assert isinstance(found, Node)
        return found


@dataclass(frozen=True)
class Match:
    """A functional boundary in one graph.

    ``roles`` names the tensors there; ``operands`` are the roles that enter the kernel, with the `Edge` on which each does (a
    position or keyword stands for an argument of the anchor): gradient taps sit on exactly those edges. Without operands a tap
    stands on the tensor of role ``tapped`` and all its users. ``layout`` says how each role's tensor lies (see
    `foreshock.layout`). ``facts`` become fields of the `Site`. ``laws`` maps a law to "" where it holds here, else to the reason
    why not. ``sources`` are the placeholders behind each of ``weights``.
    """

    kind: str
    pattern: str
    anchor: Node
    roles: Mapping[str, Node]
    operands: Mapping[str, Edge | int | str] = field(default_factory=dict)
    tapped: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)
    laws: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, WeightView] = field(default_factory=dict)
    sources: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    view: GraphView | None = None  # of the graph or body in which it stands; `find` fills it in

    def edge(self, role: str) -> Edge:
        """Where ``role`` enters the kernel."""
        where = self.operands[role]
        return where if isinstance(where, Edge) else Edge(self.anchor, where)

    def with_note(self, note: str) -> Match:
        return replace(self, notes=(*self.notes, note))


@dataclass(frozen=True)
class Miss:
    """Falsy: an anchor that turned out to be something else, with the reason."""

    anchor: Node
    reason: str
    quiet: bool = False

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        where = line_of(self.anchor)
        return f"{self.anchor.name}: {self.reason}{f' ({where})' if where else ''}"


def line_of(node: Node) -> str:
    """The innermost line of the user's source that made ``node``, "" where Dynamo recorded none."""
    trace = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    files = [position for position, line in enumerate(trace) if line.startswith("File ")]
    return " ".join(trace[files[-1] : files[-1] + 2]) if files else ""


@dataclass(frozen=True)
class Pattern:
    """``anchors`` are canonical op names (see `foreshock.patterns.ops`); ``match`` looks around one anchor."""

    name: str
    anchors: frozenset[str]
    match: Callable[[GraphView, Node], Match | Miss]

    @property
    def beside(self) -> bool:
        """Whether its sites may stand where another pattern finds one too."""
        return False

    def results(self, view: GraphView, node: Node) -> list[Match | Miss]:
        """All that is found around one anchor: matches, or one miss."""
        return [self.match(view, node)]
