"""What to look for in a captured graph. Users add to it with `register`, `attention_op` and `router_op`."""

from __future__ import annotations

from foreshock.patterns.attention import attention_op
from foreshock.patterns.find import Findings, find, register
from foreshock.patterns.graph import GraphView
from foreshock.patterns.pattern import Match, Miss, Pattern
from foreshock.patterns.router import router_op

__all__ = ["Findings", "GraphView", "Match", "Miss", "Pattern", "attention_op", "find", "register", "router_op"]
