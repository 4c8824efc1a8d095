"""Mixture-of-experts routers: scores over experts, one row of a weight each, a choice among them, and experts that use the choice.

Any op that chooses along an axis is an anchor. Its scores must come from a projection with one output row an expert; what becomes
of the choice tells a router from a metric, a codebook or a sparse activation (`foreshock.patterns.dispatch`). Several choices may
belong to one router (groups first, the second best after the best): `foreshock.patterns.decisions` joins them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from foreshock.errors import PatternError
from foreshock.patterns.coordinates import number
from foreshock.patterns.described import check_node, check_op
from foreshock.patterns.dispatch import SCORINGS, Fate, fate
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import args, argument, described, dtype, op, shape, tensor
from foreshock.patterns.pattern import Match, Miss, Pattern
from foreshock.patterns.provenance import Origin, Untraced, trace_features, weight_view
from foreshock.patterns.pullback import Pull
from foreshock.patterns.selection import SELECTIONS, Selection, selections
from foreshock.patterns.sharded import among_all

_TOKENS_NEAR = 16  # steps from a projection back to the tokens it reads
_VIEWS = frozenset({"cast", "identity", "reshape", "transpose", "permute", "t", "mT", "dropout", "getitem"})
_PLAIN = _VIEWS | {"mul", "div", "tanh", "add", "clamp"}  # leave the logits what they are; so does a softcap
_NORMS = frozenset({"mul", "div", "rms_norm", "layer_norm", "normalize"})
_DESCRIBED = ("softmax", "sigmoid")


@dataclass(frozen=True)
class _Scores:
    """Where the scores of a selection come from, and along which axis its experts lie."""

    origin: Origin
    axis: int
    by_tokens: bool


@dataclass(frozen=True)
class _Bias:
    """The scores as they were and the bias, ``experts`` numbers, that was added to them or subtracted for the choice."""

    unbiased: Node
    bias: Node
    subtracted: bool


def _match(view: GraphView, node: Node) -> Match | Miss:
    found = selections(node)
    if isinstance(found, str):
        return Miss(node, found, quiet=not found)
    reason = Miss(node, "", quiet=True)
    for selection in found:
        result = _router(view, selection)
        if result:
            return result
        reason = result if isinstance(result, Miss) else reason
    return reason


def _router(view: GraphView, selection: Selection) -> Match | Miss:
    node, quiet = selection.node, selection.kind == "threshold"
    if selection.size < 2 and selection.kind != "threshold":
        return Miss(node, "fewer than two experts", quiet=True)
    scores = _scores(view, selection)
    if isinstance(scores, str):
        return Miss(node, scores if quiet else _without_weight(view, selection, scores), quiet=quiet)
    origin, experts = scores.origin, (shape(selection.scores) or ())[scores.axis]
    if selection.kind == "topk" and selection.top_k == selection.size:
        return Miss(node, f"takes all of its {selection.size} scores: nothing is chosen")
    path = [step for step in origin.path if step.graph is view.graph]
    start = origin.projection if origin.projection.graph is view.graph else path[0] if path else selection.scores
    tokens = math.prod(shape(selection.scores) or ()) // experts
    seen = fate(view, start, node, selection.chosen, tokens, frozenset(origin.sources))
    reason = _tokens_unused(seen, experts) if scores.by_tokens else _unused(view, seen, origin)
    if reason:
        return Miss(node, reason, quiet=quiet or seen.echoed)
    return _described(view, selection, scores, path, start, seen)


def _scores(view: GraphView, selection: Selection) -> _Scores | str:
    """The axis of experts is that along which each score comes from a row of its own."""
    sizes = shape(selection.scores) or ()
    origin = trace_features(view, selection.scores, selection.axis)
    if isinstance(origin, Untraced):
        return f"its scores lead to no weight: {origin.reason}"
    if any(_joins_tokens(step) for step in origin.path):
        return "its scores join those of several projections, as an auxiliary loss does"
    if _rows(origin) == selection.size and selection.size > 1:
        return _Scores(origin, selection.axis, False)
    others = [a for a in range(len(sizes)) if a != selection.axis and sizes[a] > 1]
    for axis in others if _rows(origin) == 1 else ():
        other = trace_features(view, selection.scores, axis)
        if isinstance(other, Origin) and _rows(other) == sizes[axis]:
            return _Scores(other, axis, selection.kind != "threshold")
    if _rows(origin) == 1:
        return "one score a token: it chooses among tokens, not among experts"
    return f"its {selection.size} scores are not one row of a weight each"


def _without_weight(view: GraphView, selection: Selection, reason: str) -> str:
    """``reason``, and whether a router may have been missed: only where something is dispatched."""
    tokens = math.prod(shape(selection.scores) or ()) // selection.size
    seen = fate(view, selection.scores, selection.node, selection.chosen, tokens, frozenset())
    return reason if seen.tokens or seen.experts else f"nothing is dispatched by its choice, and {reason}"


def _rows(origin: Origin) -> int:
    """How many rows of the weight the elements come from; 0 where some come from elsewhere."""
    return len(set(origin.index.reshape(-1).tolist())) if origin.channels is None else 0


def _joins_tokens(step: Node) -> bool:
    axes = len(shape(step) or (0,))
    return op(step) == "stack" or (op(step) == "cat" and argument(step, 1, "dim", 0) % axes != axes - 1)


def _unused(view: GraphView, seen: Fate, origin: Origin) -> str:
    """Why a choice among experts is not a router's, or ""."""
    if seen.drawn:
        return "its choice is drawn from at random: sampling"
    if seen.rechosen:
        return "what it chooses is chosen from again: keys in parts, and not one row of a weight an expert"
    if seen.tokens or seen.experts or (seen.leaves and seen.weights_leave and _tokens_leave(view, origin)):
        return ""
    if seen.compared:
        return "nothing is dispatched by its choice, which is only compared: a metric"
    if seen.dense:
        return "what it chooses goes straight into a dense layer: a sparse activation or a codebook, no experts"
    return "nothing is dispatched by its choice"


