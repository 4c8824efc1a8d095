"""The passes in order, over the outermost graph and the bodies it calls, and the one runner that verifies and recompiles."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from foreshock import _torch
from foreshock.passes.insert_reads import insert_read
from foreshock.passes.insert_taps import feed_slot, insert_tap, piece
from foreshock.passes.plan import Frame, Plan, Quantity, add, before
from foreshock.patterns.graph import GraphView, body_of
from foreshock.patterns.ops import op

ROWS, SLOT = "foreshock_rows", "foreshock_slot"


@dataclass(frozen=True)
class Instrumented:
    """A rewritten graph. It takes two more inputs than the original (rows, slot) and returns one more output (packed)."""

    module: GraphModule
    forward: tuple[Quantity, ...]
    backward: tuple[Quantity, ...]
    rows: int
    slot_size: int
    examples: list[torch.Tensor]


def instrument(plan: Plan) -> Instrumented | None:
    """Run the passes on ``plan``; None if nothing was inserted."""
    uniform = torch.zeros(2 * plan.rows, device=plan.device)
    frame = Frame(plan.view, _placeholder(plan, plan.view, ROWS, uniform))
    _fill(plan, frame)
    if not frame.packed:
        return None
    zeros = torch.zeros(frame.slot_size, device=plan.device, requires_grad=True)
    feed_slot(plan, frame, _placeholder(plan, plan.view, SLOT, zeros))
    _pack(plan, frame)
    plan.module.recompile()
    return Instrumented(
        plan.module,
        tuple(frame.forward),
        tuple(frame.backward),
        plan.rows,
        frame.slot_size,
        [uniform, zeros],
    )


def _fill(plan: Plan, frame: Frame) -> None:
    """Insert what the sites of this graph and of the bodies it calls need."""
    untouched = list(frame.graph.nodes)
    for call, child in frame.view.children.items():
        if any(plan.sites_in(inner) for inner in child.walk()):
            _call(plan, frame, call, child)
    for site in plan.sites_in(frame.view):
        insert_read(plan, frame, site)
        insert_tap(plan, frame, site)
    frame.graph.lint()
    if [node for node in frame.graph.nodes if "foreshock" not in node.meta or node is frame.rows] != untouched:
        raise AssertionError("rewriting a graph: an original node was lost or moved")


def _call(plan: Plan, frame: Frame, call: Node, child: GraphView) -> None:
    """A body gets rows and a piece of slot as operands, and returns its packed vector as one more output."""
    if child.graph not in plan.bodies:
        plan.bodies[child.graph] = (child, _body(plan, child))
        if op(call) == "higher_order::invoke_subgraph":
            call.args = (call.args[0], f"{call.args[1]}_foreshock", *call.args[2:])
    first, inner = plan.bodies[child.graph]
    if op(call) == "higher_order::invoke_subgraph" and first is not child:
        call.args = (call.args[0], first.call.args[1], *call.args[2:])  # type: ignore[union-attr]
    if not inner.packed:
        return
    here = _indices(plan, first, child)
    with before(frame.graph, call):
        more = [frame.rows] + ([piece(frame, inner.slot_size)] if inner.slot_size else [])
    call.args = (*call.args, *more)
    results: Any = call.meta["example_value"]
    packed = plan.fake(inner.packed_size)
    with before(frame.graph, call.next):
        frame.packed.append(add(frame.graph, operator.getitem, (call, len(results)), packed, "pipeline"))
    call.meta["example_value"] = (*results, packed)
    frame.forward += [replace(quantity, site=here[quantity.site]) for quantity in inner.forward]
    frame.backward += [replace(quantity, site=here[quantity.site]) for quantity in inner.backward]


def _indices(plan: Plan, first: GraphView, view: GraphView) -> dict[int, int]:
    """Which site of this call is which of the call for which the body was rewritten."""
    one, other = ([s for v in start.walk() for s in plan.sites_in(v)] for start in (first, view))
    at = {site.match.anchor: site.index for site in other}
    return {site.index: at[site.match.anchor] for site in one}


def _body(plan: Plan, view: GraphView) -> Frame:
    rows = _placeholder(plan, view, ROWS, torch.zeros(2 * plan.rows, device=plan.device))
    frame = Frame(view, rows)
    _fill(plan, frame)
    if frame.slot_size:
        zeros = torch.zeros(frame.slot_size, device=plan.device, requires_grad=True)
        feed_slot(plan, frame, _placeholder(plan, view, SLOT, zeros))
    if frame.packed:
        _pack(plan, frame)
    assert view.call is not None
    body = body_of(view.call)
    assert body is not None
    body.recompile()
    return frame


def _placeholder(plan: Plan, view: GraphView, name: str, example: torch.Tensor) -> Node:
    last = [node for node in view.graph.nodes if node.op == "placeholder"][-1]
    with view.graph.inserting_after(last):
        node = view.graph.placeholder(name)
    node.meta["example_value"] = plan.fake_mode.from_tensor(example, static_shapes=True)
    node.meta["foreshock"] = {"pass": "pipeline", "site": ""}
    if view.parent is None:
        node._dynamo_source = _torch.synthetic_source(name)
    return node


def _pack(plan: Plan, frame: Frame) -> None:
    output = next(iter(reversed(frame.graph.nodes)))
    with before(frame.graph, output):
        packed = add(frame.graph, torch.cat, (list(frame.packed),), plan.fake(frame.packed_size), "pack")
    output.args = ((*output.args[0], packed),)
