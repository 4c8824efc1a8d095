"""Scaled dot-product attention: PyTorch's own call, and opaque kernels described by the roles of their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from foreshock.errors import PatternError
from foreshock.patterns.described import check_layout, check_node, check_op
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import args, argument, described, op, schema, shape, tensor, value
from foreshock.patterns.pattern import Match, Miss, Pattern
from foreshock.patterns.provenance import Origin, Untraced, head_axis, trace_heads, weight_view

LAWS = ("law/key_shift", "law/value_mass", "law/euler", "law/bias")
# Arguments of an undescribed kernel that only hide keys or add to logits: the laws of shifts outlive them.
_MASKS = frozenset({"mask", "attn_mask", "attention_mask", "attn_bias", "alibi_slopes"})


def _match_sdpa(view: GraphView, node: Node) -> Match | Miss:
    operands: dict[str, int | str] = {}
    for position, (role, name) in enumerate((("q", "query"), ("k", "key"), ("v", "value"))):
        operands[role] = name if name in node.kwargs else position
    mask = argument(node, 3, "attn_mask")
    return _attention(
        view,
        node,
        pattern="scaled_dot_product_attention",
        operands=operands,
        out=node,
        layout="BHSD",
        causal=argument(node, 5, "is_causal", False),
        mask=mask if isinstance(mask, Node) else None,
        scale=argument(node, 6, "scale"),
        dropout=argument(node, 4, "dropout_p", 0.0),
    )


SDPA = Pattern("scaled_dot_product_attention", frozenset({"scaled_dot_product_attention"}), _match_sdpa)


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

    ``q``, ``k``, ``v`` say which argument (position or name) is ``[B, H, S, h]`` (``layout="BHSD"``) or ``[B, S, H, h]``
    (``"BSHD"``; None: decided from the projections); ``output`` is the index of the attention output among the results.
    ``causal`` is a constant, or the argument that says so; None: not known, and the monitors that recompute rows stay out.
    ``scale`` and ``dropout`` likewise; a scale of None is ``1 / sqrt(h)``. Arguments left out take their default of the schema.
    """
    if layout not in (None, "BHSD", "BSHD"):
        raise PatternError(f"describing {name}: layout is {layout!r}; give 'BHSD', 'BSHD' or None")
    named = {"q": q, "k": k, "v": v, "causal": _place(causal), "scale": _place(scale), "dropout": _place(dropout)}
    check_op(name, named, {"output": output})

    def match(view: GraphView, node: Node) -> Match | Miss:
        check_node(name, node, named, {"output": output})
        if layout is not None:
            check_layout(name, view, described(node, q), layout)
        declared = getattr(schema(node), "arguments", ())
        order = [entry.name for entry in declared]
        operands: dict[str, int | str] = {}
        for role, where in (("q", q), ("k", k), ("v", v)):
            position = order.index(where) if isinstance(where, str) and where in order else where
            keyword = order[position] if isinstance(position, int) and position < len(order) else str(position)
            operands[role] = keyword if keyword in node.kwargs else position
        return _attention(
            view,
            node,
            pattern=name,
            operands=operands,
            out=_result(node, output),
            layout=layout,
            causal=described(node, causal) if _place(causal) is not None else causal,
            mask=None,
            scale=described(node, scale) if _place(scale) is not None else scale,
            dropout=described(node, dropout) if isinstance(dropout, str) else dropout,
        )

    return Pattern(name, frozenset({name}), match)


def _place(given: Any) -> int | str | None:
    """An argument's place, where the description may also be a constant: a bool is none, nor is a float."""
    return given if isinstance(given, str) or type(given) is int else None


def described_by_schema(view: GraphView, node: Node) -> Match | Miss:
    """An op nobody described, whose schema calls its arguments q, k, v (or query, key, value): an attention kernel."""
    declared = schema(node)
    if declared is None:
        return Miss(node, "no schema", quiet=True)
    order = [entry.name for entry in declared.arguments]
    for names in (("q", "k", "v"), ("query", "key", "value")):
        if all(name in order for name in names):
            causal = next((name for name in ("causal", "is_causal") if name in order), None)
            scale = next((name for name in ("scale", "softmax_scale", "sm_scale") if name in order), None)
            dropout = next((name for name in ("dropout_p", "p_dropout", "dropout") if name in order), 0.0)
            several = len(declared.returns) > 1
            kernel = attention_op(
                declared.name,
                q=names[0],
                k=names[1],
                v=names[2],
                output=0 if several else None,
                causal=causal,
                scale=scale,
                dropout=dropout,
            )
            found = kernel.match(view, node)
            if not isinstance(found, Match):
                return found
            return _cautious(found, {*names, causal, scale, dropout}).with_note("recognised by its schema (q, k, v)")
    return Miss(node, "its schema has no q, k, v", quiet=True)


def _cautious(match: Match, understood: set[Any]) -> Match:
    """Without the laws and recomputed rows that an argument of unknown meaning may break."""
    node, declared = match.anchor, schema(match.anchor).arguments
    given = dict(zip((entry.name for entry in declared), args(node), strict=False)) | node.kwargs
    defaults = {entry.name: entry.default_value for entry in declared if entry.has_default_value()}
    unknown = [name for name in given if name not in understood and given[name] != defaults.get(name)]
    if not unknown:
        return match
    laws = dict(match.laws)
    for name in unknown:
        if name in _MASKS:
            laws["law/value_mass"] = laws["law/value_mass"] or "a mask may empty whole rows"
        elif isinstance(given[name], Node) or "cap" in name:
            laws = {
                law: reason or f"what the kernel's argument `{name}` means is not known" for law, reason in laws.items()
            }
    note = f"no recomputed rows: the kernel's arguments {', '.join(unknown)} are not described"
    return replace(match, facts={**match.facts, "causal": None}, laws=laws).with_note(note)


