"""Which laws hold at a router.

A softmax does not feel a number that is added to all of its logits. Where every gradient that comes back to the routing logits
has gone through a softmax along the experts, whole or over the chosen ones, a token's gradient therefore sums to zero over the
experts. Whatever else reads the logits and sends a gradient back (a z-loss, a sigmoid gate) takes that away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch.fx import Node

from foreshock.patterns.boundary import coarsest_dtype
from foreshock.patterns.coordinates import axes
from foreshock.patterns.graph import GraphView
from foreshock.patterns.logits import constant, differentiates
from foreshock.patterns.masks import HIDDEN
from foreshock.patterns.ops import args, argument, op, shape, tensor
from foreshock.patterns.pattern import Match

SHIFT, COUNT = "law/router_shift", "law/token_count"
_FAR = 64  # nodes behind the logits that are looked at
_SOFTMAXES = frozenset({"softmax", "log_softmax"})
_COPIES = frozenset({"cast", "identity"})
_HANDED = frozenset({"getitem", "attr.values"})
_FIXED = frozenset({"topk", "sort", "argmax"})


def with_router_laws(view: GraphView, match: Match) -> Match:
    """``match`` with the laws of a router, unless it is none or says itself what holds, and the coarsest dtype that its logits
    take on the way to a softmax."""
    if match.kind != "router" or match.laws or "logits" not in match.roles:
        return match
    reason, coarsest = _shift(view, match)
    return replace(match, laws={SHIFT: reason, COUNT: _count(match)}, facts={**match.facts, "dtype": coarsest})


def _count(match: Match) -> str:
    several = [role for role in match.roles if role.startswith("indices_")]
    if several:
        return "experts are chosen one after the other: what keeps them apart is the model's own mask"
    if "indices" not in match.roles or match.facts.get("selection", "topk") not in _FIXED:
        return "tokens get varying numbers of experts"
    return ""


def _shift(view: GraphView, match: Match) -> tuple[str, str]:
    """Why the law of shifts does not hold for the gradient of the logits, or "", and the coarsest dtype met."""
    logits = match.roles["logits"]
    own = str(match.facts["dtype"])
    if not _learns(logits):
        return "no gradient reaches the logits", own
    if match.facts.get("axes", {}).get("logits", axes(logits) - 1) != axes(logits) - 1:
        return "the experts of the logits do not lie along the last axis: their readers are not followed", own
    waiting, seen, ends = [logits], {logits}, 0
    while waiting:
        node = waiting.pop()
        for reader in node.users:
            if not _sends_back(reader, node):
                continue
            if _is_softmax(reader, match):
                ends += 1
                continue
            further = list(_keeps(reader, node))
            if not further or len(seen) > _FAR:
                return _told(reader), own
            waiting += [x for x in further if x not in seen]
            seen.update(further)
    return "" if ends else "no gradient comes back to the logits through a softmax", coarsest_dtype(list(seen))


def _sends_back(reader: Node, node: Node) -> bool:
    """Whether a gradient may come back to ``node`` through ``reader``, or through one of its results."""
    if reader.op == "output" or tensor(reader) is not None:
        return differentiates(reader, node)
    return any(_learns(user) for user in reader.users)


def _learns(node: Node) -> bool:
    return bool(getattr(tensor(node), "requires_grad", False))


def _told(reader: Node) -> str:
    if reader.op == "output":
        return "the logits leave the graph: what else sends gradients back to them is not known"
    return f"`{op(reader)}` sends a gradient back to the logits, and it feels a shift of them"


def _is_softmax(reader: Node, match: Match) -> bool:
    """A softmax along the experts, or the described kernel itself if it takes one."""
    if reader is match.anchor and "::" in op(reader):
        return match.facts.get("scoring") == "softmax"
    dim = argument(reader, 1, "dim")
    return op(reader) in _SOFTMAXES and isinstance(dim, int) and dim % axes(reader) == axes(reader) - 1


def _keeps(reader: Node, node: Node) -> Iterator[Node]:
    """The results of ``reader`` that a shift of all logits of a token shifts alike, entry by entry."""
    name = op(reader)
    if name in ("topk", "sort"):
        if argument(reader, 2 if name == "topk" else 1, "dim", -1) in (-1, axes(node) - 1):
            yield from (user for user in reader.users if op(user) in _HANDED and _learns(user))
    elif name in _COPIES or (name in _RULES and _RULES[name](reader, node)):
        yield reader


def _other(reader: Node, node: Node) -> Any:
    """The second operand of a sum or product."""
    return args(reader)[1 if args(reader)[0] is node else 0]


def _shifted(reader: Node, node: Node) -> bool:
    return not _of_logits(_other(reader, node), node) and (op(reader) == "add" or args(reader)[0] is node)


def _multiplied(reader: Node, node: Node) -> bool:
    """By a number, or one for each token: all logits of a token alike."""
    other = _other(reader, node)
    alike = constant(other) is not None or (isinstance(other, Node) and (shape(other) or (1,))[-1] == 1)
    return alike and (op(reader) == "mul" or args(reader)[0] is node)


def _picked(reader: Node, node: Node) -> bool:
    dim = argument(reader, 1, "dim") if op(reader) == "gather" else argument(reader, 2, "dim")
    return args(reader)[0] is node and dim in (-1, axes(node) - 1)


_RULES: Mapping[str, Callable[[Node, Node], bool]] = {
    "reshape": lambda reader, node: (shape(reader) or (0,))[-1] == (shape(node) or (1,))[-1],
    "add": _shifted,
    "sub": _shifted,
    "mul": _multiplied,
    "div": _multiplied,
    "masked_fill": lambda reader, node: _hides(argument(reader, 2, "value")),
    "where": lambda reader, node: any(args(reader)[i] is node and _hides(args(reader)[3 - i]) for i in (1, 2)),
    "scatter": lambda reader, node: argument(reader, 3, "src") is node and _is_hidden(args(reader)[0]),
    "gather": _picked,
    "take_along_dim": _picked,
    "getitem": lambda reader, node: op(node) in _HANDED and _cuts(args(reader)[1]),
}


def _of_logits(other: Any, node: Node) -> bool:
    """Whether ``other`` is made from ``node`` too, as far as is looked: then it shifts as well."""
    waiting: list[Node] = [other] if isinstance(other, Node) else []
    seen: set[Node] = set()
    while waiting and len(seen) < _FAR:
        x = waiting.pop()
        if x is node:
            return True
        if x not in seen and getattr(tensor(x), "requires_grad", True):
            seen.add(x)
            waiting += x.all_input_nodes
    return len(seen) >= _FAR


def _hides(value: Any) -> bool:
    number = constant(value)
    return number is not None and number <= HIDDEN


def _is_hidden(base: Any) -> bool:
    """A tensor filled with what counts for no logit."""
    return (
        isinstance(base, Node)
        and op(base) in ("full", "full_like", "new_full")
        and _hides(argument(base, 2 if op(base) == "new_full" else 1, "fill_value"))
    )


def _cuts(index: Any) -> bool:
    """``[..., :k]`` of sorted logits."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is Ellipsis or isinstance(part, slice) for part in parts)
