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

import numpy as np
import torch
from torch.fx import Node

from foreshock.errors import PatternError
from foreshock.patterns.forms import SPELLINGS, form
from foreshock.patterns.graph import GraphView
from foreshock.patterns.isomorphism import Found, Motif, Stuck, Target, is_op, search
from foreshock.patterns.ops import hint, op, shape, tensor
from foreshock.patterns.pattern import Match, Miss, Pattern
from foreshock.patterns.provenance import Link, Origin, trace_features, weight_view
from foreshock.patterns.tracing import Traced, trace
from foreshock.records import Stage

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
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One graph that the function stands for."""

    traced: Traced
    motif: Motif


@dataclass(frozen=True)
class Subgraph(Pattern):
    """What `subgraph` makes of a function: a `Pattern` that can be registered or given to a `Watch`.

    ``further`` are the matches at one anchor beyond the one that ``match`` yields.
    """

    kind: str
    further: Callable[[GraphView, Node], tuple[Match, ...]]
    variants: tuple[Variant, ...]
    file: str
    lines: Mapping[int, str]

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

    Raises PatternError if the function cannot be traced, names no subgraph, or does not use a parameter.
    """

    def decorate(function: Callable[..., Any]) -> Subgraph:
        called = name or str(getattr(function, "__name__", repr(function)))
        traced = trace(function, called)
        _check(traced[0], called, {"layout": layout or (), "weights": weights, "tapped": (tapped,) if tapped else ()})
        variants = _variants(traced, called)
        anchors = frozenset().union(*(_spellings(v.motif.forms[v.motif.anchor].op) for v in variants))

        def every(view: GraphView, node: Node) -> tuple[Match, ...] | Miss:
            misses = []
            for variant in variants:
                found = search(variant.motif, Target.of(view), node)
                if not isinstance(found, Stuck):
                    return tuple(build(view, node, variant.traced, one) for one in found)
                misses.append(NearMiss(node, pattern, variant, found))
            return max(misses, key=lambda miss: miss.share)

        def match(view: GraphView, node: Node) -> Match | Miss:
            found = every(view, node)
            return found[0] if isinstance(found, tuple) else found

        def further(view: GraphView, node: Node) -> tuple[Match, ...]:
            found = every(view, node)
            return found[1:] if isinstance(found, tuple) else ()

        def build(view: GraphView, node: Node, traced: Traced, found: Found) -> Match:
            return _match(view, node, pattern, traced, found, layout or {}, facts, weights, tapped)

        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        used = {node.meta["line"] for variant in variants for node in variant.motif.forms}
        lines = {line: linecache.getline(file, line).strip() for line in used}
        pattern = Subgraph(called, anchors, match, kind, further, variants, file, lines)
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


def _match(
    view: GraphView,
    anchor: Node,
    pattern: Subgraph,
    traced: Traced,
    found: Found,
    layout: Mapping[str, str],
    facts: Facts | Callable[[Mapping[str, Any]], Facts] | None,
    weights: Sequence[str],
    tapped: str | None,
) -> Match:
    at = {role: found[node] for role, node in (*traced.parameters.items(), *traced.results.items()) if node in found}
    roles = {role: node for role, node in at.items() if isinstance(node, Node)}
    known = {role: value for role, value in at.items() if not isinstance(value, Node)}
    reads = tapped or next(iter(traced.results))
    shown = {role: tensor(node) if isinstance(node, Node) else node for role, node in at.items()}
    more = facts(shown) if callable(facts) else facts or {}
    views, sources, notes = {}, {}, []
    for role in weights:
        origin = _itself(view, roles[role]) or trace_features(view, roles[role])
        its = weight_view(view, origin)
        if its is None or not isinstance(origin, Origin):
            notes.append(f"{role} was not traced to a weight: {getattr(origin, 'reason', '')}")
        else:
            views[f"{role}_weight"], sources[f"{role}_weight"] = its, origin.sources
    return Match(
        kind=pattern.kind,
        pattern=pattern.name,
        anchor=anchor,
        roles=roles,
        tapped=reads,
        layout=dict(layout),
        facts={
            "dtype": str(getattr(tensor(roles[reads]), "dtype", "float32")).removeprefix("torch."),
            **known,
            **{key: _plain(value) for key, value in more.items()},
        },
        weights=views,
        sources=sources,
        notes=tuple(notes),
    )


def _itself(view: GraphView, node: Node) -> Origin | None:
    """Of a role that is a parameter: all of it, along its last axis."""
    source, sizes = view.source(node), shape(node)
    if source not in view.parameters or not sizes:
        return None
    return Origin((Link(source, (), Stage(np.arange(sizes[-1])[None, :], (len(sizes) - 1,), (0,))),), source, ())


def _plain(value: Any) -> Any:
    """A fact as a plain value: a symbolic size as it was in the capture."""
    if isinstance(value, torch.SymInt):
        return hint(value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


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
