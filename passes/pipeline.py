"""The passes in order, over the outermost graph and the bodies it calls, and the one runner that verifies and recompiles."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from foreshock import _torch
from foreshock.passes.insert_reads import insert_read
from foreshock.passes.insert_taps import feed_slot, insert_tap, stand_in
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
    frame = _rewrite(plan, plan.view)
    if not frame.packed and not frame.pieces:
        return None
    plan.module.recompile()
    return Instrumented(
        plan.module,
        tuple(frame.forward),
        tuple(frame.backward),
        plan.rows,
        frame.slot_size,
        [_rows(plan), _slot(plan, frame)],
    )


def _rewrite(plan: Plan, view: GraphView) -> Frame:
    """Fill one graph, feed its slot and pack its results. The outermost always takes rows and a slot."""
    frame = Frame(view, _placeholder(plan, view, ROWS, _rows(plan)))
    _fill(plan, frame)
    if frame.slot_size or view.parent is None:
        feed_slot(plan, frame, _placeholder(plan, view, SLOT, _slot(plan, frame)))
    if frame.packed or (frame.pieces and view.parent is None):
        _pack(plan, frame)
    return frame


def _rows(plan: Plan) -> torch.Tensor:
    return torch.zeros(2 * plan.rows, dtype=torch.float32, device=plan.device)


def _slot(plan: Plan, frame: Frame) -> torch.Tensor:
    return torch.zeros(frame.slot_size, dtype=torch.float32, device=plan.device, requires_grad=True)


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
        body = body_of(call)
        assert body is not None
        plan.bodies[child.graph] = (child, _rewrite(plan, child))
        body.recompile()
    first, inner = plan.bodies[child.graph]
    if op(call) == "higher_order::invoke_subgraph":  # what is compiled is cached by this name, the plain body too
        call.args = (call.args[0], f"{call.args[1]}_foreshock", *call.args[2:])
    here = _indices(plan, first, child)
    operands = [frame.rows]
    if inner.slot_size:
        with before(frame.graph, call):
            operands.append(stand_in(frame, inner.slot_size))
        frame.pieces.append(operands[-1])
    call.args = (*call.args, *operands)
    if inner.packed:
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
        if not frame.packed:  # nothing but gradients is read
            frame.packed.append(add(frame.graph, operator.getitem, (frame.rows, slice(0, 0)), plan.fake(0), "pack"))
        packed = add(frame.graph, torch.cat, (list(frame.packed),), plan.fake(frame.packed_size), "pack")
    output.args = ((*output.args[0], packed),)
