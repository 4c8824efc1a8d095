"""Patterns that are shown: a plain Python function that does what the subgraph does, traced once, found wherever it stands.

Its parameters are open tensors, or numbers where their default is `ANY`; together with the names that it returns they are the
roles of the match. See `foreshock.patterns.forms` for what counts as the same op, and docs/patterns.md for examples.
"""

from __future__ import annotations

import linecache
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from foreshock.errors import PatternError
from foreshock.patterns.forms import SPELLINGS, form
from foreshock.patterns.graph import GraphView
from foreshock.patterns.isomorphism import Motif, Stuck, Target, is_op, search
from foreshock.patterns.ops import op
from foreshock.patterns.pattern import Match, Miss, Pattern
from foreshock.patterns.shown import Facts, Shown, check_kind, site
from foreshock.patterns.tracing import Traced, trace

# The commonest first; an op that is not here is rarer than all of them, and a better place to begin.
_COMMON = (
    *("reshape", "transpose", "mul", "add", "cast", "identity", "getitem", "expand", "linear", "matmul", "cat", "pow"),
    *(
        "mean",
        "split",
        "dropout",
        "sum",
        "silu",
        "neg",
        "permute",
        "layer_norm",
        "rms_norm",
        "gelu",
        "where",
        "softmax",
    ),
)


@dataclass(frozen=True)
class Variant:
    """One graph that the function stands for."""

    traced: Traced
    motif: Motif


@dataclass(frozen=True)
class Subgraph(Pattern):
    """What `subgraph` makes of a function: a `Pattern` that can be registered or given to a `Watch`.

    ``every`` yields all matches at one anchor, or the nearest miss.
    """

    kind: str
    every: Callable[[GraphView, Node], list[Match | Miss]]
    variants: tuple[Variant, ...]
    file: str
    lines: Mapping[int, str]

    @property
    def beside(self) -> bool:
        """The same ops may be a site of the user's own kind, and an attention or a router."""
        return self.kind not in ("attention", "router")

    def results(self, view: GraphView, node: Node) -> list[Match | Miss]:
        """All places around one anchor where the function fits, or the nearest miss."""
        return self.every(view, node)

    def __str__(self) -> str:
        return f"pattern `{self.name}` ({self.kind}), from {self.file}:\n{written(self.variants[0].traced)}"


class NearMiss(Miss):
    """How far the pattern got; put into words only when asked."""

    def __init__(self, anchor: Node, pattern: Subgraph, variant: Variant, stuck: Stuck) -> None:
        share = len(stuck.matched) / len(variant.motif.forms)
        own = {"anchor": anchor, "quiet": share < 0.5, "share": share, "_about": (pattern, variant, stuck)}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    share: float  # of the pattern's steps that were found
    _about: tuple[Subgraph, Variant, Stuck]

    @property
    def reason(self) -> str:
        return _words(*self._about)


def subgraph(
    kind: str,
    *,
    name: str | None = None,
    layout: Mapping[str, str] | None = None,
    facts: Facts | Callable[[Mapping[str, Any]], Facts] | None = None,
    weights: Sequence[str] = (),
    tapped: str | None = None,
    broken: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Any]], Subgraph]:
    """Make a `Pattern` of the decorated function, which shows the subgraph in ordinary torch code::

        @subgraph("norm", facts=lambda at: {"channels": at["x"].shape[-1]})
        def rms_norm(x, weight, *, eps=ANY):
            return {"out": x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight}

    Parameters without a default are tensors; those with the default `ANY` are numbers of any value, which become facts of the
    site under their names; other defaults are part of the function. What it returns are further tensors by role, or one
    tensor, ``out``. Numbers in the function must be the same in the model; what depends on ``.shape`` may be anything.

    Args:
        kind: of the sites found: the `Probe` of this kind measures them.
        name: of the pattern; the function's own if left out.
        layout: how each role's tensor lies, ``{"q": "b h s d"}``; see `foreshock.layout`.
        facts: more facts of a site: plain values, or a function from what stands at each role (tensors with shape and
            dtype, and no data; numbers) to them.
        weights: roles whose last axis is traced to the parameter that makes it, or that are parameters themselves.
        tapped: the role whose gradient the probe's ``backward`` reads; the first returned if left out.
        broken: of an attention, the laws that this form breaks, each with the reason, ``{"law/key_shift": "capped logits"}``.

    An ``"attention"`` has the roles q, k, v and out, and the facts, weights and laws of the built-in ones; its number ``scale``
    multiplies q.k (left out: ``1 / sqrt(h)``). A ``"router"`` has the roles logits and indices, and scores if they differ.

    Raises PatternError if the function cannot be traced, names no subgraph, or does not use a parameter.
    """

    def decorate(function: Callable[..., Any]) -> Subgraph:
        called = name or str(getattr(function, "__name__", repr(function)))
        traced = trace(function, called)
        _check(traced[0], called, {"layout": layout or (), "weights": weights, "tapped": (tapped,) if tapped else ()})
        check_kind(kind, called, traced[0], layout or {})
        variants = _variants(traced, called)
        anchors = frozenset().union(*(_spellings(v.motif.forms[v.motif.anchor].op) for v in variants))

        shown = Shown(kind, called, dict(layout or {}), facts, tuple(weights), tapped, dict(broken or {}))

        def every(view: GraphView, node: Node) -> list[Match | Miss]:
            misses = []
            for variant in variants:
                found = search(variant.motif, Target.of(view), node)
                if not isinstance(found, Stuck):
                    return [site(shown, view, node, variant.traced, one) for one in found]
                misses.append(NearMiss(node, pattern, variant, found))
            return [max(misses, key=lambda miss: miss.share)]

        def match(view: GraphView, node: Node) -> Match | Miss:
            return every(view, node)[0]

        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        used = {node.meta["line"] for variant in variants for node in variant.motif.forms}
        lines = {line: linecache.getline(file, line).strip() for line in used}
        pattern = Subgraph(called, anchors, match, kind, every, variants, file, lines)
        return pattern

    return decorate


