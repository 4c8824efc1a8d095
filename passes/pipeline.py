"""The passes in order, and the one runner that verifies and recompiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from foreshock import _torch
from foreshock.passes.insert_probes import insert_probes
from foreshock.passes.insert_taps import feed_slot, insert_taps
from foreshock.passes.plan import Plan, Quantity
from foreshock.passes.record import Recorder, Value

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
    before = list(plan.graph.nodes)
    uniform = torch.zeros(2 * plan.rows, device=plan.device)
    rows = _placeholder(plan, ROWS, uniform)
    insert_probes(plan, rows)
    insert_taps(plan)
    if not plan.packed:
        return None
    zeros = torch.zeros(plan.slot_size, device=plan.device, requires_grad=True)
    slot = _placeholder(plan, SLOT, zeros)
    feed_slot(plan, slot)
    _pack(plan)
    _verify(plan, before)
    plan.module.recompile()
    return Instrumented(
        plan.module,
        tuple(plan.forward),
        tuple(plan.backward),
        plan.rows,
        plan.slot_size,
        [uniform, zeros],
    )


def _placeholder(plan: Plan, name: str, example: torch.Tensor) -> Node:
    last = [node for node in plan.graph.nodes if node.op == "placeholder"][-1]
    with plan.graph.inserting_after(last):
        node = plan.graph.placeholder(name)
    node.meta["example_value"] = plan.fake_mode.from_tensor(example, static_shapes=True)
    node.meta["foreshock"] = {"pass": "pipeline", "site": ""}
    node._dynamo_source = _torch.synthetic_source(name)
    return node


def _pack(plan: Plan) -> None:
    output = next(iter(reversed(plan.graph.nodes)))
    recorder = Recorder(plan.graph, plan.fake_mode, "pack", "")
    with recorder.before(output):
        parts: Any = [Value(node, recorder) for node in plan.packed]
        packed: Any = torch.cat(parts)
    output.args = ((*output.args[0], packed.node),)


def _verify(plan: Plan, before: list[Node]) -> None:
    plan.graph.lint()
    after = list(plan.graph.nodes)
    original = [node for node in after if "foreshock" not in node.meta]
    if original != before:
        raise AssertionError("rewriting a graph: an original node was lost or moved")
