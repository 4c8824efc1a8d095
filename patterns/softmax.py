"""Softmaxes, as one op or by hand, and where their probabilities are multiplied with something and summed over."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.fx import Node

from foreshock.patterns.coordinates import RULES, Columns, axes, broadcast
from foreshock.patterns.graph import GraphView
from foreshock.patterns.logits import Place, constant, differentiates, mixed
from foreshock.patterns.ops import args, argument, op, shape
from foreshock.patterns.products import Product, product

ANCHORS = frozenset({"softmax", "div", "exp"})
_NEAR = 32  # steps that probabilities are followed
_COPIES = frozenset({"identity", "cast", "reshape"})


@dataclass(frozen=True)
class Softmax:
    """``weights = softmax(logits)`` along ``axis``. ``padded``: something is added to each row's sum. ``total``: the weights
    are not divided by it themselves, but what they are summed into is."""

    logits: Node
    weights: Node
    axis: int
    padded: bool = False
    total: Node | None = None


@dataclass(frozen=True)
class Use:
    """A product over keys. ``place`` maps an element of its operand ``side``, the probabilities as they enter, to one of the
    softmax. ``altered`` says what was done to the probabilities on the way (""), ``shared`` whether others read them too,
    ``joined`` whether the product takes them together with others. ``out`` is the output, None where it has no tensor."""

    product: Product
    side: int
    key: Any  # the letter of the keys
    place: Place
    dropout: Any = 0.0
    altered: str = ""
    emptied: bool = False
    shared: bool = False
    joined: bool = False
    out: Node | None = None


def softmax(node: Node) -> Softmax | None:
    """The softmax that ``node`` completes, or None."""
    name = op(node)
    if name == "softmax":
        logits, dim = argument(node, 0, "input"), argument(node, 1, "dim")
        found = logits, dim
    elif name == "exp":
        found = _by_logarithm(args(node)[0])
        if found[0] is None:
            return _divided_later(node)
    else:
        return _by_hand(node)
    logits, dim = found
    if not isinstance(logits, Node) or not isinstance(dim, int) or not axes(node):
        return None
    axis = dim % axes(node)
    return Softmax(_unshifted(logits, axis), node, axis)


def _by_logarithm(x: Any) -> tuple[Any, Any]:
    """``exp(log_softmax(x))`` and ``exp(x - logsumexp(x))``."""
    if isinstance(x, Node) and op(x) == "log_softmax":
        return argument(x, 0, "input"), argument(x, 1, "dim")
    if isinstance(x, Node) and op(x) == "sub" and isinstance(args(x)[1], Node) and op(args(x)[1]) == "logsumexp":
        total = args(x)[1]
        return (args(x)[0], _one(argument(total, 1, "dim"))) if args(total)[0] is args(x)[0] else (None, None)
    return None, None


def _by_hand(node: Node) -> Softmax | None:
    """``exp(x) / exp(x).sum(dim)``, whatever is subtracted first and added to the sum."""
    if len(args(node)) < 2:
        return None
    above, below = _copied(args(node)[0]), args(node)[1]
    if not isinstance(above, Node) or op(above) != "exp" or not isinstance(below, Node):
        return None
    total, padded = _sum_in(below)
    return None if total is None else _of_exp(above, total, node, padded)


def _divided_later(node: Node) -> Softmax | None:
    """``exp(x)``, of which the sum divides something else."""
    for user in (reader for copy in (node, *node.users) if _copied(copy) is node for reader in copy.users):
        if op(user) == "sum":
            found = _of_exp(node, user, node, False)
            if found is not None:
                return replace(found, total=user)
    return None


def _of_exp(above: Node, total: Node, weights: Node, padded: bool) -> Softmax | None:
    """The softmax whose numerator is ``above`` if ``total`` is its sum along one axis."""
    dim, logits = _one(argument(total, 1, "dim")), args(above)[0]
    if _copied(argument(total, 0, "input")) is not above or not isinstance(dim, int) or not isinstance(logits, Node):
        return None
    axis = dim % axes(above)
    return Softmax(_unshifted(logits, axis), weights, axis, padded)


def _sum_in(below: Node) -> tuple[Node | None, bool]:
    """The sum that a denominator is made of, and whether more than a guard against zero is added to it."""
    below, padded = _copied(below), False
    while op(below) in ("add", "clamp", "clamp_min", "maximum"):
        extra = [x for x in args(below) if isinstance(x, int | float)]
        padded |= op(below) == "add" and (not extra or max(map(abs, extra)) > 1e-3)
        inner = next((x for x in args(below) if isinstance(x, Node) and op(_copied(x)) in ("sum", "add")), None)
        if inner is None:
            return None, padded
        below = _copied(inner)
    return (below if op(below) == "sum" else None), padded


def _one(dims: Any) -> Any:
    return dims[0] if isinstance(dims, list | tuple) and len(dims) == 1 else dims


def _copied(x: Any) -> Any:
    while isinstance(x, Node) and (op(x) in _COPIES or _adds_axes(x)) and args(x):
        x = args(x)[0]
    return x


def _adds_axes(x: Node) -> bool:
    """``x[..., None]``."""
    return op(x) == "getitem" and math.prod(shape(x) or (0,)) == math.prod(shape(args(x)[0]) or (-1,))


def _unshifted(logits: Node, axis: int) -> Node:
    """Without the subtraction of each row's maximum, which changes no softmax."""
    while op(logits) == "sub" and isinstance(args(logits)[1], Node):
        source, taken = args(logits)[0], _copied(args(logits)[1])
        taken = args(taken)[0] if op(taken) == "getitem" else taken
        taken = args(taken)[0] if op(taken) == "attr.values" else taken
        inner = op(taken) in ("amax", "max") and _copied(args(taken)[0]) is _copied(source)
        if not isinstance(source, Node) or not inner or (shape(args(logits)[1]) or (0,))[axis] != 1:
            break
        logits = source
    return logits


