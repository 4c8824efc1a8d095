"""All spellings of a projection as one rule: two operands, axes with letters, and a sum over the letters that the result lacks.

``linear`` is ``"...i,oi->...o"``, ``x @ W`` is ``"...k,kn->...n"``, a convolution is a product over channels and taps. Which
operand is the weight is for the caller to find out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.fx import Node

from foreshock.patterns.coordinates import Column, Columns, axes
from foreshock.patterns.ops import args, argument, op, shape

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


@dataclass(frozen=True)
class Contraction:
    """``result[letters] = sum left[...] * right[...]``. A letter is any hashable; axes of size 1 broadcast."""

    operands: tuple[Node, Node]
    letters: tuple[tuple[Any, ...], tuple[Any, ...]]
    result: tuple[Any, ...]

    def columns(self, operand: int, values: Mapping[Any, Column]) -> Columns:
        """Coordinates of an operand where each letter has the value given, 0 where none is."""
        sizes = shape(self.operands[operand]) or ()
        return tuple(_within(values, letter, n) for letter, n in zip(self.letters[operand], sizes, strict=True))

    def summed(self, operand: int) -> dict[Any, int]:
        """The letters of an operand over which the sum runs, with their sizes."""
        sizes = shape(self.operands[operand]) or ()
        return {at: n for at, n in zip(self.letters[operand], sizes, strict=True) if at not in self.result}


def _within(values: Mapping[Any, Column], letter: Any, size: int) -> Column:
    """A convolution's places may lie beyond those of its input; which is meant matters little."""
    column = 0 if size == 1 else values.get(letter, 0)
    return np.minimum(column, size - 1) if isinstance(letter, tuple) and letter[0] == "at" else column


def contraction(node: Node) -> Contraction | None:
    """``node`` as a contraction of two tensors, or None."""
    rule = _RULES.get(op(node))
    found: Contraction | None = rule(node) if rule is not None else None
    if found is None or len(found.result) != axes(node):
        return None
    if any(len(letters) != axes(x) for letters, x in zip(found.letters, found.operands, strict=True)):
        return None
    return found


def _of(left: Any, right: Any, letters: Sequence[Sequence[Any]], result: Sequence[Any]) -> Contraction | None:
    if not isinstance(left, Node) or not isinstance(right, Node) or shape(left) is None or shape(right) is None:
        return None
    return Contraction((left, right), (tuple(letters[0]), tuple(letters[1])), tuple(result))


def _linear(node: Node) -> Contraction | None:
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    lead = list(range(axes(x) - 1))
    out = ["o"] if axes(weight) == 2 else []
    return _of(x, weight, ([*lead, "i"], [*out, "i"]), [*lead, *out])


def _product(left: Any, right: Any) -> Contraction | None:
    a, b = axes(left), axes(right)
    batch = list(range(-max(a, b), -2))
    rows, columns = ["m"] if a > 1 else [], ["n"] if b > 1 else []
    letters = [*batch[max(b - a, 0) :], *rows, "k"], [*batch[max(a - b, 0) :], "k", *columns]
    return _of(left, right, letters, [*batch, *rows, *columns])


def _matmul(node: Node) -> Contraction | None:
    return _product(argument(node, 0, "input"), argument(node, 1, "other", argument(node, 1, "mat2")))


def _addmm(node: Node) -> Contraction | None:
    return _product(
        argument(node, 1, "mat1", argument(node, 1, "batch1")), argument(node, 2, "mat2", argument(node, 2, "batch2"))
    )


def _einsum(node: Node) -> Contraction | None:
    equation, operands = args(node)[0], args(node)[1:]
    if operands and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    left, _, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "->" not in equation:
        letters = "".join(terms).replace(".", "")
        result = "..." * ("..." in left) + "".join(
            sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        )
    if len(terms) != 2 or any(len(set(t.replace(".", ""))) != len(t.replace(".", "")) for t in terms):
        return None
    hidden = [axes(x) - len(term.replace("...", "")) for term, x in zip(terms, operands, strict=True)]
    spelled = [_spelled(term, count) for term, count in zip(terms, hidden, strict=True)]
    most = max((count for term, count in zip(terms, hidden, strict=True) if "..." in term), default=0)
    return _of(*operands, spelled, _spelled(result, most))


def _spelled(term: str, hidden: int) -> list[Any]:
    """The letters of a term, with numbers counted from the end for its ellipsis."""
    before, dots, after = term.partition("...")
    return [*before, *(range(-hidden, 0) if dots else ()), *after]


def _tensordot(node: Node) -> Contraction | None:
    left, right, dims = args(node)[0], argument(node, 1, "other", argument(node, 1, "b")), argument(node, 2, "dims", 2)
    a, b = axes(left), axes(right)
    if isinstance(dims, int):
        dims = (list(range(a - dims, a)), list(range(dims)))
    if not isinstance(dims, list | tuple) or len(dims) != 2:
        return None
    met = [
        [int(d) % n for d in (side if isinstance(side, list | tuple) else [side])]
        for side, n in zip(dims, (a, b), strict=True)
    ]
    letters = [[("sum", met[i].index(d)) if d in met[i] else (i, d) for d in range(n)] for i, n in enumerate((a, b))]
    return _of(left, right, letters, [at for at in itertools.chain(*letters) if at[0] != "sum"])


def _convolution(node: Node) -> Contraction | None:
    x, weight, groups = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 6, "groups", 1)
    if groups != 1 or axes(x) != axes(weight):
        return None
    places, taps = [("at", d) for d in range(axes(x) - 2)], [("tap", d) for d in range(axes(x) - 2)]
    return _of(x, weight, (["b", "i", *places], ["o", "i", *taps]), ["b", "o", *places])


def is_depthwise(node: Node) -> bool:
    """A convolution of each channel by itself."""
    x, weight = shape(argument(node, 0, "input")) or (), shape(argument(node, 1, "weight")) or ()
    return len(x) == len(weight) > 2 and weight[1] == 1 and argument(node, 6, "groups", 1) == weight[0] == x[1]


_RULES: Mapping[str, Any] = {
    "linear": _linear,
    "matmul": _matmul,
    "mv": _matmul,
    "addmm": _addmm,
    "addmv": _addmm,
    "baddbmm": _addmm,
    "einsum": _einsum,
    "tensordot": _tensordot,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
}
CONTRACTIONS = frozenset(_RULES)
