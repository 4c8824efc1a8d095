"""What is seen and not watched yet: it goes to the ledger, for nothing may be silent."""

from __future__ import annotations

from torch.fx import Node

from foreshock.patterns.graph import GraphView
from foreshock.patterns.pattern import Miss, Pattern


def _flex(view: GraphView, node: Node) -> Miss:
    return Miss(node, "flex_attention is not watched yet")


UNWATCHED: tuple[Pattern, ...] = (Pattern("flex_attention", frozenset({"higher_order::flex_attention"}), _flex),)
