"""One pass over a graph's nodes: anchors are looked up by op name, so matching is linear in the graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from foreshock.errors import PatternError
from foreshock.patterns.attention import SDPA, described_by_schema
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import op, schema
from foreshock.patterns.pattern import Match, Miss, Pattern
from foreshock.patterns.router import ROUTER, last_per_weight
from foreshock.patterns.unwatched import UNWATCHED

BUILTIN: tuple[Pattern, ...] = (SDPA, ROUTER, *UNWATCHED)
_registered: list[Pattern] = []


def register(pattern: Pattern) -> Pattern:
    """Look for ``pattern`` in every graph captured from now on; it goes before the built-in ones. Returns it."""
    if not isinstance(pattern, Pattern):
        raise PatternError(
            f"registering a pattern: received {type(pattern).__name__}; give a foreshock.patterns.Pattern"
        )
    _registered[:] = [pattern, *(known for known in _registered if known.name != pattern.name)]
    return pattern


@dataclass(frozen=True)
class Findings:
    """Matches in graph order, near-misses, and errors of patterns that failed."""

    matches: tuple[Match, ...]
    misses: tuple[Miss, ...]
    errors: tuple[tuple[str, Exception], ...]


def find(view: GraphView, extra: Iterable[Pattern] = ()) -> Findings:
    """Every site of the graph. A pattern that raises is reported in ``errors`` and skipped for that node."""
    table: dict[str, list[Pattern]] = {}
    for pattern in (*extra, *_registered, *BUILTIN):
        for anchor in pattern.anchors:
            table.setdefault(anchor, []).append(pattern)
    matches: list[Match] = []
    misses: list[Miss] = []
    errors: list[tuple[str, Exception]] = []
    for node in list(view.graph.nodes):
        candidates = table.get(op(node), ())
        found: Match | Miss | None = None
        for pattern in candidates:
            try:
                found = pattern.match(view, node)
            except Exception as error:
                errors.append((pattern.name, error))
                continue
            if found:
                break
        if not candidates and _is_opaque(node):
            found = described_by_schema(view, node)
        if isinstance(found, Match):
            matches.append(found)
        elif isinstance(found, Miss) and not found.quiet:
            misses.append(found)
    routers = last_per_weight([match for match in matches if match.kind == "router" and "logits" in match.roles])
    kept = [match for match in matches if match.kind != "router" or "logits" not in match.roles or match in routers]
    of_routers = _on_the_way_to(routers, view) if misses and routers else set()
    return Findings(tuple(kept), tuple(miss for miss in misses if miss.anchor not in of_routers), tuple(errors))


def _on_the_way_to(routers: Iterable[Match], view: GraphView) -> set[Node]:
    """Selections between a router's logits and its choice belong to it. Masks may be written in place: order counts, not flow."""
    order = {node: position for position, node in enumerate(view.graph.nodes)}
    return {
        node
        for router in routers
        for node in view.forward_slice(router.roles["logits"])
        if order[node] < order[router.anchor]
    }


def _is_opaque(node: Node) -> bool:
    return node.op == "call_function" and "::" in op(node) and schema(node) is not None
