"""What becomes of a choice. It is a router's if it decides what is computed on the tokens; a metric's, a codebook's or a sparse
activation's if not.

The evidence: somewhere behind the choice, what was chosen meets something that the scores did not make. It picks, or is
multiplied along a feature axis by, an activation (tokens, or what experts made of them), or it meets a weight of three axes (one
matrix an expert). Until then it passes through anything but a dense layer: the features that a top-k sparse activation or
autoencoder keeps go straight into one, and what comes out of it says nothing of experts. A choice compared with labels or with
another choice is a metric. Rows picked from a table are vectors, and no experts until a token meets them.

The sweep runs once over the nodes behind the projection, in graph order, and no further than a fixed distance: matching stays
linear in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from foreshock.patterns.coordinates import corner
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import argument, op, shape, tensor, value
from foreshock.patterns.pullback import Pull

SCORINGS = {"softmax": "softmax", "log_softmax": "softmax", "sigmoid": "sigmoid", "softplus": "softplus"}
_FAR = 384  # nodes looked at behind a selection
_LATE = 64  # and behind the first sign of experts, for a score that is computed of what was chosen
_PICKS = frozenset(
    {"getitem", "gather", "index_select", "index_add", "index_copy", "index_put", "index", "setitem", "take_along_dim"}
    | {"scatter", "scatter_add", "scatter_reduce", "embedding"}
)
_PRODUCTS = frozenset({"matmul", "baddbmm", "addmm", "addbmm", "einsum", "linear", "tensordot"})
_WEIGHS = frozenset({"mul", "where", "masked_fill", "addcmul"})
_COMPARES = frozenset({"eq", "ne", "isin"})


@dataclass
class Fate:
    """What was seen behind a choice.

    ``tokens``: it met activations; ``experts``: weights of three axes; ``dense``: a dense layer; ``compared``: labels or another
    choice, which is then ``echoed``; ``drawn``: random numbers. ``rechosen``: some of
    its scores are chosen again. ``leaves``: it is a result of the graph; ``weights_leave``: so is
    a number or a few a token made from the scores. ``scoring`` follows the selection; ``beside`` is computed of the scores and not
    of the selection. ``pieces`` are its parts at single positions of an axis.
    """

    tokens: bool = False
    experts: bool = False
    dense: bool = False
    compared: bool = False
    echoed: bool = False
    drawn: bool = False
    rechosen: bool = False
    leaves: bool = False
    weights_leave: bool = False
    scoring: Node | None = None
    beside: Node | None = None
    pieces: set[Node] = field(default_factory=set)


@dataclass
class _Sweep:
    """Nodes so far: ``derived`` from the scores, ``after`` the selection, of the ``choice``, and ``spent`` on tokens or experts."""

    view: GraphView
    own: frozenset[Node]
    chosen: Node
    tokens: int
    found: Fate
    derived: set[Node]
    after: set[Node] = field(default_factory=set)
    choice: set[Node] = field(default_factory=set)
    spent: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.pull = Pull(self.view)

    def meets(self, node: Node) -> bool:
        """Whether the choice meets activations or experts' weights in ``node``."""
        chosen = [x for x in node.all_input_nodes if x in self.choice]
        others = [x for x in node.all_input_nodes if x not in self.derived and tensor(x) is not None]
        name = op(node)
        opaque = "::" in name or "grouped_mm" in name
        if not chosen or not others or not (opaque or name in _PICKS or name in _PRODUCTS or name in _WEIGHS):
            return False
        activations = [x for x in others if _is_float(x) and self.pull.varies(self.view, x)]
        if name in _WEIGHS:
            activations = [x for x in activations if any(_along_features(x, by) for by in chosen)]
        else:
            self.found.experts |= any(_axes(x) > 2 and (opaque or self.is_experts(x, node)) for x in others)
        met = any(_axes(x) > 1 for x in activations)
        self.found.tokens |= met
        return met or self.found.experts

    def is_experts(self, x: Node, reader: Node) -> bool:
        """Whether ``x`` holds a parameter that did not make the scores."""
        if not self.pull.is_weight(self.view, x, reader):
            return False
        trail = self.pull(x, corner(x), reader)
        return trail is None or trail.node not in self.own

    def ends(self, node: Node) -> bool:
        """Whether what comes out of ``node`` says nothing of the choice any more."""
        if op(node) in _COMPARES:
            others = [x for x in node.all_input_nodes if x not in self.choice and tensor(x) is not None]
            compared = any(x in self.derived or self.pull.varies(self.view, x) for x in others)
            self.found.echoed |= any(x in self.derived for x in others)
            if not others:  # with a number: several are asked for where each stands for an expert
                compared = sum(op(user) in _COMPARES for x in node.all_input_nodes for user in x.users) < 2
            self.found.compared |= compared
            return compared
        product = self.pull.projection(self.view, node)
        if product is None or product[0].operands[product[1]] in self.derived or self.found.experts:
            return False
        self.found.dense = True
        return True

    def notes(self, node: Node, selection: Node) -> None:
        """Take down what ``node`` makes of the scores, where no tokens or experts are in it yet."""
        found, size, name = self.found, math.prod(shape(node) or (0,)), op(node)
        if any(user.op == "output" for user in node.users) and size >= self.tokens:
            indices = not _is_bool(self.chosen)
            found.leaves |= node in self.choice and (indices or not _is_float(node))
            found.weights_leave |= _is_float(node) and (node in self.after or size == self.tokens)
        if node in self.after and node is not selection:
            found.drawn |= name == "multinomial"
            found.rechosen |= name == "topk" and _is_last_axis(node)
        if name in SCORINGS and (shape(node) or (0,))[-1] > 1:
            if node in self.after:
                found.scoring = found.scoring or node
            else:
                found.beside = found.beside or node


