"""What a mask hides, where it is made of constants: which keys a query sees is computed as the graph would.

Masks are made from lengths and comparisons of positions as a rule, and know no data; padding comes in by a logical and. What is
joined with a mask by an and and is not known is taken for true everywhere, and for false everywhere: a key that is hidden both
times is hidden, so that a causal mask is known as one beside padding that is not. What carries a gradient is a bias, and hides
nothing. Sizes are those of the capture.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from foreshock.patterns.coordinates import RULES
from foreshock.patterns.crossing import outside
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import args, hint, op, shape, tensor, value

HIDDEN = -1e3  # a logit below is as good as no key
_LARGEST = 2**26  # elements of what is computed: of one mask for 8192 positions
_AND = frozenset({"and", "and_", "logical_and", "bitwise_and", "mul"})
_CONSTANTS = (
    "arange ones zeros full tensor scalar_tensor new_ones new_zeros new_full new_tensor ones_like zeros_like full_like"
)
_COMPARISONS = "ge gt le lt eq ne or or_ logical_or logical_not bitwise_not invert inv where masked_fill tril triu"
_NUMBERS = "bool int long add sub rsub div floordiv floor_divide neg abs clamp minimum maximum log pow exp cumsum"
_COPIES = "identity cast stack cat repeat flip"
_PLAIN = _AND.union(RULES, *map(str.split, (_CONSTANTS, _COMPARISONS, _NUMBERS, _COPIES)))
_POINTWISE = _AND.union(_COMPARISONS.split(), _NUMBERS.split(), {"cast"}) - {"tril", "triu", "cumsum"}


class Hides(NamedTuple):
    """What may hide keys: "added" to the logits, or "filled" or "kept" where true."""

    how: str
    node: Any


@dataclass(frozen=True)
class Sight:
    """Which keys queries see. ``causal``: none that comes later; ``further``: other keys are, or may be, hidden; ``empty``: a query
    may see none."""

    causal: bool
    further: bool
    empty: bool


@dataclass(eq=False)
class _Constants:
    """What can be computed of one graph without its inputs: the value, and whether something was ``assumed`` for it."""

    view: GraphView
    assumed: bool
    known: dict[Node, tuple[Any, bool] | None] = field(default_factory=dict)

    def of(self, node: Node) -> tuple[Any, bool] | None:
        if node not in self.known:
            self.known[node] = None  # while under way
            found, fake = self._computed(node), tensor(node)
            if found is None and fake is not None and fake.requires_grad:
                found = torch.zeros(()).expand(shape(node) or ()), False
            self.known[node] = found
        return self.known[node]

    def _computed(self, node: Node) -> tuple[Any, bool] | None:
        if isinstance(value(node), int | float | torch.SymInt):
            return hint(value(node)) if isinstance(value(node), torch.SymInt) else value(node), False
        if node.op == "placeholder":
            where, outer = outside(self.view, node)
            if isinstance(outer, Node) and where is not self.view:
                return _constants(where, self.assumed).of(outer)
            held = self.view.constants.get(outer) if isinstance(outer, Node) else None
            return None if held is None or held.numel() > _LARGEST else (held.detach().cpu(), False)
        return self._run(node) if op(node) in _PLAIN and tensor(node) is not None else None

    def _run(self, node: Node) -> tuple[Any, bool] | None:
        found: dict[Node, tuple[Any, bool] | None] = {}
        for source in node.all_input_nodes:
            found[source] = None if self.view.written(source, node) else self.of(source)
        missing = [source for source, entry in found.items() if entry is None]
        if missing:
            kept = [entry for entry in found.values() if entry is not None]
            is_mask = op(node) in _AND and getattr(tensor(node), "dtype", None) is torch.bool
            if not is_mask or len(kept) != 1 or not isinstance(kept[0][0], torch.Tensor):
                return None
            return (kept[0][0] & self.assumed).expand(shape(node) or ()), True
        values = {source: entry[0] for source, entry in found.items() if entry is not None}
        partly = any(entry[1] for entry in found.values() if entry is not None)
        if op(node) in _POINTWISE:
            values = {source: _once(x) if isinstance(x, torch.Tensor) else x for source, x in values.items()}
            sizes = torch.broadcast_shapes(*(x.shape for x in values.values() if isinstance(x, torch.Tensor)))
        else:
            sizes = torch.Size() if op(node) in RULES else torch.Size(shape(node) or ())
        if sizes.numel() > _LARGEST:
            return None

        def given(x: Any) -> Any:
            if isinstance(x, Node):
                return values[x].clone() if isinstance(values[x], torch.Tensor) and _in_place(node) else values[x]
            return torch.device("cpu") if isinstance(x, torch.device) else x

        arguments = torch.fx.node.map_aggregate(args(node), given)
        options = {name: torch.device("cpu") if name == "device" else given(x) for name, x in node.kwargs.items()}
        call = getattr(arguments[0], str(node.target)) if node.op == "call_method" else None
        if call is not None:
            result = call(*arguments[1:], **options)
        else:
            assert callable(node.target)
            result = node.target(*arguments, **options)
        return result.expand(shape(node) or ()) if op(node) in _POINTWISE else result, partly


def _once(x: torch.Tensor) -> torch.Tensor:
    """``x`` without its repetitions: of size 1 along every axis that it is only expanded to."""
    return x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())]


def _in_place(node: Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return name.endswith("_") and not name.endswith("__")


def _constants(view: GraphView, assumed: bool) -> _Constants:
    kept: dict[bool, _Constants] = view.known.setdefault(_Constants, {})
    return kept.setdefault(assumed, _Constants(view, assumed))


def sight(view: GraphView, hides: Iterable[Hides], queries: int, keys: int) -> Sight | None:
    """What of ``keys`` is seen by ``queries`` under all of ``hides``; None if not known.

    Each has keys along its last axis and queries along the one before, or broadcasts.
    """
    if queries * keys > _LARGEST:
        return None
    known: dict[Any, Sight | None] = view.known.setdefault(Sight, {})
    values = [_values(view, hide) for hide in hides]
    if any(not of for of in values):
        return None
    key = (queries, keys, *((how, x.data_ptr(), x.shape, x.stride()) for of in values for how, x in of))
    if key not in known:
        known[key] = _sight(values, queries, keys)
    return known[key]


def _sight(values: list[list[tuple[str, torch.Tensor]]], queries: int, keys: int) -> Sight | None:
    visible = torch.ones(queries, keys, dtype=torch.bool)
    partial = False  # whether sequences or heads may see less
    for of in values:
        found = [_seen(how, x) for how, x in of]
        if any(x.shape[-1] not in (1, keys) or x.shape[-2] not in (1, queries) for x in found):
            return None
        first, *others = (batch for x in found for batch in x)
        partial |= not all(torch.equal(batch, first) for batch in others)
        visible &= functools.reduce(torch.logical_or, others, first)
    causal = queries == keys and int(visible.triu(1).count_nonzero()) == 0
    whole = queries * (queries + 1) // 2 if causal else queries * keys
    further = partial or int(visible.count_nonzero()) < whole
    return Sight(causal, further, partial or not bool(visible.any(-1).all()))


def _seen(how: str, x: torch.Tensor) -> torch.Tensor:
    """Which keys one mask leaves to queries, ``[batches and heads, queries, keys]``."""
    added = how == "added" and x.dtype != torch.bool
    seen = x > HIDDEN if added else ~x.bool() if how == "filled" else x.bool()
    return seen.reshape(-1, *seen.shape[-2:]) if seen.ndim > 1 else seen.reshape(1, 1, -1)


def _values(view: GraphView, hide: Hides) -> list[tuple[str, torch.Tensor]]:
    """The mask, and what it is if what was assumed is not so; nothing if it is not known."""
    found = []
    for assumed in (True, False):
        try:
            with torch.no_grad():
                entry = _constants(view, assumed).of(hide.node) if isinstance(hide.node, Node) else None
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
        ):  # an op of other arguments than it has
            entry = None
        if entry is None or not isinstance(entry[0], torch.Tensor):
            return []
        found.append((hide.how, _once(entry[0])))
        if not entry[1]:
            break
    return found
