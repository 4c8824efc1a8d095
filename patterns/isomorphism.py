"""Find one small graph, a pattern's, inside a captured one, around an anchor.

The candidates of every node of the pattern are gathered along a tree that starts at the anchor, so a search sees a bounded
neighbourhood only; among them networkx's VF2 decides. Casts, copies and idle dropout in the captured graph are looked through
where the pattern does not name them, and a write in place stands for its functional form.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import networkx as nx
from networkx.algorithms.isomorphism import DiGraphMatcher
from torch.fx import Node

from foreshock.patterns.forms import ANY, COMMUTATIVE, SPELLINGS, Form, Operand, form, invert, is_scalar, same
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import argument, op, value

MOST_READERS = 64  # a tensor that more nodes read (a rotary table, a mask) is no way from one place to another
MOST_TRIED = 256  # assignments that fit node by node, tried at most for one anchor
TRANSPARENT = ("cast", "identity")


@dataclass(frozen=True)
class Found:
    """One way in which a pattern lies in a graph: what stands for each of its nodes (a node, or the value of a number), and
    where its open tensors enter: reader, and position or keyword (None: inside a list)."""

    values: Mapping[Node, Any]
    edges: Mapping[Node, tuple[tuple[Node, int | str | None], ...]]


@dataclass(frozen=True, eq=False)
class Motif:
    """A pattern as a graph. ``nodes`` are its ops, the anchor first, each joined to an earlier one by its entry in ``steps``."""

    forms: Mapping[Node, Form]
    anchor: Node
    steps: tuple[tuple[Node, Node], ...]  # (from, to): edges of a tree, between ops or through an open tensor

    @classmethod
    def around(cls, anchor: Node, live: set[Node]) -> Motif:
        """Of the nodes ``live``; what is not connected with ``anchor`` is left out."""
        forms = {node: form(node) for node in live if is_op(node)}
        links: dict[Node, list[Node]] = {}
        for node, its in forms.items():
            for operand in its.operands.values():
                if not is_scalar(operand.node):
                    links.setdefault(node, []).append(operand.node)
                    links.setdefault(operand.node, []).append(node)
        steps, seen, queue = [], {anchor}, deque([anchor])
        while queue:
            node = queue.popleft()
            for near in links.get(node, ()):
                if near not in seen:
                    seen.add(near)
                    steps.append((node, near))
                    queue.append(near)
        return cls({node: its for node, its in forms.items() if node in seen}, anchor, tuple(steps))


def is_op(node: Node) -> bool:
    """Whether a node of a pattern is one of its ops: no open tensor, and no number."""
    return node.op in ("call_function", "call_method") and not is_scalar(node)


def accepts(wanted: str, found: str) -> bool:
    """Whether a node of op ``found`` may have the form of op ``wanted``."""
    return found in SPELLINGS.get(wanted, (wanted,))


@dataclass(eq=False)
class Target:
    """A captured graph, as far as matching asks for it."""

    view: GraphView
    _forms: dict[Node, Form] = field(default_factory=dict)
    _writers: dict[Node, list[Node]] | None = None

    @classmethod
    def of(cls, view: GraphView) -> Target:
        """One for each view, shared by all patterns."""
        return _targets.setdefault(view, cls(view))

    def form(self, node: Node) -> Form:
        if node not in self._forms:
            self._forms[node] = form(node)
        return self._forms[node]

    def chain(self, operand: Operand, reader: Node) -> list[Node]:
        """The node that ``reader`` reads there, then what that is a cast or copy of, and so on back."""
        found = [self._now(operand.node, reader)]
        while is_transparent(found[-1]) and isinstance(found[-1].args[0], Node):
            found.append(self._now(found[-1].args[0], found[-1]))
        return found

    def readers(self, node: Node) -> Iterator[Node]:
        """The nodes that read ``node``, also through casts and copies, or nothing if there are too many."""
        queue, seen = deque([node]), {node}
        while queue and len(seen) <= MOST_READERS:
            for user in self._users(queue.popleft()):
                if user not in seen:
                    seen.add(user)
                    yield user
                    if is_transparent(user):
                        queue.append(user)

    def _users(self, node: Node) -> list[Node]:
        if len(node.users) > MOST_READERS:
            return []
        return [*node.users, *self._later_readers().get(node, ())]

    def _now(self, node: Node, reader: Node) -> Node:
        """Who made what ``node`` holds when ``reader`` reads it."""
        for write in self.view.written(node, reader):
            made = write.source if op(write.node) == "copy" else write.node
            if isinstance(made, Node) and made is not reader:
                return made
        return node

    def _later_readers(self) -> Mapping[Node, list[Node]]:
        """Of each node that writes in place: who reads the memory through another name."""
        if self._writers is None:
            self._writers = {}
            for node in self.view.graph.nodes if self.view.writes else ():
                for source in node.all_input_nodes:
                    made = self._now(source, node)
                    if made is not source:
                        self._writers.setdefault(made, []).append(node)
        return self._writers


_targets: WeakKeyDictionary[GraphView, Target] = WeakKeyDictionary()


def is_transparent(node: Node) -> bool:
    """A cast, a copy, or a dropout that drops nothing."""
    name = op(node)
    if name == "dropout":
        idle = argument(node, 2, "training", True) is False or argument(node, 2, "train", True) is False
        return idle or argument(node, 1, "p", 0.5) == 0.0
    return name in TRANSPARENT and bool(node.args)


@dataclass(frozen=True)
class Stuck:
    """How far a pattern got around an anchor: its nodes that have a counterpart, and the first that has none."""

    matched: tuple[Node, ...]
    failed: Node | None  # None: every node has a counterpart, but they are not joined as in the pattern
    at: Node  # the counterpart of the neighbour from which ``failed`` was looked for
    neighbour: Node


def search(motif: Motif, target: Target, anchor: Node) -> list[Found] | Stuck:
    """Every way in which ``motif`` lies in the graph with its anchor at ``anchor``."""
    candidates = {motif.anchor: [anchor] if _fits(motif, motif.anchor, target, anchor) else []}
    if not candidates[motif.anchor]:
        return Stuck((), motif.anchor, anchor, motif.anchor)
    for start, end in motif.steps:
        candidates[end] = list(dict.fromkeys(_step(motif, target, candidates[start], start, end)))
        if not candidates[end]:
            ops = tuple(node for node in candidates if node in motif.forms and node is not end)
            return Stuck(ops, end, candidates[start][0], start)
    found: dict[tuple[Any, ...], Found] = {}
    for mapping in itertools.islice(_isomorphisms(motif, target, candidates), MOST_TRIED):
        bound = _bind(motif, target, mapping)
        if bound is not None:
            solid = (node for node, its in motif.forms.items() if its.op not in TRANSPARENT)
            found.setdefault(tuple(bound.values[node] for node in solid), bound)
    return list(found.values()) or Stuck(tuple(motif.forms), None, anchor, motif.anchor)


def _step(motif: Motif, target: Target, starts: list[Node], start: Node, end: Node) -> Iterator[Node]:
    """Nodes of the graph that may be ``end``, from those that may be its neighbour ``start``."""
    for node in starts:
        near = _slots(motif, start, end)
        if near:  # upwards: `end` is an operand of `start`
            for slot, operand in target.form(node).operands.items():
                if slot in near or motif.forms[start].op in COMMUTATIVE:
                    for source in target.chain(operand, node):
                        if end not in motif.forms or _fits(motif, end, target, source):
                            yield source
        else:
            yield from (reader for reader in target.readers(node) if _fits(motif, end, target, reader))


def _slots(motif: Motif, reader: Node, operand: Node) -> list[str]:
    its = motif.forms.get(reader)
    return [] if its is None else [slot for slot, held in its.operands.items() if held.node is operand]


def _fits(motif: Motif, node: Node, target: Target, candidate: Node) -> bool:
    """Whether ``candidate`` alone could be ``node``: its op, its constants, its number of operands."""
    wanted = motif.forms[node]
    if candidate.op not in ("call_function", "call_method") or not accepts(wanted.op, op(candidate)):
        return False
    return any(True for _ in _readings(wanted, target.form(candidate)))


def _readings(wanted: Form, found: Form) -> Iterator[Form]:
    """``found`` as it stands, and with its operands changed round where order does not matter: those that fit ``wanted``."""
    if wanted.op != found.op:
        return
    if _agree(wanted, found):
        yield found
    if wanted.op in COMMUTATIVE:
        other = {"self": "other", "other": "self"}
        operands = {other.get(slot, slot): operand for slot, operand in found.operands.items()}
        constants = {other.get(slot, slot): constant for slot, constant in found.constants.items()}
        turned = Form(found.op, operands, constants, found.rank)
        if _agree(wanted, turned):
            yield turned


def _agree(wanted: Form, found: Form) -> bool:
    for slot, operand in wanted.operands.items():
        if not is_scalar(operand.node) and slot not in found.operands:
            return False
        if is_scalar(operand.node) and slot in found.operands and not _is_number(found.operands[slot].node):
            return False
    for slot, constant in wanted.constants.items():
        if slot not in found.constants or not same(slot, constant, found.constants[slot], found.rank):
            return False
    if wanted.constants.get("view") is ANY:
        return True
    extra = {*found.operands, *found.constants} - {*wanted.operands, *wanted.constants}
    return extra <= {"dtype"}  # softmax(x, -1, dtype=...) casts on its way, and casts are looked through


def _is_number(node: Node) -> bool:
    """A scale may also arrive as a tensor without axes."""
    return is_scalar(node) or getattr(value(node), "ndim", None) == 0


def _isomorphisms(motif: Motif, target: Target, candidates: Mapping[Node, list[Node]]) -> Iterator[dict[Node, Node]]:
    """VF2 over the ops: pattern node -> node of the graph."""
    allowed: dict[Node, set[Node]] = {}
    for node in motif.forms:
        for candidate in candidates[node]:
            allowed.setdefault(candidate, set()).add(node)
    small, large = nx.DiGraph(), nx.DiGraph()
    for node, its in motif.forms.items():
        small.add_node(node, node=node)
        for slot, operand in its.operands.items():
            if operand.node in motif.forms:
                _join(small, operand.node, node, slot if its.op not in COMMUTATIVE else "")
    for node, roles in allowed.items():
        large.add_node(node, allowed=roles)
        its = target.form(node)
        for slot, operand in its.operands.items():
            for source in target.chain(operand, node):
                if source in allowed:
                    _join(large, source, node, slot if its.op not in COMMUTATIVE else "")
    matcher = DiGraphMatcher(
        large,
        small,
        node_match=lambda found, wanted: wanted["node"] in found["allowed"],
        edge_match=lambda found, wanted: wanted["slots"] <= found["slots"],
    )
    for mapping in matcher.subgraph_monomorphisms_iter():
        yield {wanted: found for found, wanted in mapping.items()}


def _join(graph: nx.DiGraph, source: Node, reader: Node, slot: str) -> None:
    held = graph.edges[source, reader]["slots"] if graph.has_edge(source, reader) else frozenset()
    graph.add_edge(source, reader, slots=held | {slot})


def _bind(motif: Motif, target: Target, mapping: Mapping[Node, Node]) -> Found | None:
    """``mapping`` with the open tensors and numbers too, if every one of them is the same wherever the pattern has it."""
    choices = [
        [(node, reading) for reading in _readings(its, target.form(mapping[node]))] for node, its in motif.forms.items()
    ]
    for readings in itertools.product(*choices):
        chains: dict[Node, list[list[Node]]] = {}
        edges: dict[Node, tuple[tuple[Node, int | str | None], ...]] = {}
        numbers: dict[Node, list[Any]] = {}
        for node, reading in readings:
            its = motif.forms[node]
            for slot, operand in its.operands.items():
                if is_scalar(operand.node):
                    numbers.setdefault(operand.node, []).append(_number(its.op, operand, slot, reading))
                else:
                    entered = reading.operands[slot]
                    chains.setdefault(operand.node, []).append(target.chain(entered, mapping[node]))
                    edges[operand.node] = (*edges.get(operand.node, ()), (mapping[node], entered.where))
        bound: dict[Node, Any] = dict(mapping)
        for node, each in chains.items():
            common = [source for source in each[0] if all(source in chain for chain in each[1:])]
            wanted = mapping.get(node, common[0] if common else None)
            if wanted is None or wanted not in common:
                break
            bound[node] = wanted
        else:
            if all(all(same("", one, first, None) for one in rest) for first, *rest in numbers.values()):
                return Found(bound | {node: first for node, (first, *_) in numbers.items()}, edges)
    return None


def _number(name: str, wanted: Operand, slot: str, found: Form) -> Any:
    """What stands for a wildcard constant: a number, None where an argument was left out, or what a node is known to be."""
    inverse, held = False, found.constants.get(slot)
    if slot in found.operands:
        inverse, held = found.operands[slot].inverse, value(found.operands[slot].node)
        held = getattr(getattr(held, "node", None), "hint", held)
    if wanted.inverse != inverse and isinstance(held, int | float) and (held or name == "add"):
        return invert(name, held)
    return held