def _tokens_unused(seen: Fate, experts: int) -> str:
    if seen.tokens and (seen.experts or len(seen.pieces) >= experts):
        return ""
    return f"chooses among tokens by {experts} scores, and nothing has weights for each of them"


def _tokens_leave(view: GraphView, origin: Origin) -> bool:
    """Whether experts in another graph could read what the router reads: a graph break stands between them."""
    node, size = _input(view, origin), -1
    for _ in range(_TOKENS_NEAR):
        if node is None or math.prod(shape(node) or (0,)) != (
            size := math.prod(shape(node) or (0,)) if size < 0 else size
        ):
            return False
        if node.op == "placeholder" or any(user.op == "output" for user in node.users):
            return True
        if op(node) not in _VIEWS and op(node) not in _NORMS:
            return False
        sources = [x for x in node.all_input_nodes if math.prod(shape(x) or (0,)) == size]
        node = sources[0] if sources else None
    return False


def _input(view: GraphView, origin: Origin) -> Node | None:
    """What the projection reads, if it stands in this graph."""
    product = Pull(view).projection(view, origin.projection) if origin.projection.graph is view.graph else None
    return None if product is None else product[0].operands[1 - product[1]]


def _described(
    view: GraphView, selection: Selection, scores: _Scores, path: Sequence[Node], start: Node, seen: Fate
) -> Match | Miss:
    origin, sizes = scores.origin, shape(selection.scores) or ()
    experts = sizes[scores.axis]
    at = next((i for i, step in enumerate(path) if _scoring(step, path[i:])), len(path))
    logits = _logits(view, path[:at], start)
    word = f"{selection.kind} over tokens" if scores.by_tokens else selection.kind
    after = seen.scoring or seen.beside
    if at < len(path):
        scoring = _scoring(path[at], path[at:])
        pattern = f"{scoring} > {word}"
    else:
        scoring = _scoring(after, _users(after)) if after is not None else ""
        pattern = f"{word} > {scoring}" if scoring else word
    roles = {"logits": logits, "scores": selection.scores}
    roles["chosen" if selection.mask else "indices"] = selection.chosen
    source = _input(view, origin)
    if source is not None:
        roles["input"] = source
    bias = _bias(view, path[path.index(logits) + 1 :] if logits in path else path, experts)
    if bias is not None and shape(bias.unbiased) == sizes:
        roles |= {"unbiased": bias.unbiased, "bias": bias.bias}
    facts: dict[str, Any] = {
        "experts": experts,
        "top_k": _threshold_of(selection) if selection.kind == "threshold" else selection.top_k,
        "scoring": scoring or "none",
        "selection": "tokens" if scores.by_tokens else selection.kind,
        "biased": bias is not None,
        "dtype": dtype(logits),
    }
    if bias is not None and bias.subtracted:
        facts["bias_subtracted"] = True
    axes = {"logits": _axis(view, logits, experts), "scores": scores.axis, "chosen": selection.axis}
    if any(axis != len(shape(roles.get(role, selection.scores)) or ()) - 1 for role, axis in axes.items()):
        facts["axes"] = axes
    first = _first_expert(view, logits, axes["logits"], origin, experts)
    if first is None:
        return Miss(selection.node, "which of its logits its experts have is not followed")
    if first:
        facts["first_expert"] = first
    if selection.inverted:
        facts["inverted"] = True
    among = among_all(origin.parameter, origin.axes, experts)
    if among is not None:
        facts["experts_offset"], facts["experts_of"] = among
    weight = weight_view(view, origin)
    return Match(
        kind="router",
        pattern=pattern,
        anchor=selection.chosen,
        roles=roles,
        tapped="logits",
        facts=facts,
        weights={"weight": weight} if weight is not None else {},
        sources={"weight": origin.sources},
    )


