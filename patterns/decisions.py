"""Several choices may belong to one router: which is the decision, and what belongs to it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from torch.fx import Node

from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import args, op, shape
from foreshock.patterns.pattern import Match, Miss
from foreshock.patterns.selection import SELECTIONS

_NEAR = 256  # nodes between a router's logits and its choice
_CAPACITY_NEAR = 32  # nodes behind a choice among which tokens are dropped where an expert is full


def decisions(found: Iterable[Match | Miss], view: GraphView) -> list[Match | Miss]:
    """One match a router. Several choices may belong to it: the last is the decision, and what led to it is no near-miss.

    Of groups, their number becomes a fact; a best expert and a second best after it are chosen together.
    """
    results = [result for result in found if isinstance(result, Match) or not result.quiet]
    kept: dict[Node, Match] = {}
    passed: set[Node] = set()
    for match in results:
        if not isinstance(match, Match) or match.kind != "router" or "logits" not in match.roles:
            continue
        before = _between(view, match)
        passed |= before | _of_capacity(view, match)
        logits = match.roles["logits"]
        while op(logits) in ("cast", "identity", "reshape") and isinstance(args(logits)[0], Node):
            logits = args(logits)[0]
        earlier = kept.get(logits)
        if earlier and match.facts.get("selection") == "threshold" != earlier.facts.get("selection"):
            continue
        kept[logits] = _with_groups(_joined(earlier, match) if earlier and earlier.anchor in before else match, before)
    routers = {match.anchor: match for match in kept.values()}
    last = [
        routers.pop(result.anchor, None) if _is_router(result) else result
        for result in results
        if isinstance(result, Match) or result.anchor not in passed
    ]
    return [result for result in last if result is not None]


def _of_capacity(view: GraphView, match: Match) -> set[Node]:
    """Choices behind the decision among as many scores: the tokens that a full expert keeps."""
    every = math.prod(shape(match.roles["scores"]) or ())
    behind = (
        node for node in view.forward_slice(match.anchor, _CAPACITY_NEAR) if op(node) in SELECTIONS and args(node)
    )
    return {node for node in behind if math.prod(shape(args(node)[0]) or ()) == every}


def _is_router(result: Match | Miss) -> bool:
    return isinstance(result, Match) and result.kind == "router" and "logits" in result.roles


def _between(view: GraphView, match: Match) -> set[Node]:
    """What the choice is made from, back to the logits."""
    first = view.order[match.roles["logits"]]
    found: set[Node] = set()
    queue = [match.anchor]
    while queue and len(found) < _NEAR:
        for source in view.dataflow.predecessors(queue.pop()):
            if source not in found and view.order[source] > first:
                found.add(source)
                queue.append(source)
    return found


def _joined(earlier: Match, match: Match) -> Match:
    """``match``, or both where each takes one expert."""
    one_each = {earlier.facts.get("selection"), match.facts.get("selection")} == {"argmax"}
    if not one_each or "indices" not in earlier.roles or "indices" not in match.roles:
        return match
    together = earlier.facts["top_k"] + 1
    roles = {**earlier.roles, f"indices_{together}": match.roles["indices"]}
    return replace(earlier, anchor=match.anchor, roles=roles, facts={**earlier.facts, "top_k": together})


def _with_groups(match: Match, before: set[Node]) -> Match:
    """With the number of groups, where one score a group was chosen from on the way."""
    scores = math.prod(shape(match.roles["scores"]) or ())
    experts = int(match.facts["experts"])
    for node in before:
        groups = (
            (shape(args(node)[0]) or (0,))[-1] if op(node) in ("topk", "argmax", "max", "sort") and args(node) else 0
        )
        if not 0 < groups < experts or experts % groups:
            continue
        if math.prod(shape(args(node)[0]) or ()) * (experts // groups) == scores:
            return replace(match, facts={**match.facts, "groups": groups})
    return match
