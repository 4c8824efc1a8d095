"""What every form of attention comes to: roles with layouts, facts, weights, and the laws that hold there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from foreshock.patterns.axes import channels_of, heads_of
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import shape, tensor, value
from foreshock.patterns.pattern import Edge, Match, Miss
from foreshock.patterns.provenance import Origin, Untraced, among_ranks, trace, weight_view
from foreshock.patterns.sharded import among_all
from foreshock.records import WeightView

BACKWARD_LAWS = ("law/key_shift", "law/value_mass", "law/euler", "law/bias")
OUTPUT_LAWS = ("law/hull", "law/shadow")  # of the forward pass alone
LAWS = (*BACKWARD_LAWS, *OUTPUT_LAWS)
NO_BIAS_PAIR = (
    "law/key_shift",
    "law/bias",
)  # both rest on a shift of all keys that leaves every row's softmax as it is
NO_GRADIENT = "no gradient reaches"  # how the reason begins why no law holds in evaluation
Sizes = tuple[int, int, int, int]


def attention_site(
    view: GraphView,
    anchor: Node,
    *,
    pattern: str,
    edges: Mapping[str, Edge],
    layout: Mapping[str, str],
    out: Node | None,
    logits: Node | None = None,
    mask: Node | None = None,
    causal: bool | None = None,
    scale: Any = None,
    dropout: Any = 0.0,
    facts: Mapping[str, Any] | None = None,
    broken: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> Match | Miss:
    """A match, or why the shapes are none of an attention.

    ``scale`` is a number (NaN: not known), a node that yields one, or None for ``1 / sqrt(h)``; ``dropout`` a number, or None where
    it is not known. ``broken`` maps laws that the form breaks to the reason. Rows are read from ``logits`` where they are given,
    else recomputed from q, k and ``mask`` where causality and scale are known and the fact ``recompute`` is not False.
    """
    roles = {role: edge.source for role, edge in edges.items()}
    roles |= {role: node for role, node in (("out", out), ("logits", logits), ("mask", mask)) if node is not None}
    sizes = {role: heads_of(layout[role], shape(node) or ()) for role, node in roles.items()}
    reason = _misfit(sizes)
    if reason:
        return Miss(anchor, reason)
    (batch, heads, queries, head_dim), (_, kv_heads, keys, _) = sizes["q"], sizes["k"]
    batch, remarks = max(own[0] for own in sizes.values()), list(notes)
    number = value(scale) if isinstance(scale, Node) else head_dim**-0.5 if scale is None else scale
    known_scale = float(number) if isinstance(number, int | float) and not math.isnan(number) else None
    if known_scale is None:
        remarks.append("the softmax scale is not known")
    fits = mask is None or all(
        n in (1, whole) for n, whole in zip(sizes["mask"], (batch, heads, queries, keys), strict=True)
    )
    if mask is not None and not fits:
        remarks.append(f"the mask {list(shape(mask) or ())} does not fit the heads and sequences: no recomputed rows")
        del roles["mask"]
    recompute = fits and (facts or {}).get("recompute", True)
    told = causal if mask is None else bool(causal)  # rows see what the mask says
    laws = _laws(roles, known_scale, dropout, told, recompute, broken or {})
    traced = traced_weights(view, roles, layout, sizes)
    return Match(
        kind="attention",
        pattern=pattern,
        anchor=anchor,
        roles=roles,
        operands={role: e.where if e.node is anchor else e for role, e in edges.items()},
        layout={role: layout[role] for role in roles},
        facts={
            "heads": heads,
            "kv_heads": min(kv_heads, traced.kv_heads),
            "head_dim": head_dim,
            "value_dim": sizes["v"][3],
            "causal": causal,
            "scale": known_scale,
            "dropout": float("nan") if dropout is None else float(dropout),
            "dtype": coarsest_dtype([roles[role] for role in ("q", "k", "v", "out") if role in roles]),
            **({} if fits else {"recompute": False}),
            **traced.facts,
            **(facts or {}),
        },
        laws=laws,
        weights=traced.weights,
        sources=traced.sources,
        notes=(*remarks, *traced.notes),
    )


class Traced(NamedTuple):
    """The weights behind q and k, their placeholders, what is to say of them, and how many key heads are distinct.

    ``facts``: of a `DTensor`, and of heads that ranks swapped for positions, which of the whole model's heads this rank's are
    (``head_offset`` of ``heads_of``, and of keys). ``losses``: on how many ranks positions are, each with a loss of its own.
    """

    weights: dict[str, WeightView]
    sources: dict[str, tuple[Node, ...]]
    notes: tuple[str, ...]
    kv_heads: int
    facts: dict[str, int]


def traced_weights(
    view: GraphView, roles: Mapping[str, Node], layout: Mapping[str, str], sizes: Mapping[str, Sizes]
) -> Traced:
    """Back from q and k to the weights, for tensors that lie as ``layout`` says and are ``sizes`` with heads first."""
    found = Traced({}, {}, (), sizes["k"][1], {})
    for role in ("q", "k"):
        states = role == "k" and roles["k"] is roles.get("v")
        origin = _origin(view, roles[role], layout[role], sizes[role], states)
        if not isinstance(origin, Origin):
            found = found._replace(notes=(*found.notes, f"{role} was not traced to a weight: {origin.reason}"))
            continue
        weight = weight_view(view, origin)
        if weight is not None:
            found.weights[f"{role}_weight"] = weight
        found.sources[f"{role}_weight"] = origin.sources
        found = found._replace(notes=(*found.notes, *(f"{role}: {note}" for note in origin.notes)))
        place = among_all(origin.parameter, origin.axes, len(origin.index))
        swapped = among_ranks(view, origin, len(origin.index)) if place is None else None
        if swapped is not None:
            place = swapped
            found.facts["losses"] = swapped[1] // len(origin.index)
        if place is not None:
            names = ("head_offset", "heads_of") if role == "q" else ("kv_head_offset", "kv_heads_of")
            found.facts.update(zip(names, place, strict=True))
        if role == "k":
            found = found._replace(kv_heads=min(found.kv_heads, len(origin.index)))
    return found


def entering_heads(match: Match) -> tuple[int, ...]:
    """How many heads of keys and of values enter an attention: more than have weights of their own where they are repeated."""
    held = [role for role in ("k", "v") if match.kind == "attention" and role in match.layout and role in match.roles]
    return tuple(heads_of(match.layout[role], shape(match.roles[role]) or ())[1] for role in held)


def _origin(view: GraphView, node: Node, layout: str, sizes: Sizes, states: bool = False) -> Origin | Untraced:
    """The weights behind the last position; behind the first where what stands last is no projection (a learned extra key).

    ``states``: keys that are the values too, which may be states of several layers: then one projection must make them all.
    """
    own = shape(node) or ()
    last = trace(view, node, channels_of(layout, own), sizes[1], sizes[3])
    first = trace(view, node, channels_of(layout, own, first=True), sizes[1], sizes[3])
    one = isinstance(first, Origin) and isinstance(last, Origin) and first.projection is last.projection
    if states and not one and (isinstance(first, Origin) or isinstance(last, Origin)):
        return Untraced(f"{node.name}: keys that are the values too, and not made by one projection")
    if not isinstance(last, Origin):
        return first if isinstance(first, Origin) else last
    if isinstance(first, Origin) and first.projection is not last.projection:
        note = f"positions come from several projections: the factors are of {last.projection.name}, the last"
        return replace(last, notes=(*last.notes, note))
    return last


def _misfit(sizes: Mapping[str, Sizes]) -> str:
    q, k, v = sizes["q"], sizes["k"], sizes["v"]
    out = sizes.get("out", (max(q[0], k[0], v[0]), q[1], q[2], v[3]))
    batch, shown = max(q[0], k[0], v[0]), ", ".join(f"{role} {list(own)}" for role, own in sizes.items())
    if any(own[0] not in (1, batch) for own in (q, k, v)) or out[0] != batch:
        return f"batches do not fit each other: {shown}"
    if q[3] != k[3] or k[2] != v[2] or out[2:] != (q[2], v[3]):
        return f"shapes do not fit an attention: {shown}"
    if out[1] != q[1] or q[1] % k[1] or q[1] % v[1]:
        return f"its heads do not fit each other: {shown}"
    return ""


def _laws(
    roles: Mapping[str, Node],
    scale: float | None,
    dropout: Any,
    causal: bool | None,
    recompute: bool,
    broken: Mapping[str, str],
) -> dict[str, str]:
    laws = dict.fromkeys(LAWS, "")
    if scale is None:
        laws["law/bias"] = "the softmax scale is not known"
    if "logits" not in roles:
        laws["law/shadow"] = unread(scale, causal, recompute)
    if dropout != 0.0:
        lost = "dropout on the probabilities: rows do not sum to one"
        laws |= dict.fromkeys(("law/value_mass", *OUTPUT_LAWS), lost)
    if "out" not in roles:
        no_out = "the output projection is part of the same product: the attention's output has no tensor of its own"
        laws |= dict.fromkeys(("law/key_shift", "law/value_mass", "law/bias", *OUTPUT_LAWS), no_out)
    laws |= {law: reason for law, reason in broken.items() if reason}
    untapped = [role for role in ("q", "k", "v") if not getattr(tensor(roles[role]), "requires_grad", False)]
    return without_gradients(laws, f"{NO_GRADIENT} {', '.join(untapped)}") if untapped else laws


def unread(scale: float | None, causal: bool | None, recompute: bool) -> str:
    """Why no rows are recomputed from q, k and v, or ""."""
    if not recompute:
        return "no recomputed rows: what is done to the logits is not followed"
    if scale is None:
        return "no recomputed rows: the softmax scale is not known"
    return "no recomputed rows: whether it is causal is not known" if causal is None else ""


def without_gradients(laws: Mapping[str, str], reason: str) -> dict[str, str]:
    """``laws`` where gradients are not read for ``reason``: those of the forward pass stay as they are."""
    return {law: told if law in (*OUTPUT_LAWS, "law/token_count") else reason for law, told in laws.items()}


def coarsest_dtype(nodes: Sequence[Node]) -> str:
    """The coarsest dtype at the boundary: under autocast a kernel takes float32 and computes in what it returns."""
    dtypes = {fake.dtype for fake in map(tensor, nodes) if fake is not None and fake.dtype.is_floating_point}
    return str(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)).removeprefix("torch.")
