"""What is seen and not watched yet: it goes to the ledger, for nothing may be silent."""

from __future__ import annotations

from torch.fx import Node

from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import args, op, shape
from foreshock.patterns.pattern import Miss, Pattern

_CARRIES = frozenset({"identity", "cast", "dropout", "reshape", "getitem", "mul"})
_PRODUCTS = frozenset({"matmul", "baddbmm", "einsum"})


def _written_out(view: GraphView, node: Node) -> Miss:
    """softmax(q k) v in separate ops: a product before the softmax, and one that takes the probabilities after it."""
    if len(shape(node) or ()) < 3 or not any(op(source) in _PRODUCTS for source in _near_sources(node)):
        return Miss(node, "no product before the softmax", quiet=True)
    carried = [node]
    for step in carried:
        for user in step.users:
            if op(user) in _PRODUCTS and step in args(user)[:3]:
                return Miss(node, "attention written out as product, softmax, product is not watched yet")
            if op(user) in _CARRIES and user not in carried and len(carried) < 16:
                carried.append(user)
    return Miss(node, "its probabilities enter no product", quiet=True)


def _near_sources(node: Node) -> list[Node]:
    """The softmax's input and what it is made of, a few elementwise steps back."""
    found = list(node.all_input_nodes)
    for source in found:
        if op(source) not in _PRODUCTS and len(found) < 32:
            found += [n for n in source.all_input_nodes if n not in found]
    return found


def _flex(view: GraphView, node: Node) -> Miss:
    return Miss(node, "flex_attention is not watched yet")


def _multi_head(view: GraphView, node: Node) -> Miss:
    return Miss(node, "attention inside one opaque multi_head_attention_forward call is not watched yet")


UNWATCHED: tuple[Pattern, ...] = (
    Pattern("written-out attention", frozenset({"softmax"}), _written_out),
    Pattern("flex_attention", frozenset({"higher_order::flex_attention"}), _flex),
    Pattern("multi_head_attention_forward", frozenset({"multi_head_attention_forward"}), _multi_head),
)
