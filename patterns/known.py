"""What is known of a capture's nodes, whoever asks: which depend on the input, and which are projections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.fx import Node

from foreshock.patterns.contraction import Contraction, contraction
from foreshock.patterns.crossing import is_buffer, outside
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import op, tensor
from foreshock.patterns.trail import Found, Trail
from foreshock.patterns.writes import Write

FIXED = frozenset({"linear", "conv1d", "conv2d", "conv3d"})  # the second operand is the weight, and no other


@dataclass(eq=False)
class _Memory:
    """Kept with the outermost view, for as long as that lives."""

    varying: dict[GraphView, set[Node]] = field(default_factory=dict)
    dead: dict[tuple[GraphView, Node], str] = field(default_factory=dict)
    leads: dict[tuple[GraphView, Node], Trail | str] = field(default_factory=dict)
    projections: dict[tuple[GraphView, Node], tuple[Contraction, int] | None] = field(default_factory=dict)


class Known(ABC):
    """Answers about nodes of ``view``, of the bodies it calls, and of those that call it."""

    def __init__(self, view: GraphView) -> None:
        self.view = self.root = view
        while self.root.parent is not None:
            self.root = self.root.parent
        self.memory: _Memory = self.root.known.setdefault(_Memory, _Memory())

    @abstractmethod
    def last(self, view: GraphView, node: Node, reader: Node) -> Found:
        """Where the last element of ``node`` comes from."""

    def lead(self, view: GraphView, node: Node, reader: Node) -> Trail | str:
        """`last`, looked up once."""
        known = self.memory.leads
        if (view, node) not in known:
            found = self.last(view, node, reader)
            known[view, node] = found if isinstance(found, str) else found[0]
        return known[view, node]

    def projection(self, view: GraphView, node: Node) -> tuple[Contraction, int] | None:
        """``node`` as a contraction with a weight, and which of its operands that is; None if it is none."""
        known = self.memory.projections
        if (view, node) not in known:
            found = contraction(node)
            sides = (1,) if op(node) in FIXED else (1, 0)
            weights = [side for side in sides if found and self.is_weight(view, found.operands[side], node)]
            known[view, node] = (found, weights[0]) if found and weights else None
        return known[view, node]

    def is_weight(self, view: GraphView, node: Node, reader: Node) -> bool:
        """Whether ``node`` holds a parameter and nothing that depends on the input."""
        if node in self.root.parameters:
            return True
        return not self.varies(view, node) and isinstance(self.lead(view, node, reader), Trail)

    def varies(self, view: GraphView, node: Any) -> bool:
        """Whether ``node`` depends on the input, and not on parameters, buffers and constants alone."""
        if view not in self.memory.varying:
            self.memory.varying[view] = self._varying(view)
        return node in self.memory.varying[view]

    def alike(self, one: Found, other: Found) -> bool:
        """Whether both are the same channels of the same projection, whatever the positions."""
        if isinstance(one, str) or isinstance(other, str) or not len(one) == len(other) == 1:
            return False
        a, b = one[0], other[0]
        product = self.projection(a.view, a.node)
        if a.node is not b.node or product is None or a.where is not None or b.where is not None:
            return False
        met, side = product
        pairs = zip(met.result, a.coordinates, b.coordinates, strict=True)
        return all(np.array_equal(x, y) for letter, x, y in pairs if letter in met.letters[side])

    def _varying(self, view: GraphView) -> set[Node]:
        known: set[Node] = set()
        writers = {write.node: storage for storage, writes in view.writes.items() for write in writes}
        written: set[int | None] = set()
        for node in view.graph.nodes:
            if node.op == "placeholder":
                where, outer = outside(view, node)
                if where is view:
                    changes = tensor(node) is not None and node not in view.parameters and not is_buffer(node)
                else:
                    changes = self.varies(where, outer)
            else:
                changes = not known.isdisjoint(node.all_input_nodes)
                changes = changes or (
                    bool(written) and any(Write.storage_of(x) in written for x in node.all_input_nodes)
                )
            if changes:
                known.add(node)
                if node in writers:
                    written.add(writers[node])
        if written:
            known.update(node for node in view.graph.nodes if Write.storage_of(node) in written)
        return known
