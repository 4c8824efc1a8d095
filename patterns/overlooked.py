"""Attention in a form that no pattern knows: none is missed in silence.

What every attention has in common, however it is written: a product of two activations (queries and keys) goes through a
nonlinear function into another product with an activation (values). Where that stands in a graph and is neither a site nor a
near-miss already, it is a site if the function is a softmax and the first product tells heads, queries and keys: with its weights,
but without laws, for what happens between the products is not known. Else it is a near-miss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable

from torch.fx import Node

from foreshock.patterns.axes import Operand, heads_of, layouts
from foreshock.patterns.boundary import LAWS, coarsest_dtype, traced_weights
from foreshock.patterns.coordinates import RULES, Columns
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import args, op, shape
from foreshock.patterns.pattern import Match, Miss
from foreshock.patterns.products import Product, product
from foreshock.patterns.pullback import Pull

UNKNOWN = "attention in an unknown form"
_SOFTMAXES = frozenset({"softmax", "softmin", "gumbel_softmax", "log_softmax", "exp"})
_SITES = frozenset({"softmax", "softmin", "gumbel_softmax"})
_BENT = frozenset({"sigmoid", "relu", "square"})
_NONLINEAR = _SOFTMAXES | _BENT
_COPIES = RULES.keys() | {"identity", "cast"}
_PRODUCTS = frozenset({"matmul", "baddbmm", "einsum", "sum"})
_PICKS = frozenset({"embedding", "getitem", "index_select", "index"})
_NEAR = 256  # nodes looked at on the way back from a product


def overlooked(view: GraphView, results: Iterable[Match | Miss]) -> list[Match | Miss]:
    """A site or a near-miss for each product that sums something over the keys of an unknown attention."""
    candidates = [node for node in view.graph.nodes if op(node) in _PRODUCTS]
    if not candidates:
        return []
    known = list(results)
    told = {result.anchor for result in known if isinstance(result, Miss) and not result.quiet}
    for match in known:
        if isinstance(match, Match) and match.kind == "attention":
            told |= {match.edge(role).node for role in match.operands} | set(match.roles.values()) | {match.anchor}
    pull = Pull(view)
    found: list[Match | Miss] = []
    for node in candidates:
        met = _of_activations(view, pull, node)
        if met is not None and node not in told:
            way = _way_back(view, pull, met)
            if way and told.isdisjoint(way):
                found.append(_site(view, way) or _miss(view, node, way))
                told.update(way)
    return found


def _site(view: GraphView, way: list[Node]) -> Match | Miss:
    """The attention whose queries and keys meet at the end of ``way``, as far as their product tells; falsy if it does not."""
    met = product(way[-1])
    soft = next((step for step in way if _SITES & {op(inner) for inner in (step, *_inside(view, step))}), None)
    if met is None or soft is None or len(met.edges) != 2:
        return Miss(way[-1], "no softmax of a product of two")
    axes = [[a for a, letter in enumerate(met.result) if _is_own(met, letter, side)] for side in (0, 1)]
    if not all(axes):
        return Miss(way[-1], "the product does not tell queries from keys")
    frame = shape(met.node) or ()

    def operand(side: int) -> Operand:
        def place(c: Columns) -> Columns:
            return met.place(side, dict(zip(met.result, c, strict=True)))

        return Operand(met.edges[side].source, place, met.channels(side, set(met.result)), met.node)

    operands = {"q": operand(0), "k": operand(1)}
    layout = layouts(view, frame, operands, keys=axes[1][-1], queries=axes[0][-1])
    if isinstance(layout, str):
        return Miss(way[-1], layout)
    roles = {role: operands[role].node for role in ("q", "k")}
    sizes = {role: heads_of(layout[role], shape(node) or ()) for role, node in roles.items()}
    if sizes["q"][1] % sizes["k"][1] or sizes["q"][3] != sizes["k"][3]:
        return Miss(way[-1], "its heads do not fit each other")
    traced = traced_weights(view, roles, layout, sizes)
    return Match(
        kind="attention",
        pattern=UNKNOWN,
        anchor=soft,
        roles=roles,
        layout=layout,
        facts={
            "heads": sizes["q"][1],
            "kv_heads": traced.kv_heads,
            "head_dim": sizes["q"][3],
            "causal": None,
            "scale": None,
            "dropout": float("nan"),
            "masked": True,
            "dtype": coarsest_dtype(list(roles.values())),
            **traced.facts,
        },
        laws=dict.fromkeys(LAWS, "what happens between its products is not known"),
        weights=traced.weights,
        sources=traced.sources,
        notes=("queries and keys are told by their order alone", *traced.notes),
    )


def _is_own(met: Product, letter: Hashable, side: int) -> bool:
    """Whether an axis of a product comes from one operand alone."""
    return letter in met.sizes(side) and letter not in met.sizes(1 - side)


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
