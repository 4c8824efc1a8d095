"""Put gradient taps on the edges into and out of each site's kernel, fed from one slot per graph."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from foreshock import _torch
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
    writing into it; and the sizes of what comes back to it must be known where it stands."""
    end = next(iter(reversed(view.graph.nodes)))
    for role in ("out",) if match.operands else filter(None, (match.tapped,)):
        written = view.written(match.roles[role], end) if role in match.roles else []
        if written:
            return f"`{written[0].node.name}` writes into {role} in place: no gradients are read"
    if match.operands:
        try:
            _ways_back(view, match, list(match.operands))
        except ValueError as error:
            return f"{error}: no gradients are read"
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
    spec["late"] = _ways_back(frame.view, match, spec["roles"])
    behind = [way["role"] for way in spec["late"]]
    early = spec["roles"] = [role for role in spec["roles"] if role not in behind]
    with before(graph, first):
        piece, made = _enter(frame, site, [edges[role].source for role in early], spec, size)
    for role, view in zip(early, made, strict=False):
        _replace(edges[role], view)
    carriers = made[len(early) :]
    for position, role in enumerate(behind):
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


def _ways_back(view: GraphView, match: Match, roles: list[str]) -> list[dict[str, Any]]:
    """How gradients of the output and of operands made late come back: the ``late`` of a tap's spec. Raises ValueError where
    the sizes of one are neither numbers nor those of an operand that is there when the first enters."""
    edges = {role: match.edge(role) for role in roles}
    first = min(view.order[edge.node] for edge in edges.values())
    late = [role for role in roles if view.order.get(match.roles[role], -1) > first]
    early = [role for role in roles if role not in late]
    with _torch.fake_mode_of([match.roles[role].meta["example_value"] for role in early]):
        lies = {
            r: canonical(match.roles[r].meta["example_value"], match.layout[r]).shape for r in (*roles, *_out(match))
        }
    ways: list[dict[str, Any]] = []
    for role in (*late, *_out(match)):
        usual = "q" if role == "out" else "k"
        like = usual if usual in early else early[0]
        sizes = [_told(size, lies[like][axis], early, lies) for axis, size in enumerate(lies[role][:3])]
        width = lies[role][3]
        if "" in sizes or type(width) is not int:
            raise ValueError(f"{role} {tuple(lies[role])} has sizes that are not known where {early[0]} enters")
        ways.append({"role": role, "like": like, "width": width, **({"sizes": sizes} if sizes != [None] * 3 else {})})
    return ways


def _out(match: Match) -> tuple[str, ...]:
    return ("out",) if "out" in match.roles else ()


def _told(size: Any, like: Any, early: list[str], lies: Mapping[str, Any]) -> Any:
    """Of a size: None where it is that of ``like``, a number, or the axis of an early operand that has it; "" if not known."""
    if _same(size, like):
        return None
    if type(size) is int:
        return size
    return next(([role, axis] for role in early for axis in range(4) if _same(lies[role][axis], size)), "")


def _same(one: Any, other: Any) -> bool:
    """Whether two sizes are one whatever they are: to compare symbols would add a guard."""
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return type(one) is type(other) and bool(one == other)


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
    return add(frame.graph, _piece, (), torch.empty(size, dtype=torch.float32, device="meta"), _PASS, site)


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
