"""What a mask hides, where it is made of constants: which keys a query sees is computed as the graph would.

Masks are made from lengths and comparisons of positions as a rule, and know no data; padding comes in by a logical and. What is
joined with a mask by an and and is not known is taken for true everywhere, and for false everywhere: a key that is hidden both
times is hidden, so that a causal mask is known as one beside padding that is not. Sizes are those of the capture.
"""

from __future__ import annotations

import math
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
_LARGEST = 2**24  # elements of what is computed
_AND = frozenset({"and", "and_", "logical_and", "bitwise_and", "mul"})
_CONSTANTS = (
    "arange ones zeros full tensor scalar_tensor new_ones new_zeros new_full new_tensor ones_like zeros_like full_like"
)
_COMPARISONS = "ge gt le lt eq ne or or_ logical_or logical_not bitwise_not invert inv where masked_fill tril triu"
_NUMBERS = "bool int long add sub rsub div floordiv floor_divide neg abs clamp minimum maximum log pow exp cumsum"
_COPIES = "identity cast stack cat repeat flip"
_PLAIN = _AND.union(RULES, *map(str.split, (_CONSTANTS, _COMPARISONS, _NUMBERS, _COPIES)))


class Hides(NamedTuple):
    """What may hide keys: "added" to the logits, "filled" or "kept" where true, or "learned", of which nothing is known."""

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
            self.known[node] = self._computed(node)
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
        if op(node) not in _PLAIN or tensor(node) is None or math.prod(shape(node) or ()) > _LARGEST:
            return None
        return self._run(node)

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
        partly = any(entry[1] for entry in found.values() if entry is not None)

        def given(x: Any) -> Any:
            if isinstance(x, Node):
                entry = found[x]
                assert entry is not None
                return entry[0].clone() if isinstance(entry[0], torch.Tensor) and _in_place(node) else entry[0]
            return torch.device("cpu") if isinstance(x, torch.device) else x

        arguments = torch.fx.node.map_aggregate(args(node), given)
        options = {name: torch.device("cpu") if name == "device" else given(x) for name, x in node.kwargs.items()}
        call = getattr(arguments[0], str(node.target)) if node.op == "call_method" else None
        if call is not None:
            return call(*arguments[1:], **options), partly
        assert callable(node.target)
        return node.target(*arguments, **options), partly


def _in_place(node: Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return name.endswith("_") and not name.endswith("__")


def _constants(view: GraphView, assumed: bool) -> _Constants:
    kept: dict[bool, _Constants] = view.known.setdefault(_Constants, {})
    return kept.setdefault(assumed, _Constants(view, assumed))


def sight(view: GraphView, hides: Iterable[Hides], queries: int, keys: int) -> Sight | None:
    """What of ``keys`` is seen by ``queries`` under all of ``hides`` but what is learned; None if not known.

    Each has keys along its last axis and queries along the one before, or broadcasts.
    """
    visible = torch.ones(queries, keys, dtype=torch.bool)
    further = False
    for hide in (hide for hide in hides if hide.how != "learned"):
        seen = _seen(view, hide, queries, keys)
        if seen is None:
            return None
        somewhere, everywhere = seen
        further |= bool((somewhere != everywhere).any())
        visible = visible & somewhere
    causal = queries == keys and not bool(visible.triu(1).any())
    whole = torch.ones_like(visible).tril() if causal else torch.ones_like(visible)
    return Sight(causal, further or not torch.equal(visible, whole), further or not bool(visible.any(-1).all()))


def _seen(view: GraphView, hide: Hides, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which keys one mask leaves to a query in some sequence or head, and which in all of them."""
    found = []
    for assumed in (True, False):
        entry = _value(view, hide.node, assumed)
        if entry is None or not isinstance(entry[0], torch.Tensor):
            return None
        x, partly = entry
        added = hide.how == "added" and x.dtype != torch.bool
        seen = x > HIDDEN if added else ~x.bool() if hide.how == "filled" else x.bool()
        seen = seen.reshape(-1, *seen.shape[-2:]) if seen.ndim > 1 else seen.reshape(1, 1, -1)
        if seen.shape[-1] not in (1, keys) or seen.shape[-2] not in (1, queries):
            return None
        found.append(seen)
        if not partly:
            break
    return torch.stack([seen.any(0) for seen in found]).any(0), torch.stack([seen.all(0) for seen in found]).all(0)


def _value(view: GraphView, node: Any, assumed: bool) -> tuple[Any, bool] | None:
    try:
        with torch.no_grad():
            return _constants(view, assumed).of(node) if isinstance(node, Node) else None
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # an op of other arguments than it has
        return None
