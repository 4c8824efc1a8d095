"""How a captured graph is rewritten: copied, probed, tapped, packed, verified."""

from __future__ import annotations

from foreshock.passes.copy_graph import copy_graph
from foreshock.passes.expand import expand
from foreshock.passes.insert_taps import untappable
from foreshock.passes.pipeline import Instrumented, instrument
from foreshock.passes.plan import Plan, Quantity, SitePlan

__all__ = ["Instrumented", "Plan", "Quantity", "SitePlan", "copy_graph", "expand", "instrument", "untappable"]