def _spellings(name: str) -> frozenset[str]:
    return SPELLINGS.get(name, frozenset({name}))


def _check(traced: Traced, name: str, named: Mapping[str, Iterable[str]]) -> None:
    """Every role is used, and what the arguments name are roles."""
    read = {operand.node for node in traced.live if is_op(node) for operand in form(node).operands.values()}
    unused = [role for role, node in traced.parameters.items() if node not in read]
    if unused:
        raise PatternError(
            f"tracing the pattern `{name}`: nothing it returns depends on the parameter `{unused[0]}`; "
            f"use it or leave it out\n{written(traced)}"
        )
    roles = {*traced.parameters, *traced.results}
    for argument, given in named.items():
        for role in given:
            if role not in roles:
                raise PatternError(
                    f"describing the pattern `{name}`: {argument} names the role {role!r}; its roles are {', '.join(sorted(roles))}"
                )


def _variants(traced: Sequence[Traced], name: str) -> tuple[Variant, ...]:
    """The graphs around one op that all of them have: the rarest."""
    least = [form(node).op for node in traced[-1].live if is_op(node)]
    rarest = max(least, key=lambda known: _COMMON.index(known) if known in _COMMON else len(_COMMON), default=None)
    if rarest is None:
        raise PatternError(f"tracing the pattern `{name}`: it holds no op to begin at\n{written(traced[0])}")
    variants = []
    for one in traced:
        anchor = next(
            node for node in reversed(one.graph.nodes) if node in one.live and is_op(node) and form(node).op == rarest
        )
        motif = Motif.around(anchor, one.live)
        apart = [node for node in one.live if is_op(node) and node not in motif.forms]
        if apart:
            raise PatternError(
                f"tracing the pattern `{name}`: `{apart[0].name}` has nothing to do with `{anchor.name}`; "
                f"make them two patterns\n{written(one)}"
            )
        if isinstance(search(motif, Target.of(GraphView(one.graph, {}, {})), anchor), Stuck):
            raise PatternError(
                f"tracing the pattern `{name}`: it does not find itself in its own graph\n{written(one)}"
            )
        variants.append(Variant(one, motif))
    return tuple(variants)


def written(traced: Traced) -> str:
    """The graph of a pattern, one op a line, with its roles."""
    roles = {node: role for role, node in (*traced.parameters.items(), *traced.results.items())}
    lines = []
    for node in traced.graph.nodes:
        if node in traced.live and is_op(node):
            role = f"  # role `{roles[node]}`" if node in roles else ""
            lines.append(f"{node.name} = {form(node)}{role}")
    return textwrap.indent("\n".join(lines) or "no ops", "    ")


def _words(pattern: Subgraph, variant: Variant, stuck: Stuck) -> str:
    steps = len(variant.motif.forms)
    begun = f"{len(stuck.matched)} of {steps} steps of the pattern `{pattern.name}`"
    if stuck.failed is None:
        return f"{begun} are here, but not joined as in the pattern: one of its tensors is two different ones here"
    line = stuck.failed.meta.get("line", 0)
    wanted = f"{form(stuck.failed)} (line {line}: {pattern.lines.get(line, '')})"
    return f"{begun} are here; not found: {wanted}; {_instead(variant.motif, stuck)}"


def _instead(motif: Motif, stuck: Stuck) -> str:
    """What stands in the failed node's place."""
    if not stuck.matched:
        return f"here stands {form(stuck.at)}"
    its = motif.forms.get(stuck.neighbour)
    slots = [slot for slot, operand in its.operands.items() if operand.node is stuck.failed] if its is not None else []
    if slots:
        held = [form(operand.node) for slot, operand in form(stuck.at).operands.items()]
        return f"`{stuck.at.name}` is made of {' and '.join(map(str, held)) or 'nothing'}"
    readers = [str(form(user)) for user in stuck.at.users if op(user) != "output"]
    return f"`{stuck.at.name}` is read by {' and '.join(readers[:4]) or 'nothing in this graph'}"
