"""From a subgraph that was found to the site there: of an own kind, or an attention or a router like the built-in ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from foreshock.errors import PatternError
from foreshock.patterns.boundary import NO_BIAS_PAIR, attention_site, without_gradients
from foreshock.patterns.graph import GraphView
from foreshock.patterns.isomorphism import Found, is_op
from foreshock.patterns.ops import dtype, hint, op, shape, tensor
from foreshock.patterns.pattern import Edge, Match, Miss
from foreshock.patterns.provenance import Link, Origin, trace_features, weight_view
from foreshock.patterns.tracing import Traced
from foreshock.records import Stage

Facts = Mapping[str, Any]
_SCORINGS = ("softmax", "sigmoid")
_NEEDED = {"attention": ("q", "k", "v", "out"), "router": ("logits", "indices")}


@dataclass(frozen=True)
class Shown:
    """What the user said of a pattern beside its graph."""

    kind: str
    name: str
    layout: Mapping[str, str]
    facts: Facts | Callable[[Mapping[str, Any]], Facts] | None
    weights: Sequence[str]
    tapped: str | None
    broken: Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """Where a pattern lies: tensors and numbers by role, the user's facts, and where each parameter enters."""

    roles: Mapping[str, Node]
    numbers: Facts
    facts: Facts
    edges: Mapping[str, tuple[tuple[Node, int | str | None], ...]]


def check_kind(kind: str, name: str, traced: Traced, layout: Mapping[str, str]) -> None:
    """Raises PatternError if an attention or a router lacks a role that its probe reads."""
    roles = {*traced.parameters, *traced.results}
    missing = [role for role in _NEEDED.get(kind, ()) if role not in roles]
    if missing:
        raise PatternError(
            f"describing the pattern `{name}`: {'an' if kind == 'attention' else 'a'} {kind} needs the role `{missing[0]}`; "
            f"it has {', '.join(sorted(roles))}"
        )
    inner = [role for role in ("q", "k", "v") if kind == "attention" and role not in traced.parameters]
    if inner:
        raise PatternError(f"describing the pattern `{name}`: `{inner[0]}` enters an attention; make it a parameter")


def site(shown: Shown, view: GraphView, anchor: Node, traced: Traced, found: Found) -> Match | Miss:
    """The site at one place where the pattern lies."""
    named = {**traced.parameters, **traced.results}
    at = {role: found.values[node] for role, node in named.items() if node in found.values}
    fakes = {role: tensor(held) if isinstance(held, Node) else held for role, held in at.items()}
    more = shown.facts(fakes) if callable(shown.facts) else shown.facts or {}
    place = Place(
        roles={role: held for role, held in at.items() if isinstance(held, Node)},
        numbers={role: held for role, held in at.items() if not isinstance(held, Node)},
        facts={name: _plain(value) for name, value in more.items()},
        edges={role: found.edges[node] for role, node in traced.parameters.items() if node in found.edges},
    )
    if shown.kind == "attention":
        return _attention(shown, view, anchor, place)
    return (
        _router(shown, view, anchor, place, traced)
        if shown.kind == "router"
        else _own(shown, view, anchor, place, traced)
    )


def _own(shown: Shown, view: GraphView, anchor: Node, place: Place, traced: Traced) -> Match:
    tapped = shown.tapped or next(iter(traced.results))
    views, sources, notes = {}, {}, []
    for role in shown.weights:
        origin = _itself(view, place.roles[role]) or trace_features(view, place.roles[role])
        its = weight_view(view, origin)
        if its is None or not isinstance(origin, Origin):
            notes.append(f"{role} was not traced to a weight: {getattr(origin, 'reason', '')}")
        else:
            views[f"{role}_weight"], sources[f"{role}_weight"] = its, origin.sources
    return Match(
        kind=shown.kind,
        pattern=shown.name,
        anchor=anchor,
        roles=place.roles,
        tapped=tapped,
        layout=shown.layout,
        facts={"dtype": dtype(place.roles[tapped]), **place.numbers, **place.facts},
        weights=views,
        sources=sources,
        notes=tuple(notes),
    )


def _attention(shown: Shown, view: GraphView, anchor: Node, place: Place) -> Match | Miss:
    roles, given = place.roles, {**place.numbers, **place.facts}
    layout = dict.fromkeys(roles, "b h s d") | dict(shown.layout)
    for role in ("q", "k", "v", "out", "logits"):
        if role in roles and role not in shown.layout and len(shape(roles[role]) or ()) != 4:
            return Miss(
                anchor,
                f"{role} is {list(shape(roles[role]) or ())}, not [B, H, S, h]: say how it lies with layout={{{role!r}: ...}}",
            )
    edges: dict[str, Edge] = {}
    for role in ("q", "k", "v"):
        reader, where = place.edges[role][0]
        if where is None:
            return Miss(anchor, f"{role} enters inside a list, which is not followed")
        edges[role] = Edge(reader, where)
    broken = dict(shown.broken)
    if given.get("softcap") is not None:
        broken |= dict.fromkeys(NO_BIAS_PAIR, "the logits are capped: a shift of all keys moves each logit differently")
    if given.get("masked") or "mask" in roles:
        broken.setdefault("law/value_mass", "a mask may empty whole rows")
    found = attention_site(
        view,
        anchor,
        pattern=shown.name,
        edges=edges,
        layout=layout,
        out=roles["out"],
        logits=roles.get("logits"),
        causal=given.get("causal"),
        scale=given.get("scale"),
        dropout=given.get("dropout", 0.0) or 0.0,
        facts={
            "masked": "mask" in roles,
            **{name: x for name, x in given.items() if name not in ("causal", "scale", "dropout")},
        },
        broken=broken,
    )
    several = [role for role in edges if len(place.edges[role]) > 1]
    if several and isinstance(found, Match):
        told = f"{', '.join(several)} enters at several places: gradients are not read"
        return replace(found, operands={}, laws=without_gradients(found.laws, told))
    return found


def _router(shown: Shown, view: GraphView, anchor: Node, place: Place, traced: Traced) -> Match | Miss:
    logits, chosen = place.roles["logits"], place.roles["indices"]
    sizes, picked = shape(logits), shape(chosen)
    if not sizes or not picked:
        return Miss(anchor, "its logits or its chosen indices are no tensors of the graph")
    written = [op(node) for node in traced.graph.nodes if node in traced.live and is_op(node)]
    origin = trace_features(view, logits)
    weight = weight_view(view, origin)
    told = () if origin else (f"the logits were not traced to a weight: {getattr(origin, 'reason', '')}",)
    return Match(
        kind="router",
        pattern=shown.name,
        anchor=anchor,
        roles={"scores": logits, **place.roles},
        tapped="logits",
        facts={
            "experts": sizes[-1],
            "top_k": picked[-1],
            "scoring": next((name for name in _SCORINGS if name in written), "softmax"),
            "dtype": dtype(logits),
            **place.numbers,
            **place.facts,
        },
        weights={"weight": weight} if weight is not None else {},
        sources={"weight": origin.sources} if isinstance(origin, Origin) else {},
        notes=told,
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
