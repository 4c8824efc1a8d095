"""Why a pattern does or does not find something in a model: for whoever writes one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from foreshock.patterns.graph import GraphView
from foreshock.patterns.isomorphism import accepts
from foreshock.patterns.ops import op, shape
from foreshock.patterns.pattern import Match, Miss, Pattern

SHOWN = 3


@dataclass(frozen=True)
class Explanation:
    """What a pattern found in the captured graphs of a model; true if it found anything. Its text says the rest."""

    pattern: Pattern
    matches: tuple[Match, ...]
    misses: tuple[Miss, ...]  # the nearest first
    errors: tuple[Exception, ...]
    ops: frozenset[str]  # of all graphs

    def __bool__(self) -> bool:
        return bool(self.matches)

    def __str__(self) -> str:
        lines = [f"pattern `{self.pattern.name}`: {len(self.matches)} found"]
        lines += [f"  {_roles(match)}" for match in self.matches]
        lines += [f"  failed: {type(error).__name__}: {error}" for error in self.errors]
        if not self.matches and self.misses:
            lines += ["the nearest misses:", *(f"  {miss}" for miss in self.misses[:SHOWN])]
        elif not self.matches and not self.errors:
            lines.append(self._absent())
        return "\n".join(lines)

    def _absent(self) -> str:
        wanted = sorted(self.pattern.anchors)
        close = [near for name in wanted for near in difflib.get_close_matches(name, self.ops, n=3)]
        own = sorted(name for name in self.ops if "::" in name and not name.startswith("higher_order::"))
        there = f"; did you mean {', '.join(close)}?" if close else ""
        opaque = f" Opaque ops in it: {', '.join(own)}." if own else ""
        return f"no captured graph calls {' or '.join(wanted)}{there or '.'}{opaque}"


def explain(pattern: Pattern, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Capture ``model(*args, **kwargs)`` and say where ``pattern`` lies in it, or how far it got. Nothing is trained."""
    matches: list[Match] = []
    misses: list[Miss] = []
    errors: list[Exception] = []
    ops: set[str] = set()

    def look(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for region in GraphView.of(module.graph, inputs).walk():
            for node in region.graph.nodes:
                ops.add(op(node))
                if not any(accepts(anchor, op(node)) for anchor in pattern.anchors):
                    continue
                try:
                    found = pattern.match(region, node)
                except Exception as error:
                    errors.append(error)
                    continue
                (matches if isinstance(found, Match) else misses).append(found)  # type: ignore[arg-type]  # one of the two
        return module.forward

    torch.compile(model, backend=look)(*args, **kwargs)
    misses.sort(key=lambda miss: -getattr(miss, "share", 0.0))
    return Explanation(pattern, tuple(matches), tuple(misses), tuple(errors), frozenset(ops))


def _roles(match: Match) -> str:
    roles = ", ".join(f"{role} = {_shown(node)}" for role, node in match.roles.items())
    facts = ", ".join(f"{name}={value!r}" for name, value in match.facts.items())
    return f"{match.kind}: {roles}; {facts}"


def _shown(node: Node) -> str:
    return f"{node.name} {list(shape(node) or ())}"
