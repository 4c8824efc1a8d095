"""The built-in probes with what the switched-on families of the second tier add to them."""

from __future__ import annotations

from collections.abc import Collection

from foreshock.monitors.activations import activations
from foreshock.monitors.attention_probe import ATTENTION
from foreshock.monitors.joined import joined
from foreshock.monitors.residual import RESIDUAL
from foreshock.monitors.router_probe import ROUTER
from foreshock.records import Probe


def probes(families: Collection[str]) -> tuple[Probe, Probe]:
    """The built-in probes of attention and router with what ``families`` add; with none the very objects of the first tier."""
    attention = [activations("attention")] if "activations" in families else []
    attention += [RESIDUAL] if "residual" in families else []
    router = [activations("router")] if "activations" in families else []
    return joined(ATTENTION, *attention), joined(ROUTER, *router)
