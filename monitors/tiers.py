"""The built-in probes: those of the first tier, and what the switched-on families of the second add beside them."""

from __future__ import annotations

from collections.abc import Collection

from foreshock.monitors.activations import activations
from foreshock.monitors.attention_probe import ATTENTION
from foreshock.monitors.residual import RESIDUAL
from foreshock.monitors.router_probe import ROUTER
from foreshock.records import Probe


def probes(families: Collection[str]) -> tuple[Probe, ...]:
    """The built-in probes for ``families``; without any of the second tier those of the first alone."""
    more = [activations("attention"), activations("router")] if "activations" in families else []
    return (ATTENTION, ROUTER, *more, *([RESIDUAL] if "residual" in families else []))
