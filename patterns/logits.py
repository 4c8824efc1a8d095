"""From what enters a softmax back to the product of queries and keys, and what is done to the logits on the way.

Every step back is a map on coordinates, so that an axis of the softmax is known as an axis of the product whatever views stand
between. The walk takes elementwise steps only and sees a bounded number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.fx import Node

from foreshock.patterns.boundary import NO_BIAS_PAIR
from foreshock.patterns.coordinates import RULES, Columns, axes, broadcast
from foreshock.patterns.graph import GraphView
from foreshock.patterns.masks import HIDDEN, Hides
from foreshock.patterns.ops import args, argument, op, shape, tensor, value
from foreshock.patterns.products import Product, product

Place = Callable[[Columns], Columns | None]

_NEAR = 64  # nodes seen on the way back at most
_IDLE = frozenset({"identity", "cast", "nan_to_num"})
_BENT = frozenset(
    {"tanh", "sigmoid", "relu", "softplus", "dropout", "tril", "triu", "clamp", "clip", "clamp_min", "clamp_max"}
)
_SUMS = frozenset({"add", "sub"})
_SCALED = frozenset({"mul", "div"})
_MEASURES = frozenset({"max", "amax", "logsumexp"})  # of a row, for a softmax by hand
_HANDED = frozenset({"identity", "cast", "reshape", "getitem", "attr.values"})
_PARTED = frozenset({"split", "chunk", "unbind", "tensor_split"})
_LIMITS = frozenset({"maximum", "minimum", "max", "min"})


@dataclass(frozen=True)
class Logits:
    """How the logits are made from ``product``: ``place`` maps an element of the softmax's input to one of the product.

    ``scale`` multiplies q.k (None: not known); ``hides`` is what hides keys on the way; ``broken`` are laws that a step breaks,
    with the reason.
    """

    product: Product
    place: Place
    scale: float | None = 1.0
    softcap: float | None = None
    masked: bool = False
    biased: bool = False
    sinks: bool = False
    hides: tuple[Hides, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether they are ``scale * q.k`` and nothing else."""
        return not (self.masked or self.biased or self.sinks or self.broken)


