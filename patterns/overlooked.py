"""Attention in a form that no pattern knows: named in the ledger, so that none is missed in silence.

What every attention has in common, however it is written: a product of two activations (queries and keys) goes through a
nonlinear function into another product with an activation (values). Where that stands in a graph and is neither a site nor a
near-miss already, it is a near-miss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from torch.fx import Node

from foreshock.patterns.coordinates import RULES
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import args, op
from foreshock.patterns.pattern import Match, Miss
from foreshock.patterns.products import Product, product
from foreshock.patterns.pullback import Pull

_SOFTMAXES = frozenset({"softmax", "softmin", "gumbel_softmax", "log_softmax", "exp"})
_BENT = frozenset({"sigmoid", "relu", "square"})
_NONLINEAR = _SOFTMAXES | _BENT
_COPIES = RULES.keys() | {"identity", "cast"}
_PRODUCTS = frozenset({"matmul", "baddbmm", "einsum", "sum"})
_PICKS = frozenset({"embedding", "getitem", "index_select", "index"})
_NEAR = 256  # nodes looked at on the way back from a product


def overlooked(view: GraphView, results: Iterable[Match | Miss]) -> list[Miss]:
    """A near-miss for each product that sums something over the keys of an unknown attention."""
    candidates = [node for node in view.graph.nodes if op(node) in _PRODUCTS]
    if not candidates:
        return []
    known = list(results)
    told = {result.anchor for result in known if isinstance(result, Miss) and not result.quiet}
    for match in known:
        if isinstance(match, Match) and match.kind == "attention":
            told |= {match.edge(role).node for role in match.operands} | set(match.roles.values()) | {match.anchor}
    pull, found = Pull(view), []
    for node in candidates:
        met = _of_activations(view, pull, node)
        if met is not None and node not in told:
            way = _way_back(view, pull, met)
            if way and told.isdisjoint(way):
                found.append(_miss(view, node, way))
                told.update(way)
    return found


def _of_activations(view: GraphView, pull: Pull, node: Node) -> Product | None:
    """``node`` as a product of two or more tensors that all vary with the data."""
    met = product(node) if op(node) in _PRODUCTS else None
    if met is None or not any(set(met.sizes(side)) - set(met.result) for side in range(len(met.edges))):
        return None
    return met if sum(_is_activation(view, pull, edge.source) for edge in met.edges) > 1 else None


def _is_activation(view: GraphView, pull: Pull, node: Node) -> bool:
    """Whether a tensor varies with the data, and is more than rows picked from a parameter."""
    if not pull.varies(view, node):
        return False
    while op(node) in _COPIES and isinstance(args(node)[0], Node):
        node = args(node)[0]
    table = args(node)[1 if op(node) == "embedding" else 0] if op(node) in _PICKS else None
    return not (isinstance(table, Node) and pull.is_weight(view, table, node))


def _way_back(view: GraphView, pull: Pull, met: Product) -> list[Node]:
    """From ``met`` through a nonlinear function back to another product of activations: the nodes between, or none."""
    sides = [(set(met.sizes(side)), edge) for side, edge in enumerate(met.edges)]
    weighing = [
        edge for own, edge in sides if any(other - own for other, _ in sides)
    ]  # others have channels of their own
    waiting: deque[tuple[Node, bool, tuple[Node, ...]]] = deque((edge.source, False, ()) for edge in weighing)
    seen: set[tuple[Node, bool]] = set()
    while waiting and len(seen) < _NEAR:
        node, bent, way = waiting.popleft()
        if (node, bent) in seen or node.op not in ("call_function", "call_method"):
            continue
        seen.add((node, bent))
        way = (*way, node)
        if _of_activations(view, pull, node) is not None:
            if bent:
                return list(way)
            continue
        if pull.projection(view, node) is not None:
            continue
        bent = bent or op(node) in _NONLINEAR or _NONLINEAR.intersection(map(op, _inside(view, node))) != set()
        waiting.extend((source, bent, way) for source in view.dataflow.predecessors(node))
    return []


def _inside(view: GraphView, node: Node) -> list[Node]:
    """What ``node`` does where it calls a graph: a softmax may be an autograd.Function."""
    return list(view.children[node].graph.nodes) if node in view.children else []


def _miss(view: GraphView, node: Node, way: list[Node]) -> Miss:
    steps = [(step, inner) for step in way for inner in (step, *_inside(view, step))]
    soft = next((inner for _, inner in steps if op(inner) in _SOFTMAXES), None)
    bent = soft or next(inner for _, inner in steps if op(inner) in _BENT)
    at = next(step for step, inner in steps if inner is bent)
    what = f"`{op(bent)}` of a product weighs what `{node.name}` sums: "
    if soft is None:
        return Miss(at, what + "an attention without a softmax, for which no law is known")
    return Miss(at, what + "an attention in a form that is not known; describe it with `foreshock.patterns.subgraph`")