def _scoring(node: Node, following: Sequence[Node]) -> str:
    """The name of a scoring function that begins at ``node``, or ""."""
    later = [op(step) for step in following]
    if op(node) == "softplus" and "sqrt" in later:
        return "sqrtsoftplus"
    if op(node) == "exp":
        return "softmax" if "div" in later else ""
    return SCORINGS.get(op(node), "")


def _users(node: Node | None) -> list[Node]:
    return [user for user in node.users for user in (user, *user.users)] if node is not None else []


def _logits(view: GraphView, path: Sequence[Node], start: Node) -> Node:
    """How far ``path`` leaves the projection's output what it is: before masks, noise and biases that only move the choice."""
    logits = start
    for step in path:
        if op(step) not in _PLAIN or tensor(step) is None:
            break
        others = [x for x in step.all_input_nodes if x is not logits and tensor(x) is not None]
        if op(step) == "add" and (
            not all(Pull(view).is_weight(view, x, step) for x in others) or _has_other_use(logits, step)
        ):
            break
        if op(step) in ("mul", "div") and any(Pull(view).varies(view, x) for x in others):
            break
        logits = step
    return logits


def _has_other_use(node: Node, step: Node) -> bool:
    """Whether ``node``, or what it is a view of, is read by more than ``step``."""
    while True:
        if any(user is not step and (tensor(user) is not None or user.op == "output") for user in node.users):
            return True
        if op(node) not in _VIEWS or not isinstance(args(node)[0], Node):
            return False
        node, step = args(node)[0], node


def _bias(view: GraphView, path: Sequence[Node], experts: int) -> _Bias | None:
    """One number an expert, added on ``path``, that no token made, while what it is added to is used without it."""
    for step in path:
        summands = [x for x in step.all_input_nodes if tensor(x) is not None] if op(step) in ("add", "sub") else []
        fixed = [x for x in summands if math.prod(shape(x) or ()) == experts and _is_given(view, x)]
        others = [x for x in summands if x not in fixed]
        if fixed and any(_has_other_use(x, step) for x in others):
            return _Bias(others[0], fixed[0], op(step) == "sub" and args(step)[1] is fixed[0])
    return None


def _is_given(view: GraphView, node: Node) -> bool:
    """Whether ``node`` is a parameter, a buffer, a constant or an input of the graph as it is."""
    while op(node) in _VIEWS and isinstance(args(node)[0], Node):
        node = args(node)[0]
    return node.op == "placeholder" or not Pull(view).varies(view, node)


def _axis(view: GraphView, node: Node, experts: int) -> int:
    """The axis of ``node`` along which experts lie."""
    sizes = shape(node) or ()
    for axis in reversed(range(len(sizes))):
        if sizes[axis] == experts:
            origin = trace_features(view, node, axis)
            if isinstance(origin, Origin) and _rows(origin) == experts:
                return axis
    return len(sizes) - 1


def _first_expert(view: GraphView, logits: Node, axis: int, origin: Origin, experts: int) -> int | None:
    """Where along ``axis`` of the logits the experts that are chosen from begin: shared experts may have logits beside theirs."""
    if (shape(logits) or ())[axis] == experts:
        return 0
    every = trace_features(view, logits, axis)
    if not isinstance(every, Origin):
        return None
    rows, chosen = every.index.reshape(-1).tolist(), origin.index.reshape(-1).tolist()
    first = rows.index(chosen[0]) if chosen[0] in rows else len(rows)
    return first if rows[first : first + experts] == chosen else None


def _threshold_of(selection: Selection) -> int | None:
    """k, where the threshold is the k-th score."""
    others = [x for x in selection.node.all_input_nodes if x is not selection.scores]
    for _ in range(4):
        for x in others:
            if op(x) == "topk":
                return number(argument(x, 1, "k"))
        others = [args(x)[0] for x in others if op(x) in _VIEWS and isinstance(args(x)[0], Node)]
    return None


ROUTER = Pattern("router", SELECTIONS, _match)


def router_op(
    name: str, *, logits: int | str = 0, indices: int = 1, scoring: str = "softmax", top_k: int | None = None
) -> Pattern:
    """A pattern for an opaque router kernel, ``"namespace::name"``.

    ``logits`` says which argument (position or name) is ``[..., E]``; ``indices`` which result holds the chosen experts,
    ``[..., k]``; ``scoring`` ("softmax" or "sigmoid") how probabilities come from logits.
    """
    check_op(name, {"logits": logits}, {"indices": indices})
    if scoring not in _DESCRIBED:
        raise PatternError(f"describing {name}: scoring is {scoring!r}; give one of {', '.join(_DESCRIBED)}")

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
                "selection": "topk",
                "dtype": dtype(source),
            },
            weights={"weight": weight} if weight is not None else {},
            sources={"weight": origin.sources} if isinstance(origin, Origin) else {},
            notes=notes,
        )

    return Pattern(name, frozenset({name}), match)
