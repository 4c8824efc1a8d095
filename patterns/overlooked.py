"""Attention in a form that no pattern knows: none is missed in silence.

What every attention has in common, however it is written: a product of two activations (queries and keys) goes through a
nonlinear function into another product with an activation (values). Where that stands in a graph and is neither a site nor a
near-miss already, it is a site if the function is a softmax and the first product tells heads, queries and keys: with its weights,
but without laws, for what happens between the products is not known. Else it is a near-miss. So is half of one that a graph break
cut: a softmax of what another graph made that weighs something, or one of a product that goes out into another graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable

from torch.fx import Node

from foreshock.patterns.axes import Operand, heads_of, layouts
from foreshock.patterns.boundary import LAWS, coarsest_dtype, traced_weights
from foreshock.patterns.coordinates import RULES, Columns
from foreshock.patterns.graph import GraphView
from foreshock.patterns.meetings import MEETINGS, PRODUCTS, meeting
from foreshock.patterns.ops import args, op, shape, tensor
from foreshock.patterns.pattern import Match, Miss
from foreshock.patterns.products import Product
from foreshock.patterns.pullback import Pull

UNKNOWN = "attention in an unknown form"
_SOFTMAXES = frozenset({"softmax", "softmin", "gumbel_softmax", "log_softmax", "exp", "exp2"})
_SITES = frozenset({"softmax", "softmin", "gumbel_softmax"})
_BENT = frozenset({"sigmoid", "relu", "square"})
_CUT = "if it is an attention, a graph break stands in its middle, and it is not watched"
_COPIES = RULES.keys() | {"identity", "cast"}
_PICKS = frozenset({"embedding", "getitem", "index_select", "index"})
_NEAR = 256  # nodes looked at on the way back from a product
_AFTER = 8  # and behind a softmax, on the way out of the graph


def overlooked(view: GraphView, results: Iterable[Match | Miss]) -> list[Match | Miss]:
    """A site or a near-miss for each product that sums something over the keys of an unknown attention."""
    candidates = [node for node in view.graph.nodes if op(node) in PRODUCTS]
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
    for node in view.graph.nodes:
        if op(node) in _SITES and node not in told and _leaves(node):
            way = _walk(view, pull, [node])
            if way and way[-1].op != "placeholder":
                found.append(Miss(node, f"`{op(node)}` of a product goes out of this graph: {_CUT}"))
    return found


def _site(view: GraphView, way: list[Node]) -> Match | Miss:
    """The attention whose queries and keys meet at the end of ``way``, as far as their product tells; falsy if it does not."""
    met = meeting(way[-1])
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
    met = meeting(node) if op(node) in MEETINGS else None
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
    return _walk(view, pull, [edge.source for edge in weighing])


def _walk(view: GraphView, pull: Pull, starts: list[Node]) -> list[Node]:
    """From ``starts`` through a nonlinear function back to a product of activations, or through a softmax to what another graph
    made: the nodes between, or none."""
    waiting: deque[tuple[Node, str, tuple[Node, ...]]] = deque((start, "", ()) for start in starts)
    seen: set[tuple[Node, str]] = set()
    cut: list[Node] = []
    while waiting and len(seen) < _NEAR:
        node, bent, way = waiting.popleft()
        if (node, bent) in seen:
            continue
        way = (*way, node)
        if node.op not in ("call_function", "call_method"):
            cut = cut or (list(way) if bent == "soft" and _is_made_elsewhere(view, pull, way) else [])
            continue
        seen.add((node, bent))
        if _of_activations(view, pull, node) is not None:
            if bent:
                return list(way)
            continue
        if pull.projection(view, node) is not None:
            continue
        names = {_name(inner) for inner in (node, *_inside(view, node))}
        bent = "soft" if names & _SOFTMAXES else bent or ("bent" if names & _BENT else "")
        waiting.extend((source, bent, way) for source in view.dataflow.predecessors(node))
    return cut


def _name(node: Node) -> str:
    """What a node does, powers of a number being exponentials."""
    of_number = op(node) == "pow" and isinstance(args(node)[0], int | float)
    return "exp" if of_number else op(node)


def _is_made_elsewhere(view: GraphView, pull: Pull, way: tuple[Node, ...]) -> bool:
    """Whether what enters the softmax on ``way`` is a graph input of its size that learns: logits that another graph made."""
    soft = next(step for step in way if {_name(inner) for inner in (step, *_inside(view, step))} & _SOFTMAXES)
    fake = tensor(way[-1])
    learns = fake is not None and fake.requires_grad and pull.varies(view, way[-1])
    return learns and len(shape(soft) or ()) > 2 and shape(soft) == shape(way[-1]) and view.parent is None


def _leaves(node: Node) -> bool:
    """Whether a tensor goes out of the graph as it is, or after a dropout."""
    waiting = deque([node])
    for _ in range(_AFTER):
        if not waiting:
            return False
        for user in waiting.popleft().users:
            if user.op == "output":
                return len(shape(node) or ()) > 2
            if op(user) in _COPIES or op(user) == "dropout":
                waiting.append(user)
    return False


def _inside(view: GraphView, node: Node) -> list[Node]:
    """What ``node`` does where it calls a graph: a softmax may be an autograd.Function."""
    return list(view.children[node].graph.nodes) if node in view.children else []


def _miss(view: GraphView, node: Node, way: list[Node]) -> Miss:
    steps = [(step, inner) for step in way for inner in (step, *_inside(view, step))]
    soft = next((inner for _, inner in steps if _name(inner) in _SOFTMAXES), None)
    bent = soft or next(inner for _, inner in steps if op(inner) in _BENT)
    at = next(step for step, inner in steps if inner is bent)
    if way[-1].op == "placeholder":
        return Miss(at, f"`{op(bent)}` of what another graph made weighs what `{node.name}` sums: {_CUT}")
    what = f"`{op(bent)}` of a product weighs what `{node.name}` sums: "
    if soft is None:
        return Miss(at, what + "an attention without a softmax, for which no law is known")
    return Miss(at, what + "an attention in a form that is not known; describe it with `foreshock.patterns.subgraph`")