@dataclass(frozen=True)
class _Way:
    """The steps so far, outermost first; ``keys`` are the coordinates of one row's keys here."""

    keys: Columns
    place: Place = lambda c: c
    scale: float | None = 1.0
    softcap: float | None = None
    masked: bool = False
    biased: bool = False
    sinks: bool = False
    hides: tuple[Hides, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()

    def through(self, rule: Place) -> _Way | None:
        """One step further back."""
        keys, before = rule(self.keys), self.place
        if keys is None or all(np.ndim(column) == 0 for column in keys):
            return None

        def place(c: Columns) -> Columns | None:
            moved = before(c)
            return None if moved is None else rule(moved)

        return replace(self, keys=keys, place=place)

    def breaking(self, reason: str) -> _Way:
        return replace(self, broken=(*self.broken, *((law, reason) for law in NO_BIAS_PAIR)))


def products_before(view: GraphView, logits: Node, keys: Columns, reader: Node) -> Iterator[Logits]:
    """The products from which ``logits`` are made, one whose elements lie as they do first; ``keys`` are one row's keys there."""
    waiting = [(logits, reader, _Way(keys))]
    seen: set[Node] = set()
    while waiting and len(seen) < _NEAR:
        node, user, way = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        own = {user}
        for write in view.written(node, user):
            way = _written(write.node, way)
            own.add(write.node)
        others = [other for other in node.users if other not in own and not _measures(other, user)]
        if any(differentiates(other, node) for other in others):
            way = way.breaking("the logits are read elsewhere too: their gradient is not that of one softmax")
        found = product(node)
        if found is not None and _meets(found, way):
            beta = argument(node, 3, "beta", 1)
            if op(node) in ("baddbmm", "addmm"):
                alpha = constant(argument(node, 4, "alpha", 1))
                added = argument(node, 0, "input") if beta != 0 else None
                way = _scaled(way, alpha)
                way = _biased(way, added) if isinstance(added, Node) else way
            yield Logits(
                found,
                way.place,
                way.scale,
                way.softcap,
                way.masked,
                way.biased,
                way.sinks,
                way.hides,
                dict(reversed(way.broken)),
            )
        waiting += [(source, node, further) for source, further in _back(node, way) if source not in seen]


def _measures(reader: Node, user: Node) -> bool:
    """Whether ``reader`` takes a measure of each row for ``user`` alone, which subtracts it from the logits."""
    if op(reader) not in _MEASURES:
        return False
    waiting = [reader]
    while waiting:
        readers = [other for other in waiting.pop().users if other is not user]
        if any(op(other) not in _HANDED for other in readers):
            return False
        waiting += readers
    return True


def differentiates(reader: Node, node: Node) -> bool:
    """Whether a gradient may come back to ``node`` through ``reader``: not where it lends its shape or dtype only."""
    if reader.op == "output" or tensor(reader) is None:
        return reader.op == "output" or op(reader) in _PARTED
    lends = op(reader) in ("cast", "reshape", "expand") and args(reader) and args(reader)[0] is not node
    return bool(getattr(tensor(reader), "requires_grad", False)) and not lends


def _meets(found: Product, way: _Way) -> bool:
    """Whether keys run along an axis of the product's result."""
    return len(found.result) == len(way.keys)


def _back(node: Node, way: _Way) -> Iterator[tuple[Node, _Way]]:
    """The operands of a step that logits may come from."""
    name, first = op(node), argument(node, 0, "input")
    if name in _IDLE or name in RULES:
        rule = (lambda c: c) if name in _IDLE else (lambda c: RULES[name](node, c))
        further = way.through(rule) if isinstance(first, Node) and shape(first) is not None else None
        if further is not None:
            yield first, further
    elif name == "neg":
        yield first, _scaled(way, -1.0)
    elif name in _BENT:
        yield first, _bent(node, name, way)
    elif name == "masked_fill":
        yield first, _filled(argument(node, 2, "value"), way, Hides("filled", argument(node, 1, "mask")))
    elif name == "where":
        for here, other, how in ((1, 2, "kept"), (2, 1, "filled")):
            hides = Hides(how, args(node)[0])
            yield from _operand(node, args(node)[here], _replaced(args(node)[other], way, hides))
    elif name in _SUMS or name in _SCALED or (name in _LIMITS and len(args(node)) == 2):
        for here, other in ((0, 1), (1, 0)):
            source, beside = args(node)[here], args(node)[other]
            if not (name == "div" and here == 1):
                yield from _operand(node, source, _beside(name, here, beside, way))
    elif name == "cat":
        yield from _parts(node, way)
    else:
        mixed = _mixed(node, way)
        if mixed is not None:
            yield mixed


def _operand(node: Node, source: Any, way: _Way) -> Iterator[tuple[Node, _Way]]:
    if isinstance(source, Node) and shape(source):
        further = way.through(lambda c: broadcast(c, shape(source) or ()))
        if further is not None:
            yield source, further


def _parts(node: Node, way: _Way) -> Iterator[tuple[Node, _Way]]:
    """The tensors joined along the keys: columns beside those of a part are sinks to it."""
    tensors = [x for x in argument(node, 0, "tensors") if shape(x) is not None]
    axis = argument(node, 1, "dim", 0) % axes(node)
    start = 0
    for source in tensors:
        size = (shape(source) or ())[axis]
        column = np.asarray(way.keys[axis])
        inside = (column >= start) & (column < start + size)
        moves = np.ndim(way.keys[axis]) > 0
        if moves and inside.all():

            def rule(c: Columns, start: int = start) -> Columns:
                return (*c[:axis], c[axis] - start, *c[axis + 1 :])

            further = way.through(rule)
            if further is not None:
                yield source, replace(further, sinks=True)
        start += size


def _mixed(node: Node, way: _Way) -> tuple[Node, _Way] | None:
    """Talking heads: a weight mixes the logits of a row's heads, key by key."""
    mixing = mixed(node, way.keys)
    if mixing is None:
        return None
    source, rule = mixing
    further = way.through(rule)
    if further is None:
        return None
    note = "heads are mixed between q.k and the softmax: no head's output tells the shift of its keys"
    return source, replace(further, scale=None, broken=(*further.broken, ("law/bias", note)))


def mixed(node: Node, keys: Columns) -> tuple[Node, Place] | None:
    """The tensor whose heads ``node`` mixes with a weight, and where its elements come from, a head being taken for the same
    head; None if it does something else. ``keys`` are the coordinates of one row's keys in ``node``."""
    found = product(node)
    if found is None or len(found.edges) != 2 or len(found.result) != len(keys):
        return None
    moving = {letter for letter, column in zip(found.result, keys, strict=True) if np.ndim(column)}
    for side in (0, 1):
        own, weight = found.sizes(side), found.sizes(1 - side)
        summed = [letter for letter, n in weight.items() if n > 1 and letter in own and letter not in found.result]
        heads = [letter for letter, n in weight.items() if n > 1 and letter not in own]
        held = found.edges[1 - side].source.op in ("placeholder", "get_attr")
        if held and moving <= set(own) and not moving & set(weight) and len(summed) == 1 and len(heads) == 1:
            (one,), (other,) = summed, heads

            def rule(c: Columns, side: int = side, one: Any = one, other: Any = other) -> Columns:
                values = dict(zip(found.result, c, strict=True))
                return found.place(side, {**values, one: values[other]})

            return found.edges[side].source, rule
    return None


# -- what a step does to the logits --------------------------------------------------------------------------------------


def constant(x: Any) -> float | None:
    """A number, also where it is written as a tensor: ``torch.full([], 8.0)``, ``torch.tensor(64).sqrt()``."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return float(x)
    if not isinstance(x, Node):
        return None
    found = value(x)
    if isinstance(found, int | float):
        return float(found)
    name = op(x)
    if shape(x) not in ((), (1,)):
        return None
    if name in ("full", "tensor", "scalar_tensor"):
        return constant(args(x)[1 if name == "full" else 0])
    operands = [constant(operand) for operand in args(x)[:2] if isinstance(operand, int | float | Node)]
    if name in ("cast", "identity"):
        return operands[0] if operands else None
    if None in operands or not operands:
        return None
    numbers = [operand for operand in operands if operand is not None]
    try:
        return _FOLDED[name](*numbers) if name in _FOLDED else None
    except (ArithmeticError, TypeError, ValueError):
        return None


_FOLDED: dict[str, Callable[..., float]] = {
    "sqrt": lambda a: float(a**0.5),
    "rsqrt": lambda a: float(a**-0.5),
    "pow": lambda a, b: float(a**b),
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
}


def _scaled(way: _Way, by: float | None) -> _Way:
    return replace(way, scale=None if way.scale is None or by is None else way.scale * by)


def _extends(beside: Node, way: _Way) -> bool:
    """Whether what stands beside the logits differs from key to key."""
    at = broadcast(way.keys, shape(beside) or ()) if len(shape(beside) or ()) <= len(way.keys) else way.keys
    return any(np.ndim(column) for column in at)


def _beside(name: str, here: int, beside: Any, way: _Way) -> _Way:
    """The effect of the other operand of a sum, a product or a limit."""
    number = constant(beside)
    if name in _SCALED:
        if number is not None and number != 0:
            return _scaled(way, number if name == "mul" else 1 / number)
        way = replace(way, scale=None)
        if isinstance(beside, Node) and _extends(beside, way):
            return way.breaking(f"the logits are multiplied by `{beside.name}`, which differs from key to key")
        return way
    if name in _SUMS:
        way = _scaled(way, -1.0) if name == "sub" and here == 1 else way
        return _biased(way, beside) if isinstance(beside, Node) else way
    if name in ("maximum", "max") and number is not None and number <= HIDDEN:
        return way
    return way.breaking("the logits are cut off: a shift of all keys moves each logit differently")


def _biased(way: _Way, added: Node) -> _Way:
    """Something is added: a bias if it is learned, else it may hide keys."""
    if not _extends(added, way):
        return way
    learned = getattr(tensor(added), "requires_grad", False)
    return replace(way, biased=True, masked=way.masked or not learned, hides=(*way.hides, Hides("added", added)))


def _filled(number: Any, way: _Way, hides: Hides) -> _Way:
    fill, way = constant(number), replace(way, masked=True, hides=(*way.hides, hides))
    if fill is not None and fill > HIDDEN:
        return way.breaking("masked keys keep a share of each row: their logits do not move with the keys")
    return way


def _replaced(other: Any, way: _Way, hides: Hides) -> _Way:
    if getattr(tensor(other), "requires_grad", False):
        return way.breaking(f"the logits are those of q.k for some keys and `{other.name}` for others")
    return _filled(other, way, hides)


def _bent(node: Node, name: str, way: _Way) -> _Way:
    if name == "tanh":
        way = replace(way, softcap=None if way.scale is None else abs(way.scale))
        return way.breaking("the logits are capped: a shift of all keys moves each logit differently")
    if name in ("clamp", "clamp_min", "clip"):
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        if high is None and (constant(low) or 0.0) <= HIDDEN:
            return way
    if name == "dropout":
        idle = argument(node, 1, "p", 0.5) == 0.0 or argument(node, 2, "training", True) is False
        return way if idle else way.breaking("dropout on the logits: a shift of all keys moves each logit differently")
    return way.breaking(f"`{name}` on the logits: a shift of all keys moves each logit differently")


def _written(node: Node, way: _Way) -> _Way:
    """A write in place into the logits."""
    name = op(node)
    if name == "setitem":
        return _filled(args(node)[2], way, Hides("filled", None))
    if name == "masked_fill":
        return _filled(argument(node, 2, "value"), way, Hides("filled", argument(node, 1, "mask")))
    if name in _SUMS or name in _SCALED:
        return _beside(name, 0, args(node)[1], way)
    return way.breaking(f"`{name}` writes into the logits")
