"""What to look for in a captured graph. Users add to it with `subgraph`, `attention_op`, `router_op` and `register`."""

from __future__ import annotations

from foreshock.patterns.attention import attention_op
from foreshock.patterns.explain import Explanation, explain
from foreshock.patterns.find import Findings, find, register
from foreshock.patterns.forms import ANY
from foreshock.patterns.graph import GraphView
from foreshock.patterns.pattern import Edge, Match, Miss, Pattern
from foreshock.patterns.router import router_op
from foreshock.patterns.subgraph import Subgraph, subgraph
from foreshock.patterns.tracing import maybe

__all__ = [
    "ANY",
    "Edge",
    "Explanation",
    "Findings",
    "GraphView",
    "Match",
    "Miss",
    "Pattern",
    "Subgraph",
    "attention_op",
    "explain",
    "find",
    "maybe",
    "register",
    "router_op",
    "subgraph",
]
