"""Attention written out: a product of queries and keys, a softmax along the keys, a product with the values.

Which operand is which is read off the axes alone. The axis of the softmax belongs to the keys, whatever views, masks and biases
stand between, and the operand that holds it is k; the axis summed over in the second product must be the same. Keys are made from
data: a softmax over a table, over slots or over classes is no attention.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.fx import Node

from foreshock.patterns.axes import Operand, layouts
from foreshock.patterns.boundary import NO_BIAS_PAIR, OUTPUT_LAWS, attention_site
from foreshock.patterns.coordinates import RULES, Columns, corner
from foreshock.patterns.graph import GraphView
from foreshock.patterns.logits import Logits, Place, constant, products_before
from foreshock.patterns.masks import Sight, sight
from foreshock.patterns.ops import args, argument, op, shape
from foreshock.patterns.pattern import Edge, Match, Miss, Pattern
from foreshock.patterns.products import Product
from foreshock.patterns.pullback import Pull
from foreshock.patterns.softmax import ANCHORS, Softmax, Use, softmax, uses
from foreshock.patterns.writes import Write

NAME = "written-out attention"
_READERS = frozenset({"softmax", "sub", "exp", "log_softmax"})
_TRANSPOSED = frozenset({"transpose", "permute", "mT", "t", "movedim"})


def _match(view: GraphView, node: Node) -> Match | Miss:
    found = softmax(node)
    if found is None:
        return Miss(node, "no softmax", quiet=True)
    sizes = shape(found.logits) or ()
    reason = ""
    for use in uses(view, found):
        kept = _kept_keys(use, found)
        if kept is None:
            continue
        first, count = kept
        row = tuple(np.arange(first, first + count) if axis == found.axis else 0 for axis in range(len(sizes)))
        for logits in products_before(view, found.logits, row, _reader(found)):
            result = _attention(view, node, found, use, logits, first)
            if isinstance(result, Match):
                return result
            reason = reason or result
    return Miss(node, reason or "no product before and after the softmax", quiet=not reason)


WRITTEN = Pattern(NAME, ANCHORS, _match)


def _reader(found: Softmax) -> Node:
    """The node that reads the logits: a shift by the row's maximum may stand before the softmax itself."""
    readers = [user for user in found.logits.users if op(user) in _READERS]
    return readers[0] if readers else found.weights


def _kept_keys(use: Use, found: Softmax) -> tuple[int, int] | None:
    """Which columns of the softmax are keys: the first, and how many. Others (sinks) are cut off before the product."""
    source = use.product.edges[use.side].source
    axis = use.product.letters[use.side].index(use.key)
    frame = shape(source) or ()
    moved = use.place(tuple(np.arange(size) if a == axis else 0 for a, size in enumerate(frame)))
    column = None if moved is None else moved[found.axis]
    if column is None or np.ndim(column) == 0 or (np.diff(column) != 1).any():
        return None
    return int(column[0]), len(column)


def _attention(view: GraphView, node: Node, found: Softmax, use: Use, logits: Logits, first: int) -> Match | str:
    met = logits.product
    row = {
        letter
        for letter, column in zip(met.result, _at_keys(found, use, logits, first), strict=True)
        if np.ndim(column)
    }
    holders = [side for side in range(len(met.edges)) if row & set(met.sizes(side))]
    if not row or len(met.edges) != 2 or len(holders) != 1:
        return "the product before the softmax does not tell queries from keys"
    k_side = holders[0]
    sides = {"q": 1 - k_side, "k": k_side}
    values = [side for side in range(len(use.product.edges)) if side != use.side and use.key in use.product.sizes(side)]
    if len(values) != 1:
        return "the product after the softmax has no values along the keys"
    v_edge = use.product.edges[values[0]]
    q_edge, k_edge = (met.edges[sides[role]] for role in ("q", "k"))
    reason = _not_from_data(view, met, q_edge, k_edge, v_edge)
    if reason:
        return reason
    return _site(view, node, found, use, logits, sides, values[0], first)


def _at_keys(found: Softmax, use: Use, logits: Logits, first: int) -> Columns:
    source = use.product.edges[use.side].source
    axis = use.product.letters[use.side].index(use.key)
    frame = shape(source) or ()
    weights = use.place(tuple(np.arange(size) if a == axis else 0 for a, size in enumerate(frame)))
    return (logits.place(weights) if weights is not None else None) or (0,) * len(logits.product.result)


