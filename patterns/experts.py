"""The experts' weights behind a router: parameters of three axes or more, one of which counts experts, that the choice leads to.

From a router's choice on, up to what the next site is made from, whatever depends on the choice is looked at; a weight that it
meets there and that holds one piece an expert, one after the other, holds experts. Experts with weights of their own, run in a
loop, have no such parameter, and those behind a graph break stand in another graph: a note says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch.fx import Node

from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import shape
from foreshock.patterns.pattern import Match
from foreshock.patterns.provenance import weight_of
from foreshock.patterns.pullback import Pull
from foreshock.patterns.sharded import on_this_rank
from foreshock.records import Stage

ROLE = "expert_weight"
_CHOSEN = ("indices", "chosen")
_FAR = 384  # nodes behind a choice that are looked at
_NOT_FOUND = "no experts: in this graph the choice meets no weight of three axes with one piece an expert"


def with_experts(matches: Sequence[Match]) -> list[Match]:
    """Routers with the weights of their experts as ``expert_weight_0`` and so on; with a note where there are none."""
    return [_with_experts(m, matches) if m.kind == "router" and m.view is not None else m for m in matches]


def _with_experts(match: Match, matches: Sequence[Match]) -> Match:
    view = match.view
    assert view is not None
    found: dict[Node, Stage] = {}
    for reader, x in _met(view, match, matches):
        held = _by_expert(view, x, reader, int(match.facts["experts"]))
        own = None if held is None else on_this_rank(held[1], held[0], ())
        if held is not None and isinstance(own, Stage):
            found.setdefault(held[0], own)
    for node in (node for other in matches for nodes in other.sources.values() for node in nodes):
        found.pop(node, None)
    if not found:
        return match.with_note(_NOT_FOUND)
    weights, sources = dict(match.weights), dict(match.sources)
    for number, (parameter, stage) in enumerate(found.items()):
        role = f"{ROLE}_{number}"
        weights[role], sources[role] = weight_of(view, parameter, stage), (parameter,)
    return replace(match, weights=weights, sources=sources)


def _met(view: GraphView, match: Match, matches: Sequence[Match]) -> Iterator[tuple[Node, Node]]:
    """Each weight of three axes that the choice leads to, behind the node that reads it."""
    chosen = {match.roles[role] for role in _CHOSEN if role in match.roles}
    start = min(view.order[node] for node in chosen)
    stop = min(
        (at for other in matches if other is not match for at in _beginnings(view, other, start)), default=start + _FAR
    )
    pull, derived = Pull(view), set(chosen)
    for node in list(view.order)[start : min(stop, start + _FAR)]:
        if node.op == "output" or derived.isdisjoint(view.dataflow.predecessors(node)):
            continue
        derived.add(node)
        for x in node.all_input_nodes:
            if x not in derived and sum(size > 1 for size in shape(x) or ()) > 2 and pull.is_weight(view, x, node):
                yield node, x


def _beginnings(view: GraphView, match: Match, start: int) -> Iterator[int]:
    """Where behind ``start`` a site's tensors, or what its weights are read by, stand in ``view``."""
    weights = [user for nodes in match.sources.values() for node in nodes for user in node.users]
    yield from (at for node in (*weights, *match.roles.values()) if (at := view.order.get(node, -1)) > start)


def _by_expert(view: GraphView, x: Node, reader: Node, experts: int) -> tuple[Node, Stage] | None:
    """The parameter behind ``x`` and where each expert's piece lies in it: along one axis, one after the other."""
    sizes, pull = shape(x) or (), Pull(view)
    for axis in (axis for axis, size in enumerate(sizes) if size == experts):
        c = tuple(np.arange(experts) if a == axis else 0 for a in range(len(sizes)))
        trail = pull(x, c, reader)
        held = shape(trail.node) if trail is not None and trail.node in view.parameters else None
        if trail is None or held is None or math.prod(sizes) > math.prod(held):
            continue
        moving = [a for a, column in enumerate(trail.coordinates) if np.unique(np.asarray(column)).size > 1]
        if len(moving) == 1 and held[moving[0]] % experts == 0:
            index = np.arange(held[moving[0]]).reshape(experts, -1)
            if np.array_equal(np.asarray(trail.coordinates[moving[0]]).reshape(-1), index[:, 0]):
                return trail.node, Stage(index, (moving[0],), tuple(range(experts)))
    return None
