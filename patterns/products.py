"""A product over an axis, with the edges on which its operands enter: contractions, einsums of three, and multiply-then-sum."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from foreshock.patterns.contraction import contraction
from foreshock.patterns.coordinates import Columns, axes
from foreshock.patterns.ops import args, argument, op, shape
from foreshock.patterns.pattern import Edge

_ADDED = frozenset({"addmm", "baddbmm", "addmv"})  # what they add stands first


@dataclass(frozen=True)
class Product:
    """``node[result] = sum prod operands[letters]``. A letter is any hashable; axes of size 1 broadcast."""

    node: Node
    edges: tuple[Edge, ...]
    letters: tuple[tuple[Hashable, ...], ...]
    result: tuple[Hashable, ...]

    def sizes(self, operand: int) -> dict[Hashable, int]:
        """The letters along which an operand extends: not those that it is only broadcast to."""
        own = dict(zip(self.letters[operand], shape(self.edges[operand].source) or (), strict=True))
        return {letter: n for letter, n in own.items() if n > 1 or self._widest(letter) == 1}

    def _widest(self, letter: Hashable) -> int:
        return max(
            n
            for edge, letters in zip(self.edges, self.letters, strict=True)
            for other, n in zip(letters, shape(edge.source) or (), strict=True)
            if other == letter
        )

    def place(self, operand: int, values: Mapping[Hashable, Any]) -> Columns:
        """Coordinates in an operand where letters have ``values``: 0 where none is given."""
        own = self.sizes(operand)
        return tuple(values.get(letter, 0) if own.get(letter, 1) > 1 else 0 for letter in self.letters[operand])

    def channels(self, operand: int, outer: frozenset[Hashable] | set[Hashable]) -> tuple[int, ...]:
        """The axes of an operand that extend along letters not in ``outer``."""
        own = self.sizes(operand)
        return tuple(a for a, letter in enumerate(self.letters[operand]) if letter in own and letter not in outer)


def product(node: Node) -> Product | None:
    """``node`` as a product, or None."""
    if op(node) == "sum":
        return _summed(node)
    if op(node) == "einsum":
        return _einsum(node)
    met = contraction(node)
    edges = None if met is None else _edges(node, met.operands)
    return None if met is None or edges is None else Product(node, edges, met.letters, met.result)


def _edges(node: Node, operands: tuple[Node, ...]) -> tuple[Edge, ...] | None:
    places: list[tuple[int | str, Any]] = [*enumerate(args(node)), *node.kwargs.items()]
    if op(node) in _ADDED:
        places = [place for place in places if place[0] not in (0, "input")]
    found: list[Edge] = []
    for operand in operands:
        where = next((w for w, x in places if x is operand and w not in [edge.where for edge in found]), None)
        if where is None:
            return None
        found.append(Edge(node, where))
    return tuple(found)


def _einsum(node: Node) -> Product | None:
    """Two operands, or three without an ellipsis."""
    equation, operands = args(node)[0], args(node)[1:]
    if not isinstance(equation, str) or any(shape(x) is None for x in operands) or len(operands) not in (2, 3):
        return None
    edges = tuple(Edge(node, place + 1) for place in range(len(operands)))
    met = contraction(node)
    if met is not None:
        return Product(node, edges, met.letters, met.result)
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or [len(term) for term in terms] != [axes(x) for x in operands]:
        return None
    return Product(node, edges, tuple(map(tuple, terms)), tuple(result))


def _summed(node: Node) -> Product | None:
    """``(a * b).sum(dim)``."""
    source = argument(node, 0, "input")
    return reduced(node, source, argument(node, 1, "dim")) if isinstance(source, Node) and op(source) == "mul" else None


def reduced(node: Node, source: Node, dims: Any) -> Product | None:
    """``node``, which sums over ``dims`` what ``source`` makes of two tensors element by element."""
    if dims is None or argument(node, 2, "keepdim", False):
        return None
    operands = tuple(x for x in args(source)[:2] if shape(x) is not None)
    edges = _edges(source, operands) if len(operands) == 2 else None
    if edges is None:
        return None
    count = max(map(axes, operands))
    gone = {int(dim) % count for dim in (dims if isinstance(dims, list | tuple) else [dims])}
    letters = tuple(tuple(range(count - axes(x), count)) for x in operands)
    return Product(node, edges, letters, tuple(letter for letter in range(count) if letter not in gone))
