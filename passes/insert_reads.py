"""Read each site's tensors behind the site: one op a site, whose result is its stretch of the packed vector."""

from __future__ import annotations

import json

from foreshock.passes.plan import Frame, Plan, SitePlan, add, before, past_placeholders
from foreshock.passes.taps import READ


def insert_read(plan: Plan, frame: Frame, site: SitePlan) -> None:
    """A site that fails is left out; the rest go on."""
    try:
        _insert(plan, frame, site)
    except Exception as error:
        plan.fail(f"reading {site.label}", error)


def _insert(plan: Plan, frame: Frame, site: SitePlan) -> None:
    roles = dict(site.match.roles)
    spec, found = plan.prepare(site, "forward", list(roles), roles, frame.rows)
    if not found:
        return
    size = sum(quantity.size for quantity in found)
    last = max(roles.values(), key=frame.view.order.__getitem__)
    with before(frame.graph, past_placeholders(last.next)):
        args = (list(roles.values()), frame.rows, json.dumps(spec))
        frame.packed.append(add(frame.graph, READ, args, plan.fake(size), "insert_reads", site.label))
    frame.forward += found
