"""Scaled dot-product attention: PyTorch's own call, and opaque kernels described by the roles of their arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from foreshock.errors import PatternError
from foreshock.layout import BHSD, parse
from foreshock.patterns.axes import Operand, layouts
from foreshock.patterns.boundary import attention_site
from foreshock.patterns.coordinates import Columns, broadcast
from foreshock.patterns.described import check_layout, check_node, check_op
from foreshock.patterns.graph import GraphView
from foreshock.patterns.masks import Hides, Sight, sight
from foreshock.patterns.ops import argument, described, op, schema, shape, tensor, value
from foreshock.patterns.pattern import Edge, Match, Miss, Pattern
from foreshock.patterns.provenance import along_channels, head_axis

_NAMED = {"BHSD": "b h s d", "BSHD": "b s h d"}
_ROLES = ("q", "k", "v")


def _match_sdpa(view: GraphView, node: Node) -> Match | Miss:
    edges: dict[str, Edge] = {}
    for position, (role, name) in enumerate((("q", "query"), ("k", "key"), ("v", "value"))):
        edge = Edge(node, name if name in node.kwargs else position)
        if (name not in node.kwargs and position >= len(node.args)) or tensor(edge.source) is None:
            return Miss(node, f"{role} is no tensor of the graph")
        edges[role] = edge
    given = argument(node, 3, "attn_mask")
    mask = given if isinstance(given, Node) else None
    layout = _sdpa_layouts(view, node, edges, mask)
    if isinstance(layout, str):
        return Miss(node, layout)
    dropout = argument(node, 4, "dropout_p", 0.0)
    causal = argument(node, 5, "is_causal", False)
    seen = None if mask is None else _seen(view, mask, edges)
    if mask is not None:
        causal = causal or (None if seen is None else seen.causal)
    return attention_site(
        view,
        node,
        pattern="scaled_dot_product_attention",
        edges=edges,
        layout=layout,
        out=node,
        mask=mask,
        causal=causal if isinstance(causal, bool) else None,
        scale=argument(node, 6, "scale"),
        dropout=_number(dropout),
        facts={"masked": mask is not None and (seen is None or seen.further)},
        broken={
            "law/value_mass": "a mask may empty whole rows" if mask is not None and (seen is None or seen.empty) else ""
        },
    )


def _seen(view: GraphView, mask: Node, edges: dict[str, Edge]) -> Sight | None:
    queries, keys = ((shape(edges[role].source) or (0, 0))[-2] for role in ("q", "k"))
    fake = tensor(mask)
    assert fake is not None
    seen = sight(view, [Hides("kept" if fake.dtype is torch.bool else "added", mask)], queries, keys)
    varies = any(isinstance(size, torch.SymInt) for size in fake.shape)  # other lengths may be masked otherwise
    return replace(seen, empty=True) if seen is not None and varies else seen


SDPA = Pattern("scaled_dot_product_attention", frozenset({"scaled_dot_product_attention"}), _match_sdpa)


def _sdpa_layouts(view: GraphView, node: Node, edges: dict[str, Edge], mask: Node | None) -> dict[str, str] | str:
    """All axes but the last two are a batch to the kernel; which of them hold heads only the weights tell."""
    sources = {role: edge.source for role, edge in edges.items()} | {"out": node}
    sizes = {role: shape(source) or () for role, source in sources.items()}
    if any(len(own) < 2 for own in sizes.values()):
        return f"q, k, v and out need positions and channels: {sizes}"
    if mask is not None:
        sizes["mask"] = shape(mask) or ()
    usual = all(len(own) == 4 and own[0] == sizes["q"][0] for role, own in sizes.items() if role != "mask")
    if usual and len(sizes.get("mask", (0,) * 4)) == 4 and along_channels(view, sources["q"], 1):
        return dict.fromkeys(sizes, BHSD)  # heads where nearly everybody has them: nothing else need be asked
    lead = sizes["out"][:-2]
    frame = (*lead, sizes["q"][-2], sizes["k"][-2])
    if any(len(sizes[role]) - 2 > len(lead) for role in sources):
        return f"q, k, v and out do not fit each other: {sizes}"
    operands = {}
    for role, source in sources.items():
        own, at = sizes[role], len(frame) - (1 if role in ("k", "v") else 2)
        operands[role] = Operand(source, _within(own[:-1], frame, at), (len(own) - 1,), node)
    if mask is not None:
        operands["mask"] = Operand(mask, lambda c: broadcast(c, shape(mask) or ()))
    return layouts(view, frame, operands, keys=len(frame) - 1, queries=len(frame) - 2)


def _within(sizes: tuple[int, ...], frame: tuple[int, ...], positions: int) -> Any:
    """An element of the frame -> of a tensor with leading axes, positions (``positions`` in the frame) and channels. Fewer heads
    than the frame has are shared by equal numbers of query heads."""
    axes = (*range(len(frame) - 1 - len(sizes), len(frame) - 2), positions)

    def place(c: Columns) -> Columns | None:
        found = []
        for axis, size in zip(axes, sizes, strict=True):
            if frame[axis] % size:
                return None
            found.append(c[axis] if size == frame[axis] else np.asarray(c[axis]) // (frame[axis] // size))
        return (*(column if np.ndim(column) else int(column) for column in found), 0)

    return place


def attention_op(
    name: str,
    *,
    q: int | str = 0,
    k: int | str = 1,
    v: int | str = 2,
    output: int | None = 0,
    layout: str | None = None,
    causal: bool | int | str | None = None,
    scale: float | int | str | None = None,
    dropout: float | str = 0.0,
) -> Pattern:
    """A pattern for an opaque attention kernel, ``"namespace::name"``.

    ``q``, ``k``, ``v`` say which argument (position or name) holds queries, keys and values. ``layout`` says how they and the
    output lie: ``"BHSD"``, ``"BSHD"``, a layout of `foreshock.layout` such as ``"s h d"`` or ``"(b h=8) s d"``, or None, which
    tells ``[B, H, S, h]`` from ``[B, S, H, h]`` by the projections. ``output`` is the index of the attention output among the
    results. ``causal`` is a constant, or the argument that says so; None: not known, and the monitors that recompute rows stay
    out. ``scale`` and ``dropout`` likewise; a scale of None is ``1 / sqrt(h)``. Arguments left out take their default.
    """
    lies = None if layout is None else _NAMED.get(layout, layout)
    if lies is not None and not _is_layout(lies):
        raise PatternError(
            f"describing {name}: layout is {layout!r}; give 'BHSD', 'BSHD', axes by name as in 'b s h d' (b batch, s positions,"
            f" h heads, d channels), or None"
        )
    named = {"q": q, "k": k, "v": v, "causal": _place(causal), "scale": _place(scale), "dropout": _place(dropout)}
    check_op(name, named, {"output": output})

    def match(view: GraphView, node: Node) -> Match | Miss:
        check_node(name, node, named, {"output": output})
        if layout in _NAMED:
            check_layout(name, view, described(node, q), layout)
        edges = {role: _edge(node, where) for role, where in zip(_ROLES, (q, k, v), strict=True)}
        for role, edge in edges.items():
            if edge is None or tensor(edge.source) is None:
                return Miss(node, f"{role} is no tensor of the graph")
        found = {role: edge for role, edge in edges.items() if edge is not None}
        out = _result(node, output)
        if tensor(out) is None:
            return Miss(node, "its output is not used")
        sizes = [shape(edge.source) or () for edge in found.values()]
        axes = lies or ("b h s d" if head_axis(view, found["q"].source) == 1 else "b s h d")
        if any(len(own) != len(parse(axes)) for own in sizes):
            return Miss(
                node, f"q, k and v are {sizes}, not `{axes}`: describe the kernel with `attention_op(layout=...)`"
            )
        known: Any = _said(node, causal)
        notes: tuple[str, ...] = ()
        if known and _lengths(sizes, axes):
            known = None
            notes = ("causal with unequal lengths: kernels differ in which corner they align, no recomputed rows",)
        return attention_site(
            view,
            node,
            pattern=name,
            edges=found,
            layout=dict.fromkeys((*_ROLES, "out"), axes),
            out=out,
            causal=bool(known) if isinstance(known, int) else None,
            scale=_said(node, scale),
            dropout=_number(described(node, dropout) if isinstance(dropout, str) else dropout),
            notes=notes,
        )

    return Pattern(name, frozenset({name.removeprefix("aten::")}), match)


def _place(given: Any) -> int | str | None:
    """An argument's place, where the description may also be a constant: a bool is none, nor is a float."""
    return given if isinstance(given, str) or type(given) is int else None