def _not_from_data(view: GraphView, met: Product, q: Edge, k: Edge, v: Edge) -> str:
    """Why this is no attention for want of keys, values or queries made from data."""
    pull = Pull(view)
    for role, edge in (("keys", k), ("values", v)):
        if not pull.varies(view, edge.source) and not _is_projected(pull, view, edge):
            return f"softmax between two products, but its {role}, {_called(view, edge.source)}, are a constant or a parameter"
    if pull.varies(view, q.source):
        return ""
    # A fixed query is one of a pooling attention if keys and values are two projections; else it is a gate or a dispatch.
    reason = f"softmax between two products, but its queries, {_called(view, q.source)}, are a parameter"
    if op(met.node) in ("linear", "addmm"):
        return f"{reason} that projects one input"
    if not all(_is_projected(pull, view, edge) for edge in (k, v)):
        return f"{reason}, and its keys and values are no projections"
    of_keys, of_values = (Pull(view)(edge.source, corner(edge.source), edge.node) for edge in (k, v))
    assert of_keys is not None
    assert of_values is not None
    if of_keys.node is of_values.node and of_keys.coordinates == of_values.coordinates:
        return f"{reason}, and its keys and values are the same"
    query = Pull(view)(q.source, corner(q.source), q.node)
    bare = query is None or pull.projection(query.view, query.node) is None
    copies = RULES.keys() | {"identity", "cast", "mul", "div"}
    if bare and any(op(step) not in copies for step in of_keys.path):
        return f"{reason}, and its keys are no projection"
    return ""


def _is_projected(pull: Pull, view: GraphView, edge: Edge) -> bool:
    end = Pull(view)(edge.source, corner(edge.source), edge.node)
    return end is not None and not end.bent and pull.projection(end.view, end.node) is not None


def _called(view: GraphView, node: Node) -> str:
    return f"`{view.names.get(view.source(node), node.name)}`"


def _site(
    view: GraphView,
    node: Node,
    found: Softmax,
    use: Use,
    logits: Logits,
    sides: Mapping[str, int],
    v_side: int,
    first: int,
) -> Match | str:
    after, before = use.product, logits.product
    letters = after.letters[use.side]
    own = set(after.sizes(use.side))
    scale = logits.scale
    frame, to_softmax, to_operand, keys = _frame(found, use)

    def to_product(side: int) -> Any:
        def place(c: Columns) -> Columns | None:
            weights = to_softmax(c)
            at = None if weights is None else logits.place(weights)
            return None if at is None else before.place(side, dict(zip(before.result, at, strict=True)))

        return place

    edges: dict[str, Edge] = {}
    operands: dict[str, Operand] = {}
    entries = {role: _entries(view, before, side) for role, side in sides.items()}
    for role, entry in _outermost(view, entries).items():
        scale = None if scale is None else scale * entry.factor
        edges[role] = entry.edge
        operands[role] = Operand(
            entry.edge.source, _then(to_product(sides[role]), entry.rules), entry.channels, entry.edge.node
        )
    values = after.edges[v_side]
    edges["v"] = values
    operands["v"] = Operand(
        values.source,
        lambda c: after.place(v_side, dict(zip(letters, to_operand(c), strict=True))),
        after.channels(v_side, own),
        values.node,
    )
    out = use.out
    if out is not None:
        operands["out"] = Operand(
            out,
            lambda c: tuple(
                dict(zip(letters, c, strict=True)).get(letter, 0) if letter in own else 0 for letter in after.result
            ),
            tuple(axis for axis, letter in enumerate(after.result) if letter not in own),
        )
    sizes = list(shape(found.logits) or ())
    sizes[found.axis] = frame[keys]
    operands["logits"] = Operand(found.logits, to_softmax, sizes=tuple(sizes))
    layout = layouts(view, frame, operands, keys=keys)
    if isinstance(layout, str):
        return layout
    readable = not found.padded and not (out is not None and view.written(found.logits, out))
    sinks = logits.sinks or found.padded
    facts: dict[str, Any] = {"masked": logits.masked, "softcap": logits.softcap, "sinks": sinks}
    seen = _sight(view, found, logits, layout["logits"], frame[keys]) if logits.hides else None
    causal = None if logits.masked or logits.biased else False
    if seen is not None:
        causal, facts["masked"] = seen.causal, seen.further
    if first:
        facts["first_key"] = first
    if use.altered or _adds(after.node):
        facts["shadow"] = False
    if not logits.plain or found.padded:
        facts["recompute"] = False
    result = attention_site(
        view,
        node,
        pattern=NAME,
        edges=edges,
        layout=layout,
        out=out,
        logits=found.logits if readable else None,
        causal=causal,
        scale=math.nan if scale is None else scale,
        dropout=constant(use.dropout),
        facts=facts,
        broken=_broken(use, logits, sinks),
    )
    return result if isinstance(result, Match) else result.reason


def _frame(found: Softmax, use: Use) -> tuple[tuple[int, ...], Place, Callable[[Columns], Columns], int]:
    """The axes that all tensors share, the way from an element of them to the softmax and to the product's operand, and which of
    them is that of the keys: the operand's, but where it takes several parts of one softmax together the softmax's own."""
    own, whole = shape(use.product.edges[use.side].source) or (), shape(found.weights) or ()
    key = use.product.letters[use.side].index(use.key)
    if not use.joined or math.prod(own) == math.prod(whole):
        return own, use.place, lambda c: c, key
    columns = [
        use.place(tuple(np.arange(n) if a == axis else 0 for a, n in enumerate(own))) for axis in range(len(own))
    ]

    def to_operand(c: Columns) -> Columns:
        return tuple(_inverse(column or (), size, c) for column, size in zip(columns, own, strict=True))

    return whole, lambda c: c, to_operand, found.axis


