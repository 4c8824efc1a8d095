"""Follow single elements of a tensor back through the graph to where they came from.

Given coordinates of a node's elements, `Pull` says which node and which of its elements they are copies (or elementwise functions)
of. Views, splits, concatenations, broadcasts and rotary embeddings are each a small map on coordinates (see
`foreshock.patterns.coordinates`), so that fused, interleaved and transposed projections need no case of their own. What was
written in place on the way is followed instead of what stood there before, and the bodies of calls are gone through as if they
stood in line.

A trail ends at a projection (a contraction with a weight, see `foreshock.patterns.contraction`) or at a parameter. It dies at
reductions, constants, buffers and trigonometry: the cosines of a rotary embedding are no trail. It dies in the residual stream
too: where one summand is made from the other, no single projection made the sum. Of several operands that lead somewhere, the
first wins that no nonlinear function stands before.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.fx import Node

from foreshock.patterns.contraction import CONTRACTIONS, is_depthwise
from foreshock.patterns.coordinates import (
    RULES,
    Columns,
    anywhere,
    axes,
    broadcast,
    corner,
    flat,
    grid_of,
    padded,
    piece,
    taken,
)
from foreshock.patterns.crossing import Step, caller, cut, inside, makes, outside
from foreshock.patterns.exchanges import RULES as EXCHANGES
from foreshock.patterns.exchanges import sender
from foreshock.patterns.graph import GraphView
from foreshock.patterns.known import FIXED, Known
from foreshock.patterns.ops import args, argument, op, shape
from foreshock.patterns.sharded import RULES as SHARDED
from foreshock.patterns.trail import Found, Gain, Trail, along, each, noted, scaled, united
from foreshock.patterns.writes import Write, through_memory

# Elementwise functions of the first operand: those that are linear up to the size of a row, and others.
_LINEAR = frozenset(
    {"identity", "cast", "neg", "dropout", "normalize", "view_as_complex", "view_as_real", "masked_fill"}
)
_LINEAR |= frozenset({"nan_to_num", "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"})
_BENT = frozenset(
    {"tanh", "clamp", "clip", "softmax", "log_softmax", "sigmoid", "softplus", "sqrt", "relu", "exp", "log"}
)
_BINARY = frozenset({"add", "sub", "mul", "div", "where", "maximum", "minimum"})
_JOINING = _BINARY | {"cat", "stack", "pad"}
_NORMS = {  # where the gain stands, and the axis it runs along (None: the last ones)
    "rms_norm": (2, None),
    "layer_norm": (2, None),
    "group_norm": (2, 1),
    "batch_norm": (3, 1),
    "instance_norm": (3, 1),
}
_CONVOLUTIONS = FIXED - {"linear"}
_DEEPEST = 100  # sums and joins within each other on one trail: a longer one is a residual stream's


class Pull(Known):
    """Walks back in one graph and in all that it calls or is called by.

    ``straight`` walks keep to what is linear up to the size of a row: no sums or products of several activations, no
    nonlinear function but norms. ``stops`` tells why trails died.
    """

    def __init__(self, view: GraphView, *, straight: bool = False) -> None:
        super().__init__(view)
        self.straight = straight
        self.stops: list[str] = []
        self._depth = 0

    def __call__(self, node: Any, c: Columns, reader: Node | None = None) -> Trail | None:
        """The one trail of all elements at ``c`` of ``node``, as ``reader`` sees them, or None."""
        found = self.pieces(node, c, reader)
        if isinstance(found, list) and found[0].where is None:
            return found[0]
        self.stops.append(
            found if isinstance(found, str) else f"{node.name}: its parts come from different projections"
        )
        return None

    def pieces(self, node: Any, c: Columns, reader: Node | None = None) -> Found:
        """The trails of the elements at ``c``: one for all, or several for parts of them, or why there is none."""
        if not isinstance(node, Node) or shape(node) is None:
            return f"{node} is no tensor of the graph"
        return self._read(self.view, node, reader, c, grid_of(c))

    def last(self, view: GraphView, node: Node, reader: Node) -> Found:
        """Where the last element of ``node`` comes from."""
        return Pull(view)._read(view, node, reader, corner(node), ())

    # -- the walk --------------------------------------------------------------------------------------------------------

    def _read(self, view: GraphView, node: Node, reader: Node | None, c: Columns, grid: tuple[int, ...]) -> Found:
        """The elements at ``c`` of ``node`` as they are when ``reader`` reads them (None: as ``node`` made them)."""
        path: list[Node] = []
        while True:
            writes = view.written(node, reader) if reader is not None else []
            if writes:
                return along(self._overlaid(view, node, c, grid, writes), path)
            if node.op == "placeholder":
                where, outer = outside(view, node)
                if outer in self.root.parameters:
                    return along([Trail(outer, c, self.root)], path)
                if where is view or not isinstance(outer, Node):
                    return cut(node)
                view, node, reader = where, outer, caller(view, where)
                continue
            if (view, node) in self.memory.dead:
                return self.memory.dead[view, node]
            if self.projection(view, node) is not None:
                return along([Trail(node, c, view)], path)
            path.append(node)
            step = self._step(view, node, c, grid)
            if not isinstance(step, tuple):
                return along(step, path)
            view, node, reader, c = step

    def _step(self, view: GraphView, node: Node, c: Columns, grid: tuple[int, ...]) -> Step | Found:
        """The one operand that these elements come from, or the trails through several, or why there is none."""
        name = op(node)
        if name in _JOINING:
            return self._joined(view, node, name, c, grid)
        first = argument(node, 0, "input")
        moved: Columns | None = None
        if name == "copy":
            first = args(node)[1]
            moved = None if shape(first) is None else broadcast(c, shape(first) or ())
        elif name == "getitem" and isinstance(first, Node) and shape(first) is None:
            if first in view.children:
                return inside(view.children[first], first, args(node)[1], c)
            first, source = argument(first, 0, "input"), first
            moved = piece(source, args(node)[1], c) if isinstance(args(node)[1], int) else None
        elif name in _LINEAR or name in _NORMS or name == "_weight_norm" or (name in _BENT and not self.straight):
            moved = c
        elif (
            name in ("scatter", "index_fill")
            and not isinstance(argument(node, 3, "value"), Node)
            and "src" not in node.kwargs
        ):
            moved = c  # a number is stored in places
        elif (rule := RULES.get(name) or SHARDED.get(name) or EXCHANGES.get(name)) is not None:
            moved = rule(node, c)
        elif name in _CONVOLUTIONS and is_depthwise(node):
            moved = tuple(np.minimum(column, size - 1) for column, size in zip(c, shape(first) or (), strict=True))
        if moved is None and isinstance(first, Node) and shape(first) is not None:
            guesses = anywhere(node, c)
            if guesses is not None and self._depth < _DEEPEST // 4:
                return self._agreed(view, node, first, guesses, grid)
            if all(write.node is not node for write in view.writes.get(Write.storage_of(node) or 0, ())):
                moved = through_memory(node, first, c)
        if moved is None or not isinstance(first, Node) or shape(first) is None:
            reason = f"{node.name}: {_why(name)}"
            if not self.straight:
                self.memory.dead[view, node] = reason
            return reason
        if name in _BENT:
            return each(self._read(view, first, node, moved, grid), lambda trail: replace(trail, bent=True))
        if name in _NORMS or name == "_weight_norm":
            return self._normed(view, node, name, c, grid)
        rank = sender(node, c)
        if rank is not None:
            return each(self._read(view, first, node, moved, grid), lambda trail: replace(trail, rank=rank))
        return view, first, node, moved

    def _agreed(
        self, view: GraphView, node: Node, source: Node, guesses: tuple[Columns, Columns], grid: tuple[int, ...]
    ) -> Found:
        """What is found wherever indices that are not known may point."""
        self._depth += _DEEPEST // 8
        one, other = (self._read(view, source, node, c, grid) for c in guesses)
        self._depth -= _DEEPEST // 8
        if isinstance(one, str) or self.alike(one, other):
            return one
        return f"{node.name}: chooses channels by a tensor"

    def _overlaid(self, view: GraphView, node: Node, c: Columns, grid: tuple[int, ...], writes: list[Write]) -> Found:
        """Elements of memory that was written to since ``node`` was made: each from the last write that covers it."""
        left = np.arange(math.prod(grid))
        parts: list[tuple[Any, Found]] = []
        for write in writes:
            inside, place = write.locate(node, taken(c, grid, left))
            inside = np.broadcast_to(inside, len(left))
            if inside.any():
                rows = left[inside]
                parts.append(
                    (rows, self._stored(view, write, taken(place, (len(left),), np.flatnonzero(inside)), rows))
                )
                left = left[~inside]
        if len(left):
            parts.append((left, self._read(view, node, None, taken(c, grid, left), (len(left),))))
        return united(grid, parts)

    def _stored(self, view: GraphView, write: Write, c: Columns, rows: Any) -> Found:
        if not isinstance(write.source, Node) or (shape(write.source) is None and write.source is not write.node):
            return f"{write.node.name}: what is stored here is no copy of a tensor"
        if write.source is write.node:
            return self._read(view, write.node, None, c, (len(rows),))
        return self._read(view, write.source, write.node, broadcast(c, shape(write.source) or ()), (len(rows),))

    def _normed(self, view: GraphView, node: Node, name: str, c: Columns, grid: tuple[int, ...]) -> Found:
        found = self._read(view, argument(node, 0, "input"), node, c, grid)
        if name == "_weight_norm":
            size = args(node)[1]
            found = each(found, lambda trail: replace(trail, unit=True))
            return self._scaled(view, node, found, size, broadcast(c, shape(size) or ()), grid)
        place, axis = _NORMS[name]
        gain = argument(node, place, "weight")
        at = (c[axis],) if axis is not None else c[len(c) - len(shape(gain) or ()) :]
        return self._scaled(view, node, found, gain, at, grid) if isinstance(gain, Node) else found

    def _scaled(
        self, view: GraphView, node: Node, found: Found, gain: Node, at: Columns, grid: tuple[int, ...]
    ) -> Found:
        """``found`` multiplied by ``gain``, whose elements ``at`` belong to the elements followed, if that is a parameter."""
        if isinstance(found, str) or not self.is_weight(view, gain, node):
            return found
        trail = self._read(view, gain, node, at, grid)
        if isinstance(trail, str) or trail[0].where is not None or trail[0].node not in self.root.parameters:
            return found
        (one,) = trail
        index = np.asarray(flat(one.coordinates, shape(one.node) or ()))
        found = each(found, lambda t: replace(t, factor=t.factor * one.factor))
        return scaled(found, Gain(one.node, index, one.offset / (one.factor or 1.0)), grid)

    # -- several operands ------------------------------------------------------------------------------------------------

    def _joined(self, view: GraphView, node: Node, name: str, c: Columns, grid: tuple[int, ...]) -> Step | Found:
        if self._depth > _DEEPEST:
            return f"{node.name}: a long residual stream, and no single projection"
        self._depth += 1
        try:
            if name not in _BINARY:
                return self._concatenated(view, node, name, c, grid)
            operands = args(node)[1:3] if name == "where" else args(node)[:2]
            sizes = [(x, shape(x)) for x in operands if isinstance(x, Node)]
            pairs = [(x, broadcast(c, own)) for x, own in sizes if own is not None]
            activations = [pair for pair in pairs if self.varies(view, pair[0])]
            if not activations:
                return self._of_weights(view, node, name, operands, pairs, grid)
            found = self._of_activations(view, node, name, activations, grid)
            for x, at in pairs if name == "mul" else ():
                if not self.varies(view, x):
                    found = self._scaled(view, node, found, x, at, grid)
            return found
        finally:
            self._depth -= 1

    def _of_activations(
        self, view: GraphView, node: Node, name: str, pairs: list[tuple[Node, Columns]], grid: tuple[int, ...]
    ) -> Found:
        if self.straight:
            wide = [pair for pair in pairs if (shape(pair[0]) or (1,))[-1] > 1] if len(pairs) > 1 else pairs
            if len(wide) != 1 or (name in _BINARY and name not in ("add", "sub", "mul", "div")):
                return f"{node.name}: several activations meet"
            return self._read(view, wide[0][0], node, wide[0][1], grid)
        found: Found = ""
        for x, at in pairs:
            this = self._read(view, x, node, at, grid)
            if isinstance(this, str):
                found = found or this
                continue
            found, others = this, [pair for pair in pairs if pair[0] is not x]
            for other, there in others:
                found = self._beside(view, node, name, (x, found), (other, there), grid)
            break
        return found

    def _beside(
        self,
        view: GraphView,
        node: Node,
        name: str,
        main: tuple[Node, Found],
        second: tuple[Node, Columns],
        grid: tuple[int, ...],
    ) -> Found:
        """What is found where ``main``, which leads somewhere, meets a second activation."""
        x, found = main
        other, there = second
        lead = self.lead(view, other, node)
        if isinstance(found, str) or (isinstance(lead, Trail) and any(lead.node is trail.node for trail in found)):
            return found
        adds = name in ("add", "sub")
        alike = shape(x) == shape(other)  # a bias that later layers share is no stream
        if adds and alike and (makes(view, other, found[0]) or (isinstance(lead, Trail) and makes(view, x, lead))):
            return f"{node.name}: the residual stream, and no single projection"
        if isinstance(lead, str) or lead.node in self.root.parameters:
            return found
        left_out = lead.node
        if (found[0].bent and not lead.bent) or (adds and self._inputs(lead) > self._inputs(found[0])):
            swapped = self._read(view, other, node, there, grid)
            if isinstance(swapped, list):
                found, left_out = swapped, found[0].node
        note = f"a second projection, {left_out.name}, is added: the factors are of the first alone"
        return noted(found, note) if adds else found

    def _inputs(self, trail: Trail) -> int:
        """How many inputs a projection sums over."""
        found = self.projection(trail.view, trail.node)
        return 0 if found is None else math.prod(found[0].summed(found[1]).values())

    def _of_weights(
        self,
        view: GraphView,
        node: Node,
        name: str,
        operands: Sequence[Any],
        pairs: list[tuple[Node, Columns]],
        grid: tuple[int, ...],
    ) -> Found:
        """The largest parameter, multiplied by smaller ones and by numbers."""
        leads = {x: self.lead(view, x, node) for x, _ in pairs}
        alive = [pair for pair in pairs if isinstance(leads[pair[0]], Trail)]
        if not alive:
            return next((lead for lead in leads.values() if isinstance(lead, str)), f"{node.name}: a constant")
        x, at = max(alive, key=lambda pair: math.prod(shape(pair[0]) or ()))
        found = self._read(view, x, node, at, grid)
        for other, there in pairs:
            lead = leads[other]
            if other is x or (isinstance(lead, Trail) and isinstance(found, list) and lead.node is found[0].node):
                continue
            if name == "mul" and isinstance(lead, Trail) and lead.node in self.root.parameters:
                found = self._scaled(view, node, found, other, there, grid)
            elif name in ("mul", "div") or isinstance(lead, Trail):
                note = f"the weight meets {other.name} in {node.name}: the factors are without it"
                found = noted(found, note)
        n = next((x for x in operands if isinstance(x, int | float) and not isinstance(x, bool)), None)
        if n is None:
            return found
        if name in ("add", "sub"):
            sign = -1.0 if name == "sub" and operands[0] is not x else 1.0
            by, shift = sign, n if name == "add" else -n * sign
        else:
            by, shift = n if name == "mul" else 1 / n if name == "div" and operands[0] is x and n else 1.0, 0.0
        return each(found, lambda trail: replace(trail, factor=trail.factor * by, offset=trail.offset * by + shift))

    def _concatenated(self, view: GraphView, node: Node, name: str, c: Columns, grid: tuple[int, ...]) -> Step | Found:
        """cat, stack and pad: elements from several tensors."""
        if name == "pad":
            tensors, axis, sizes, c = padded(node, c)
        else:
            tensors = [x for x in argument(node, 0, "tensors") if shape(x) is not None]
            if name == "cat":
                tensors = [x for x in tensors if len(shape(x) or ()) == len(c)]
            if not tensors:
                return f"{node.name}: joins nothing that is followed"
            dims = axes(tensors[0]) + (name == "stack")
            axis = argument(node, 1, "dim", argument(node, 1, "axis", 0)) % dims
            sizes = [1 if name == "stack" else (shape(x) or ())[axis] for x in tensors]
        ends = list(itertools.accumulate(sizes))
        if isinstance(c[axis], int):
            which: Any = bisect.bisect_right(ends, c[axis])
            met = [which]
        else:
            which = np.searchsorted(ends, c[axis], side="right")
            met = np.unique(which).tolist()

        def of(part: int, rows: Columns) -> Columns:
            inner = () if name == "stack" else (rows[axis] - ends[part] + sizes[part],)
            return (*rows[:axis], *inner, *rows[axis + 1 :])

        if len(met) == 1:
            return (
                (view, tensors[met[0]], node, of(met[0], c)) if tensors[met[0]] is not None else f"{node.name}: padding"
            )
        whole = np.broadcast_to(which, grid).reshape(-1)
        parts: list[tuple[Any, Found]] = []
        for part in met:
            rows, source = np.flatnonzero(whole == part), tensors[part]
            found: Found = f"{node.name}: padding"
            if source is not None:
                found = self._read(view, source, node, of(part, taken(c, grid, rows)), (len(rows),))
            parts.append((rows, found))
        return united(grid, parts)


def _why(name: str) -> str:
    if name in _CONVOLUTIONS:
        return "a grouped convolution, or one without a parameter"
    if name in CONTRACTIONS:
        return f"no operand of `{name}` is a parameter"
    return "a constant" if name == "get_attr" else f"`{name}` is no copy"