def _said(node: Node, given: Any) -> Any:
    """The argument at a place of that kind, or the constant itself."""
    place = _place(given)
    return given if place is None else described(node, place)


def _is_layout(layout: str) -> bool:
    try:
        letters = [name[0] for joined in parse(layout) for name in joined]
    except (ValueError, IndexError):
        return False
    return set(letters) <= set("bshd") and {"s", "d"} <= set(letters)


def _number(given: Any) -> float | None:
    found = value(given) if isinstance(given, Node) else given
    return float(found) if isinstance(found, int | float) else None


def _edge(node: Node, where: int | str) -> Edge | None:
    """Where an argument of this place or name stands among those that were passed."""
    order = [entry.name for entry in getattr(schema(node), "arguments", ())]
    position = order.index(where) if isinstance(where, str) and where in order else where
    keyword = order[position] if isinstance(position, int) and position < len(order) else str(position)
    found = Edge(node, keyword if keyword in node.kwargs else position)
    held = found.where in node.kwargs if isinstance(found.where, str) else found.where < len(node.args)
    return found if held and isinstance(found.source, Node) else None


def _result(node: Node, output: int | None) -> Node | None:
    if output is None or tensor(node) is not None:
        return node
    return next((user for user in node.users if op(user) == "getitem" and user.args[1] == output), None)


def _lengths(sizes: list[tuple[int, ...]], axes: str) -> bool:
    """Whether there are other numbers of keys than of queries."""
    at = [axis for axis, joined in enumerate(parse(axes)) if any(name[0] == "s" for name in joined)]
    return any(sizes[0][axis] != sizes[1][axis] for axis in at)
