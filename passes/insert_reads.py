"""Read each site's tensors behind the site: one op a site, whose result is its stretch of the packed vector."""

from __future__ import annotations

import functools
import json
from typing import Any

from foreshock.passes.plan import Frame, Plan, Quantity, SitePlan, add, before, version
from foreshock.passes.taps import READ, register_statistics


def insert_read(plan: Plan, frame: Frame, site: SitePlan) -> None:
    """A site whose probe fails is left out; the rest go on."""
    try:
        _insert(plan, frame, site)
    except Exception as error:
        plan.fail(f"probe `{site.probe.name}` at {site.label}", error)


def _insert(plan: Plan, frame: Frame, site: SitePlan) -> None:
    probe, roles = site.probe, dict(site.match.roles)
    name = f"{probe.name}:{getattr(probe.forward, '__qualname__', '')}:{version(probe.forward)}"
    spec: dict[str, Any] = {**site.facts, "statistics": name, "roles": list(roles)}
    rows = frame.rows.meta["example_value"]
    key = (id(probe), json.dumps(spec))
    sizes = plan.sizes(key, roles, lambda fakes: probe.forward(site.facts, fakes, rows))
    report = plan.report and functools.partial(plan.report, f"running probe `{probe.name}`")
    register_statistics(name, probe.forward, report)
    size = sum(sizes.values())
    last = max(roles.values(), key=frame.view.order.__getitem__)
    with before(frame.graph, _after(last)):
        args = (list(roles.values()), frame.rows, json.dumps({**spec, "size": size}))
        frame.packed.append(add(frame.graph, READ, args, plan.fake(size), "insert_reads", site.label))
    for quantity, length in sizes.items():
        merge = "max" if quantity in probe.maxima else "sum"
        frame.forward.append(Quantity(site.index, quantity, length, merge))


def _after(node: Any) -> Any:
    """Where to insert behind ``node``: placeholders stay together."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following
