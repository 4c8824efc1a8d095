"""Mixture-of-experts routers: scores over experts, a top-k over them, and experts that use the choice."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from foreshock.errors import PatternError
from foreshock.patterns.described import check_node, check_op
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import args, argument, described, op, shape, tensor
from foreshock.patterns.pattern import Match, Miss, Pattern
from foreshock.patterns.provenance import Origin, Untraced, trace_features, weight_view
from foreshock.patterns.pullback import projection_weight

_SCORINGS = ("softmax", "sigmoid")
# What experts do with the choice; a metric only compares, averages and returns it.
_DISPATCH = frozenset(
    {
        "mul",
        "matmul",
        "baddbmm",
        "einsum",
        "scatter",
        "scatter_add",
        "gather",
        "one_hot",
        "index_select",
        "index_add",
        "embedding",
    }
)


def _match_topk(view: GraphView, node: Node) -> Match | Miss:
    scores = argument(node, 0, "input")
    sizes = shape(scores)
    top_k, axis = argument(node, 1, "k"), argument(node, 2, "dim", -1)
    if sizes is None or not isinstance(top_k, int):
        return Miss(node, "its k is not a constant", quiet=True)
    if axis % len(sizes) != len(sizes) - 1:
        return Miss(node, f"selects over axis {axis}, not over the last axis where experts are")
    experts = sizes[-1]
    if experts < 2:
        return Miss(node, "fewer than two experts", quiet=True)
    values, indices = (next((u for u in node.users if op(u) == "getitem" and args(u)[1] == i), None) for i in (0, 1))
    if indices is None:
        return Miss(node, "the chosen indices are not used")
    reason = _not_dispatch(view, node, indices)
    if reason:
        return Miss(node, reason)
    origin = trace_features(view, scores)
    if isinstance(origin, Untraced):
        return Miss(node, f"its scores lead to no weight: {origin.reason}")
    if origin.index.size != experts or len(set(origin.index.reshape(-1).tolist())) != experts:
        return Miss(node, f"its {experts} scores are not one row of a weight each")
    logits = _logits(origin, scores)
    scoring = next((op(step) for step in origin.path if op(step) in _SCORINGS), None)
    if scoring is None:
        after = view.forward_slice(values) if values is not None else set()
        scoring = next((name for name in _SCORINGS if any(op(user) == name for user in after)), "none")
    weight = weight_view(view, origin)
    roles = {"logits": logits, "scores": scores, "indices": indices}
    source = (
        args(origin.projection)[0] if projection_weight(origin.projection) is not args(origin.projection)[0] else None
    )
    if isinstance(source, Node) and tensor(source) is not None and op(origin.projection) != "addmm":
        roles["input"] = source
    return Match(
        kind="router",
        pattern=f"{scoring} > topk" if scoring in [op(step) for step in origin.path] else f"topk > {scoring}",
        anchor=indices,
        roles=roles,
        tapped="logits",
        facts={
            "experts": experts,
            "top_k": top_k,
            "scoring": scoring,
            "dtype": str(getattr(tensor(logits), "dtype", "float32")).removeprefix("torch."),
        },
        weights={"weight": weight} if weight is not None else {},
        sources={"weight": origin.sources},
    )


def _logits(origin: Origin, scores: Node) -> Any:
    """What enters the scoring function; without one, what enters the selection. ``path`` runs from projection to scores."""
    for step in origin.path:
        if op(step) in _SCORINGS and isinstance(args(step)[0], Node):
            return args(step)[0]
    return scores


def _not_dispatch(view: GraphView, node: Node, indices: Node) -> str:
    after = view.forward_slice(node)
    if all(op(user) in ("getitem", "output", "identity", "cast", "reshape") for user in after):
        return ""  # the choice leaves this frame: a graph break stands between router and experts
    if any(op(user) == "multinomial" for user in after):
        return "its choice is drawn from at random: sampling"
    if any(_dispatches(node, user) for user in view.forward_slice(indices)):
        return ""
    return "nothing is dispatched by its choice"


def _dispatches(node: Node, user: Node) -> bool:
    """Whether experts may stand behind ``user``. A metric also multiplies, by numbers and masks, but learns nothing from it."""
    name = op(user)
    if name == "mul" and getattr(tensor(argument(node, 0, "input")), "requires_grad", False):
        return bool(getattr(tensor(user), "requires_grad", False))
    return name in _DISPATCH or "grouped_mm" in name


ROUTER = Pattern("router", frozenset({"topk"}), _match_topk)


def router_op(
    name: str, *, logits: int | str = 0, indices: int = 1, scoring: str = "softmax", top_k: int | None = None
) -> Pattern:
    """A pattern for an opaque router kernel, ``"namespace::name"``.

    ``logits`` says which argument (position or name) is ``[..., E]``; ``indices`` which result holds the chosen experts,
    ``[..., k]``; ``scoring`` ("softmax" or "sigmoid") how probabilities come from logits.
    """
    check_op(name, {"logits": logits}, {"indices": indices})
    if scoring not in _SCORINGS:
        raise PatternError(f"describing {name}: scoring is {scoring!r}; give one of {', '.join(_SCORINGS)}")

    def match(view: GraphView, node: Node) -> Match | Miss:
        check_node(name, node, {"logits": logits}, {"indices": indices})
        source = described(node, logits)
        chosen = next((u for u in node.users if op(u) == "getitem" and args(u)[1] == indices), None)
        sizes, picked = shape(source), shape(chosen)
        if not sizes or not picked or not isinstance(source, Node) or chosen is None:
            return Miss(node, "its logits or its chosen indices are no tensors of the graph")
        origin = trace_features(view, source)
        notes = () if origin else (f"the logits were not traced to a weight: {getattr(origin, 'reason', '')}",)
        weight = weight_view(view, origin)
        return Match(
            kind="router",
            pattern=name,
            anchor=node,
            roles={"logits": source, "scores": source, "indices": chosen},
            tapped="logits",
            facts={
                "experts": sizes[-1],
                "top_k": top_k or picked[-1],
                "scoring": scoring,
                "dtype": str(getattr(tensor(source), "dtype", "float32")).removeprefix("torch."),
            },
            weights={"weight": weight} if weight is not None else {},
            sources={"weight": origin.sources} if isinstance(origin, Origin) else {},
            notes=notes,
        )

    return Pattern(name, frozenset({name}), match)


def last_per_weight(matches: list[Match]) -> list[Match]:
    """Several selections may belong to one router: the last over its experts is the decision."""
    kept: dict[Node, Match] = {}
    for match in matches:
        kept[match.roles["logits"]] = match
    return list(kept.values())