def _inverse(column: Columns, size: int, c: Columns) -> Any:
    """The place along one axis, which moves as ``column`` says, of what lies at ``c``."""
    moving = next((axis for axis, x in enumerate(column) if np.ndim(x) and len(x) > 1), None)
    return 0 if moving is None else c[moving] // int(column[moving][1] - column[moving][0]) % size


def _sight(view: GraphView, found: Softmax, logits: Logits, layout: str, keys: int) -> Sight | None:
    """Which keys are seen, where queries and keys are the last axes."""
    sizes = shape(found.logits) or ()
    if found.axis != len(sizes) - 1 or len(sizes) < 2 or layout.split()[-2:-1] != ["s"]:
        return None
    return sight(view, logits.hides, sizes[-2], keys)


def _adds(node: Node) -> bool:
    """Whether a product adds its values to another tensor."""
    return op(node) in ("baddbmm", "addmm") and argument(node, 3, "beta", 1) != 0


def _broken(use: Use, logits: Logits, sinks: bool) -> dict[str, str]:
    """Laws that this form breaks. A softmax written out is differentiated by PyTorch: its rows always sum to one, whatever the
    masks; only what comes after it takes mass away."""
    broken = dict(logits.broken)
    if sinks:
        reason = "columns that are no keys take a share of each row"
        broken |= dict.fromkeys((*NO_BIAS_PAIR, "law/value_mass"), reason)
    if use.altered:
        broken |= dict.fromkeys(("law/value_mass", *OUTPUT_LAWS), use.altered)
    if use.joined:
        broken["law/bias"] = use.altered
    if use.emptied:
        broken["law/value_mass"] = "a mask may empty whole rows"
    if _adds(use.product.node):
        for law in ("law/bias", *OUTPUT_LAWS):
            broken.setdefault(law, "the output is added to another tensor in the same product")
    if use.shared:
        broken.setdefault(
            "law/bias", "the probabilities are read elsewhere too: their gradient is not of the output alone"
        )
    return broken


@dataclass(frozen=True)
class _Entry:
    """Where an operand may be said to enter: further out, before views and multiplications by numbers that it alone goes through.
    ``rules`` lead from its axes at the product to those there, ``factor`` is what the numbers come to."""

    edge: Edge
    channels: tuple[int, ...]
    factor: float = 1.0
    numbers: int = 0
    rules: tuple[Place, ...] = ()


def _entries(view: GraphView, met: Product, side: int) -> list[_Entry]:
    """The places where an operand of ``met`` may enter, the product first."""
    found = [_Entry(met.edges[side], met.channels(side, set(met.result)))]
    while True:
        entry = found[-1]
        source = entry.edge.source
        at, factor = _multiplied(source)
        inner = args(source)[at] if len(args(source)) > at else None
        if len(source.users) != 1 or not isinstance(inner, Node) or shape(inner) is None:
            return found
        if view.written(inner, met.node) or Write.storage_of(inner) is None:
            return found
        if op(source) in _TRANSPOSED:
            axes = RULES[op(source)](source, tuple(range(len(shape(source) or ())))) or ()
            channels = tuple(there for there, here in enumerate(axes) if here in entry.channels)
            rules: tuple[Place, ...] = (*entry.rules, functools.partial(RULES[op(source)], source))
            found.append(replace(entry, edge=Edge(source, 0), channels=channels, rules=rules))
        elif factor and shape(inner) == shape(source) and Write.storage_of(inner) != Write.storage_of(source):
            found.append(replace(entry, edge=Edge(source, at), factor=entry.factor * factor, numbers=entry.numbers + 1))
        else:
            return found


def _multiplied(node: Node) -> tuple[int, float]:
    """Which argument of ``node`` is multiplied by a number, and the number; 0.0 if none is."""
    if op(node) not in ("mul", "div") or len(args(node)) < 2:
        return 0, 0.0
    for at in (0, 1) if op(node) == "mul" else (0,):
        number = constant(args(node)[1 - at])
        if number:
            return at, number if op(node) == "mul" else 1 / number
    return 0, 0.0


def _outermost(view: GraphView, entries: Mapping[str, list[_Entry]]) -> dict[str, _Entry]:
    """The nearest entries beyond all numbers, of those at which both operands are there before the first of them goes in."""
    early = []
    for q, k in itertools.product(entries["q"], entries["k"]):
        first = min(view.order[q.edge.node], view.order[k.edge.node])
        if all(view.order.get(entry.edge.source, -1) < first for entry in (q, k)):
            early.append((q, k))
    q, k = max(early, key=lambda pair: (sum(e.numbers for e in pair), -sum(len(e.rules) for e in pair)))
    return {"q": q, "k": k}


def _then(place: Place, rules: tuple[Place, ...]) -> Place:
    def moved(c: Columns) -> Columns | None:
        found = place(c)
        for rule in rules:
            found = None if found is None else rule(found)
        return found

    return moved
