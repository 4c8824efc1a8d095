"""Put gradient taps on the edges into and out of each site's kernel, fed from one slot per graph."""

from __future__ import annotations

import json
import operator
from typing import Any

import torch
from torch.fx import Node

from foreshock.layout import canonical
from foreshock.passes.plan import Frame, Plan, SitePlan, add, before, past_placeholders
from foreshock.passes.taps import ENTER, LEAVE
from foreshock.patterns import GraphView
from foreshock.patterns.pattern import Edge, Match

_PASS = "insert_taps"


def insert_tap(plan: Plan, frame: Frame, site: SitePlan) -> None:
    """A failing site keeps its forward statistics; the rest go on."""
    if not any(probe.backward for probe in site.probes) or not _differentiable(site):
        return
    try:
        _insert(plan, frame, site)
    except Exception as error:
        plan.fail(f"gradient tap at {site.label}", error)


def _tapped(site: SitePlan) -> list[str]:
    return list(site.match.operands) or [role for role in (site.match.tapped,) if role]


def _differentiable(site: SitePlan) -> bool:
    fakes = [site.match.roles[role].meta.get("example_value") for role in _tapped(site)]
    return bool(fakes) and all(isinstance(fake, torch.Tensor) and fake.requires_grad for fake in fakes)


def untappable(view: GraphView, match: Match) -> str:
    """Why no tap may stand at ``match``, or "": what stands behind one is a view of an autograd function, and PyTorch forbids
    writing into it."""
    end = next(iter(reversed(view.graph.nodes)))
    for role in ("out",) if match.operands else filter(None, (match.tapped,)):
        written = view.written(match.roles[role], end) if role in match.roles else []
        if written:
            return f"`{written[0].node.name}` writes into {role} in place: no gradients are read"
    return ""


def _insert(plan: Plan, frame: Frame, site: SitePlan) -> None:
    match, roles = site.match, _tapped(site)
    nodes = {role: match.roles[role] for role in (*roles, *(["out"] if _leaves(site) else []))}
    spec, found = plan.prepare(site, "backward", roles, nodes, None)
    if not found:
        return
    tap = _tap_edges if match.operands else _tap_tensor
    frame.pieces.append(tap(plan, frame, site, spec, sum(quantity.size for quantity in found)))
    frame.backward += found


def _leaves(site: SitePlan) -> bool:
    return bool(site.match.operands) and "out" in site.match.roles


def _tap_tensor(plan: Plan, frame: Frame, site: SitePlan, spec: dict[str, Any], size: int) -> Node:
    """A view of one tensor in front of all its readers."""
    (role,) = spec["roles"]
    source = site.match.roles[role]
    readers = _readers(source)
    with before(frame.graph, past_placeholders(source.next)):
        piece, (view,) = _enter(frame, site, [source], spec, size)
    for reader in readers:
        reader.replace_input_with(source, view)
    return piece


def _tap_edges(plan: Plan, frame: Frame, site: SitePlan, spec: dict[str, Any], size: int) -> Node:
    """Views on the edges into the kernel, and one behind it. An operand made after the first has entered goes the way of the
    output: its gradient comes back through carriers."""
    match, graph, order = site.match, frame.graph, frame.view.order
    edges = {role: match.edge(role) for role in spec["roles"]}
    first = min((edge.node for edge in edges.values()), key=order.__getitem__)
    late = [role for role, node in match.roles.items() if role in edges and order.get(node, -1) > order[first]]
    width = int(match.facts["value_dim"])
    behind = [(role, "k") for role in late] + ([("out", "q")] if _leaves(site) else [])
    for role, like in behind:
        if like in late:
            raise ValueError(f"{like} is made only after another operand has entered: {role} has no way back")
        _check_carrier(plan, match, role, like, width)
    spec["late"] = [{"role": role, "like": like, "width": width} for role, like in behind]
    early = spec["roles"] = [role for role in spec["roles"] if role not in late]
    with before(graph, first):
        piece, made = _enter(frame, site, [edges[role].source for role in early], spec, size)
    for role, view in zip(early, made, strict=False):
        _replace(edges[role], view)
    carriers = made[len(early) :]
    for position, (role, _) in enumerate(behind):
        pair = carriers[2 * position : 2 * position + 2]
        source = match.roles["out"] if role == "out" else edges[role].source
        readers = _readers(source)
        with before(graph, source.next if role == "out" else edges[role].node):
            args = (source, pair, match.layout[role])
            left = add(graph, LEAVE, args, source.meta["example_value"], _PASS, site.label)
        if role == "out":
            for reader in readers:
                reader.replace_input_with(source, left)
        else:
            _replace(edges[role], left)
    return piece


def _check_carrier(plan: Plan, match: Match, role: str, like: str, width: int) -> None:
    """The way back through carriers needs a tensor of the same batch, heads and positions, and ``width`` channels."""
    with plan.fake_mode:
        late, lead = (canonical(match.roles[r].meta["example_value"], match.layout[r]) for r in (role, like))
    if late.shape[:-1] != lead.shape[:-1] or late.shape[-1] != width:
        raise ValueError(f"{role} {tuple(late.shape)} does not lie like {like} {tuple(lead.shape)}")


def _enter(
    frame: Frame, site: SitePlan, inputs: list[Node], spec: dict[str, Any], size: int
) -> tuple[Node, list[Node]]:
    """The op before the kernel, with a stand-in for its piece of the slot; its results: views, then carriers."""
    values = [node.meta["example_value"] for node in inputs]
    values += [values[0]] * (2 * len(spec.get("late", ())))  # carriers have no reader that asks
    piece = stand_in(frame, size, site.label)
    entered = add(frame.graph, ENTER, (inputs, piece, json.dumps(spec)), None, _PASS, site.label)
    made = [
        add(frame.graph, operator.getitem, (entered, i), value, _PASS, site.label) for i, value in enumerate(values)
    ]
    return piece, made


def _piece() -> None:
    """Stands for a piece of the slot until the slot's size is known."""


def stand_in(frame: Frame, size: int, site: str = "") -> Node:
    """What stands for ``size`` numbers of the slot, where the graph inserts now; it belongs into ``frame.pieces``."""
    return add(frame.graph, _piece, (), torch.empty(size, device="meta"), _PASS, site)


def _readers(node: Node) -> list[Node]:
    """Users of ``node`` that are not probes: probes read the raw tensor."""
    return [user for user in node.users if user.meta.get("foreshock", {}).get("pass") != "insert_reads"]


def _replace(edge: Edge, new: Node) -> None:
    node, where = edge
    if isinstance(where, str):
        node.kwargs = {**node.kwargs, where: new}
    else:
        node.args = (*node.args[:where], new, *node.args[where + 1 :])


def feed_slot(plan: Plan, frame: Frame, slot: Node) -> None:
    """Cut the slot into pieces with one split, whose backward is one concatenation: all statistics arrive in one vector."""
    if not frame.pieces:
        return
    lengths = [piece.meta["example_value"].shape[0] for piece in frame.pieces]
    with before(frame.graph, past_placeholders(slot)):
        whole = add(frame.graph, torch.split, (slot, lengths), None, _PASS)
        for index, (piece, length) in enumerate(zip(frame.pieces, lengths, strict=True)):
            cut = add(frame.graph, operator.getitem, (whole, index), plan.fake(length), _PASS)
            piece.replace_all_uses_with(cut)
    for piece in frame.pieces:
        frame.graph.erase_node(piece)