def _result(node: Node, output: int | None) -> Node | None:
    if output is None or tensor(node) is not None:
        return node
    return next((user for user in node.users if op(user) == "getitem" and user.args[1] == output), None)


@dataclass(frozen=True)
class _Sizes:
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


def _sizes(shapes: Mapping[str, tuple[int, ...]], axis: int) -> _Sizes | str:
    q, k, v, out = (shapes[role] for role in ("q", "k", "v", "out"))
    if any(len(sizes) != 4 for sizes in (q, k, v, out)):
        return f"q, k, v and out must be 4-D here, not {[len(sizes) for sizes in (q, k, v, out)]}"
    if not q[0] == k[0] == v[0] == out[0] or k[3 - axis] != v[3 - axis]:
        return f"batch or key sizes are broadcast, which is not followed: q {q}, k {k}, v {v}"
    if q[3] != k[3] or v[3] != out[3] or k[axis] != v[axis] or q[axis] % k[axis]:
        return f"shapes do not fit an attention: q {q}, k {k}, v {v}, out {out}"
    return _Sizes(q[axis], k[axis], q[3], v[3])


def _attention(
    view: GraphView,
    node: Node,
    *,
    pattern: str,
    operands: Mapping[str, int | str],
    out: Node | None,
    layout: str | None,
    causal: Any,
    mask: Node | None,
    scale: Any,
    dropout: Any,
) -> Match | Miss:
    roles: dict[str, Node] = {}
    for role, where in operands.items():
        found = (
            node.kwargs.get(where) if isinstance(where, str) else node.args[where] if where < len(node.args) else None
        )
        if not isinstance(found, Node) or tensor(found) is None:
            return Miss(node, f"{role} is no tensor of the graph")
        roles[role] = found
    if out is None or tensor(out) is None:
        return Miss(node, "its output is not used")
    roles["out"] = out
    axis = {"BHSD": 1, "BSHD": 2}.get(layout or "") or head_axis(view, roles["q"])
    sizes = _sizes({role: shape(found) or () for role, found in roles.items()}, axis)
    if isinstance(sizes, str):
        return Miss(node, sizes)
    if mask is not None:
        roles["mask"] = mask
    notes: list[str] = []
    known_causal = causal if isinstance(causal, bool) else None
    lengths = [(shape(roles[role]) or ())[3 - axis] for role in ("q", "k")]
    if known_causal and op(node) not in SDPA.anchors and lengths[0] != lengths[1]:
        known_causal = None
        notes.append("causal with unequal lengths: kernels differ in which corner they align, no recomputed rows")
    number = value(scale) if isinstance(scale, Node) else scale
    if number is None:
        number = sizes.head_dim**-0.5
    known_scale = float(number) if isinstance(number, int | float) else None
    if known_scale is None:
        notes.append("the softmax scale is computed at run time: no recomputed rows")
    drops = not (isinstance(dropout, int | float) and float(dropout) == 0.0)
    origins = {role: trace_heads(view, roles[role], axis) for role in ("q", "k")}
    weights, kv_heads = {}, sizes.kv_heads
    for role, origin in origins.items():
        if isinstance(origin, Untraced):
            notes.append(f"{role} was not traced to a weight: {origin.reason}")
            continue
        found_view = weight_view(view, origin)
        if found_view is not None:
            weights[f"{role}_weight"] = found_view
        if role == "k":
            kv_heads = min(kv_heads, len(origin.index))
    return Match(
        kind="attention",
        pattern=pattern,
        anchor=node,
        roles=roles,
        operands=operands,
        layout=dict.fromkeys(("q", "k", "v", "out"), "b h s d" if axis == 1 else "b s h d"),
        facts={
            "heads": sizes.heads,
            "kv_heads": kv_heads,
            "head_dim": sizes.head_dim,
            "value_dim": sizes.value_dim,
            "causal": known_causal,
            "scale": known_scale,
            "dropout": float(dropout) if isinstance(dropout, int | float) else float("nan"),
            "dtype": str(getattr(tensor(roles["q"]), "dtype", "float32")).removeprefix("torch."),
        },
        laws=_laws(view, roles, drops, known_scale),
        weights=weights,
        sources={f"{role}_weight": origin.sources for role, origin in origins.items() if isinstance(origin, Origin)},
        notes=tuple(notes),
    )


def _laws(view: GraphView, roles: Mapping[str, Node], drops: bool, scale: float | None) -> dict[str, str]:
    untapped = [role for role in ("q", "k", "v") if not getattr(tensor(roles[role]), "requires_grad", False)]
    if untapped:
        return dict.fromkeys(LAWS, f"no gradient reaches {', '.join(untapped)}")
    laws = dict.fromkeys(LAWS, "")
    if scale is None:
        laws["law/bias"] = "the softmax scale is not known"
    if drops:
        laws["law/value_mass"] = "dropout on the probabilities: rows do not sum to one"
    elif "mask" in roles:
        laws["law/value_mass"] = "a mask may empty whole rows"
    return laws
