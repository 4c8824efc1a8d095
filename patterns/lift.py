"""A kernel inside an `autograd.Function`: its boundary is that of the whole call, for its backward is the user's own.

Nothing can be inserted inside, since the function's own backward would not know of it; the operands and the result of the call
are the boundary just as well, and the laws then judge the forward and the backward that the user wrote.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from foreshock.layout import words
from foreshock.patterns.boundary import unread
from foreshock.patterns.graph import BODIES, FUNCTION, GraphView
from foreshock.patterns.ops import args, op, tensor
from foreshock.patterns.pattern import Edge, Match, Miss


def lift(view: GraphView, match: Match) -> Match | Miss:
    """``match``, found in the body whose view is ``view``, at the call of that body."""
    call, parent = view.call, view.parent
    assert call is not None
    assert parent is not None
    if not match.operands or "out" not in match.roles:
        return Miss(match.anchor, f"a {match.kind} inside an autograd.Function can only be watched from outside")
    inputs = {node: i for i, node in enumerate(n for n in view.graph.nodes if n.op == "placeholder")}
    _, first = BODIES[FUNCTION]
    roles: dict[str, Node] = {}
    operands: dict[str, Edge] = {}
    layout: dict[str, str] = {}
    for role in match.operands:
        source, order = _permuted_from(match.roles[role])
        operand = args(call)[first + inputs[source]] if source in inputs else None
        if not isinstance(operand, Node):
            return Miss(match.anchor, f"{role} is made inside an autograd.Function and cannot be watched from outside")
        names = words(match.layout[role])
        layout[role] = " ".join(names[order.index(axis)] for axis in range(len(order)))
        roles[role], operands[role] = operand, Edge(call, first + inputs[source])
    for index, output in enumerate(view.results):
        made, order = _permuted_from(output, match.roles["out"]) if isinstance(output, Node) else (None, [])
        taken = [user for user in call.users if op(user) == "getitem" and args(user)[1] == index]
        if made is match.roles["out"] and taken:
            names = words(match.layout["out"])
            layout["out"], roles["out"] = " ".join(names[axis] for axis in order), taken[0]
    if "out" not in roles:
        return Miss(match.anchor, "the attention inside an autograd.Function is not what it returns")
    laws, facts = dict(match.laws), match.facts
    if "law/shadow" in laws:  # logits, where there were any, stay inside
        laws["law/shadow"] = laws["law/shadow"] or unread(facts["scale"], facts["causal"], facts.get("recompute", True))
    return replace(match, anchor=call, roles=roles, operands=operands, layout=layout, laws=laws, view=parent)


def _permuted_from(node: Node, stop: Node | None = None) -> tuple[Node, list[int]]:
    """The tensor of which ``node`` is a copy or has permuted axes, as far back as it goes or up to ``stop``, and for each axis of
    ``node`` the axis there."""
    fake = tensor(node)
    order = list(range(fake.dim() if fake is not None else 0))
    while node is not stop and node.op in ("call_function", "call_method") and args(node):
        source = args(node)[0]
        if op(node) in ("identity", "cast"):
            node = source
            continue
        moved = _permutation(node, source) if op(node) in ("transpose", "permute", "t", "mT") else None
        if moved is None:
            break
        node, order = source, [moved[axis] for axis in order]
    return node, order


def _permutation(node: Node, source: Node) -> list[int] | None:
    """For each axis of a view the axis of its source, told by strides."""
    view, base = tensor(node), tensor(source)
    if view is None or base is None:
        return None
    at = {(stride, size): axis for axis, (stride, size) in enumerate(zip(base.stride(), base.shape, strict=True))}
    found = [at.get(pair) for pair in zip(view.stride(), view.shape, strict=True)]
    known = [axis for axis in found if axis is not None]
    return known if sorted(known) == list(range(base.dim())) else None