def fate(view: GraphView, start: Node, selection: Node, chosen: Node, tokens: int, own: frozenset[Node]) -> Fate:
    """Of the choice ``chosen`` that ``selection`` makes of scores that come from ``start``, for ``tokens`` tokens.

    ``own`` are the placeholders of the weight behind the scores. Where experts choose tokens, read ``pieces`` and ``experts``.
    """
    sweep = _Sweep(view, own, chosen, tokens, found := Fate(), {start})
    left = view.order[selection] + _FAR - view.order[start]
    for node in _behind(start):
        left = min(left - 1, _LATE) if found.tokens and found.experts else left - 1
        before = [source for source in view.dataflow.predecessors(node) if source in sweep.derived]
        if left < 0:
            break
        if not before or isinstance(value(node), int | torch.SymInt):
            continue
        sweep.derived.add(node)
        if node is selection or not sweep.after.isdisjoint(before):
            sweep.after.add(node)
        chose = node is chosen or not sweep.choice.isdisjoint(before)
        if (chose and sweep.meets(node)) or not sweep.spent.isdisjoint(before):
            sweep.spent.add(node)
        if chose and not sweep.ends(node):
            sweep.choice.add(node)
        if node not in sweep.spent:
            sweep.notes(node, selection)
        if node in sweep.choice and node is not chosen and op(node) in ("getitem", "select") and _is_piece(node):
            found.pieces.add(node)
    return found


def _behind(node: Node) -> Iterator[Node]:
    while node.next.op not in ("output", "root"):
        node = node.next
        yield node


def _is_last_axis(node: Node) -> bool:
    """Whether a topk chooses along the last axis; along another, tokens drop out where an expert is full."""
    axis = argument(node, 2, "dim", -1)
    return axis in (-1, len(shape(argument(node, 0, "input")) or ()) - 1)


def _is_piece(node: Node) -> bool:
    """Whether ``node`` holds one position along an axis of what it is taken from, or one of several tensors."""
    return _axes(node) < _axes(node.all_input_nodes[0], default=2)


def _is_bool(node: Node) -> bool:
    fake = tensor(node)
    return fake is not None and fake.dtype is torch.bool


def _is_float(node: Node) -> bool:
    fake = tensor(node)
    return fake is not None and fake.is_floating_point()


def _axes(node: Node, default: int = 0) -> int:
    """How many axes are longer than 1."""
    sizes = shape(node)
    return default if sizes is None else sum(size > 1 for size in sizes)


def _along_features(x: Node, by: Node) -> bool:
    """Whether ``by`` holds several numbers, each for a stretch of ``x`` along an axis that is not the first."""
    wide, narrow = shape(x) or (), shape(by) or ()
    pairs = list(zip(wide, narrow, strict=False))[1:] if len(wide) == len(narrow) else []
    return math.prod(narrow) > 1 and any(a > 1 and b == 1 for a, b in pairs)