def uses(view: GraphView, found: Softmax) -> Iterator[Use]:
    """The products that sum probabilities over keys, the nearest first."""
    start = Use(Product(found.weights, (), (), ()), 0, None, lambda c: c)
    waiting = deque([(found.weights, start)])
    seen = {found.weights}
    while waiting and len(seen) < _NEAR:
        node, way = waiting.popleft()
        readers = [user for user in node.users if shape(user) is not None or op(user) in ("split", "chunk", "unbind")]
        others = [user for user in node.users if user is not found.total]
        way = replace(way, shared=way.shared or sum(differentiates(user, node) for user in others) > 1)
        for user in readers:
            yield from _used(user, node, way, found)
            for result, further in _on(user, node, way, found):
                if result not in seen:
                    seen.add(result)
                    waiting.append((result, further))


def _used(user: Node, node: Node, way: Use, found: Softmax) -> Iterator[Use]:
    sums = [u for u in user.users if op(u) == "sum"] if op(user) == "mul" else [user]
    for end in sums:
        met = product(end)
        for side, edge in enumerate(met.edges if met is not None else ()):
            if met is None or edge.source is not node:
                continue
            frame = shape(node) or ()
            gone = [letter for letter in met.sizes(side) if letter not in met.result]
            keys = [
                letter for letter in gone if _runs_along(way.place, frame, met.letters[side].index(letter), found.axis)
            ]
            out = _output(met, way, found)
            if len(keys) == 1 and (out is not None or found.total is None):
                yield replace(way, product=met, side=side, key=keys[0], out=out)


def _output(met: Product, way: Use, found: Softmax) -> Node | None:
    """The output that a product over keys comes to: itself, or what it is once it is divided by the sum."""
    if len(met.edges) != 2 or way.joined:
        return None
    waiting = [met.node] if found.total is not None else []
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if shape(user) != shape(met.node):
                continue
            if op(user) in ("identity", "cast"):
                waiting.append(user)
            elif _divides(user, node, found):
                return user
    return met.node if found.total is None else None


def _divides(user: Node, node: Node, found: Softmax) -> bool:
    """Whether ``user`` is ``node`` over the sum of ``found``, or times its inverse."""
    if op(user) not in ("div", "mul") or len(args(user)) < 2:
        return False
    other = args(user)[1] if args(user)[0] is node else args(user)[0]
    other = _copied(other)
    if op(user) == "mul" and isinstance(other, Node):
        inverse = args(other)[1] if op(other) == "div" and constant(args(other)[0]) == 1.0 else None
        other = args(other)[0] if op(other) == "reciprocal" else inverse
    elif args(user)[0] is not node:
        return False
    return isinstance(other, Node) and _sum_in(other) == (found.total, False)


def _runs_along(place: Place, frame: tuple[int, ...], axis: int, softmax_axis: int) -> bool:
    moved = place(tuple(np.arange(size) if a == axis else 0 for a, size in enumerate(frame)))
    return moved is not None and np.ndim(moved[softmax_axis]) > 0


def _on(user: Node, node: Node, way: Use, found: Softmax) -> Iterator[tuple[Node, Use]]:
    """One step further with the probabilities."""
    name, before = op(user), way.place

    def through(rule: Place, **changed: Any) -> Use:
        def place(c: Columns) -> Columns | None:
            moved = rule(c)
            return None if moved is None else before(moved)

        return replace(way, place=place, **changed)

    def same(c: Columns) -> Columns:
        return broadcast(c, shape(node) or ())

    if name in ("identity", "cast"):
        yield user, through(same)
    elif name in RULES and args(user) and args(user)[0] is node:
        yield user, through(lambda c: RULES[name](user, c))
    elif name == "dropout":
        rate = argument(user, 1, "p", 0.5) if argument(user, 2, "training", True) is not False else 0.0
        yield user, through(same, dropout=rate if way.dropout == 0.0 else way.dropout)
    elif name == "nan_to_num":
        yield user, through(same, emptied=True)
    elif name in ("add", "sub"):
        several = "the product takes several softmaxes at once: no output of one alone"
        yield user, through(same, altered=several, joined=True)
    elif name in ("masked_fill", "where"):
        yield user, through(same, altered="probabilities are masked after the softmax: rows do not sum to one")
    elif name == "mul" or (name == "div" and args(user)[0] is node and constant(args(user)[1]) is not None):
        other = next((x for x in args(user)[:2] if x is not node), None)
        if constant(other) == 1.0:
            yield user, through(same)
        else:
            yield user, through(same, altered="probabilities are multiplied after the softmax: rows do not sum to one")
    else:
        sizes = shape(user) or ()
        for axis in range(len(sizes)):
            mixing = mixed(user, tuple(np.arange(size) if a == axis else 0 for a, size in enumerate(sizes)))
            if mixing is not None and mixing[0] is node:
                along = through(mixing[1], altered="heads are mixed after the softmax: rows do not sum to one")
                if _runs_along(along.place, sizes, axis, found.axis):
                    yield user, along
                    return
