"""Write each site's forward reductions behind the site, as ordinary torch ops on detached tensors."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from foreshock.passes.plan import Plan, Quantity, SitePlan
from foreshock.passes.record import Recorder, Value


def insert_probes(plan: Plan, rows: Node) -> None:
    """A site whose probe fails is left out; the rest go on."""
    guard = plan.needs_autocast_guard()
    for site in plan.sites:
        try:
            _probe(plan, site, rows, guard)
        except Exception as error:
            plan.fail(f"probe `{site.probe.name}` at {site.label}", error)


def _probe(plan: Plan, site: SitePlan, rows: Node, guard: bool) -> None:
    recorder = Recorder(plan.graph, plan.fake_mode, "insert_probes", site.label)
    order = {node: position for position, node in enumerate(plan.graph.nodes)}
    last = max(site.match.roles.values(), key=order.__getitem__)
    with recorder.before(last.next), recorder.without_autocast(plan.device.type, guard):
        tensors: Any = {role: Value(node, recorder).detach() for role, node in site.match.roles.items()}
        uniform: Any = Value(rows, recorder)
        results = site.probe.forward(site.facts, tensors, uniform)
        flat = {name: result.reshape(-1).float() for name, result in results.items()}
    for name, result in flat.items():
        plan.packed.append(result.node)  # type: ignore[attr-defined]  # a Value
        size = int(result.fake.shape[0])  # type: ignore[attr-defined]
        plan.forward.append(Quantity(site.index, name, size, "max" if name in site.probe.maxima else "sum"))
