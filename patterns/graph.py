"""What every pattern sees of a captured graph: its nodes, its parameters and their names, and the dataflow between them.

A graph may call others (checkpointed blocks, nested compile regions): each call has a `GraphView` of its own, linked to the
one that calls it, so that a trail goes in and out of bodies as if they stood in line. Writing in place is dataflow too: see
`foreshock.patterns.writes`.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch.fx import Graph, GraphModule, Node

from foreshock.patterns.ops import op
from foreshock.patterns.writes import Write, writes_of

# Calls of other graphs: where the body stands among the arguments, and where its operands begin.
FUNCTION = "higher_order::autograd_function_apply"
BODIES: Mapping[str, tuple[int, int]] = {
    "higher_order::tag_activation_checkpoint": (0, 1),
    "higher_order::invoke_subgraph": (0, 2),
    FUNCTION: (0, 2),
}
_NEAR = 256  # nodes that a slice visits at most, unless asked for more: matching stays linear in the graph


@dataclass(eq=False)
class GraphView:
    """A graph with the example inputs of its capture. ``parameters`` maps placeholders to live parameters.

    ``constants`` are buffers, as they were in the capture; ``model`` is the class of the module that was captured. For the body of
    a call, ``parent`` is the view of the calling graph and ``call`` the calling node; ``parameters``, ``names`` and ``constants``
    are those of the outermost graph.
    """

    graph: Graph
    parameters: Mapping[Node, torch.Tensor]
    names: Mapping[Node, str]
    parent: GraphView | None = None
    call: Node | None = None
    constants: Mapping[Node, torch.Tensor] = field(default_factory=dict)
    model: str = ""
    known: dict[type, Any] = field(default_factory=dict)  # what walks have learned, by who keeps it
    _links: dict[Node, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        graph: Graph,
        example_inputs: Sequence[Any],
        name_of: Callable[[Any], str | None] = lambda parameter: None,
        model: str = "",
    ) -> GraphView:
        """``name_of(parameter)`` is its name in the user's model, where known; it wins over the path that Dynamo recorded."""
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        parameters = {
            node: example
            for node, example in zip(placeholders, example_inputs, strict=False)
            if isinstance(example, torch.nn.Parameter) or source_name(node).find("._parameters[") >= 0
        }
        roots = {_root(source_name(node)) for node in parameters}
        root = (
            roots.pop() if len(roots) == 1 else ""
        )  # the one object that all parameters belong to goes without saying
        names = {
            node: name_of(parameter) or module_path(source_name(node), root) for node, parameter in parameters.items()
        }
        buffers = {
            node: example
            for node, example in zip(placeholders, example_inputs, strict=False)
            if "._buffers[" in source_name(node) and isinstance(example, torch.Tensor) and not example.is_meta
        }
        return cls(graph, parameters, names, constants=buffers, model=model)

    @functools.cached_property
    def children(self) -> Mapping[Node, GraphView]:
        """The views of the bodies that this graph calls, by calling node. One body called twice has two views."""
        found = {}
        for node in self.graph.nodes:
            body = body_of(node)
            if body is not None:
                _, first = BODIES[op(node)]
                inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
                links = dict(zip(inputs, node.args[first:], strict=False))
                found[node] = GraphView(
                    body.graph, self.parameters, self.names, self, node, self.constants, self.model, _links=links
                )
        return found

    def walk(self) -> Iterator[GraphView]:
        """This view and those of all bodies, outermost first."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    @property
    def results(self) -> tuple[Any, ...]:
        """What the graph returns to its caller: of an autograd.Function's body without what it keeps for its backward."""
        found: Any = next(iter(reversed(self.graph.nodes))).args[0]
        if self.call is not None and op(self.call) == FUNCTION:
            found = found[0]
        return tuple(found) if isinstance(found, list | tuple) else (found,)

    def source(self, node: Any) -> Any:
        """What ``node`` is outside: a body's placeholder is the operand it was called with, and so on outwards."""
        view: GraphView | None = self
        while isinstance(node, Node) and view is not None and node in view._links:
            node, view = view._links[node], view.parent
        return node

    @functools.cached_property
    def order(self) -> Mapping[Node, int]:
        """The position of each node."""
        return {node: position for position, node in enumerate(self.graph.nodes)}

    @functools.cached_property
    def writes(self) -> Mapping[int, list[Write]]:
        """By storage, every write into it in graph order."""
        return writes_of(self.graph)

    def written(self, node: Node, reader: Node) -> list[Write]:
        """What was stored into the memory of ``node`` after it was made and before ``reader`` reads it; the last comes first."""
        if not self.writes:
            return []
        start, stop = self.order[node], self.order.get(reader, len(self.order))
        storage = Write.storage_of(node)
        found = self.writes.get(storage, ()) if storage is not None else ()
        return [write for write in reversed(found) if start < self.order[write.node] < stop]

    @functools.cached_property
    def dataflow(self) -> nx.DiGraph:
        """Producer -> consumer, over all nodes of this graph; who writes into memory comes before who reads it later."""
        flow: nx.DiGraph = nx.DiGraph()
        flow.add_nodes_from(self.graph.nodes)
        flow.add_edges_from((source, node) for node in self.graph.nodes for source in node.all_input_nodes)
        if self.writes:
            writers = {write.node: storage for storage, writes in self.writes.items() for write in writes}
            last: dict[int, Node] = {}
            for node in self.graph.nodes:
                storages = {Write.storage_of(source) for source in node.all_input_nodes}
                flow.add_edges_from((last[s], node) for s in storages if s in last)
                if node in writers:
                    last[writers[node]] = node
        return flow

    def forward_slice(self, node: Node, limit: int = _NEAR) -> set[Node]:
        """Nodes that depend on ``node``, the nearest first, at most ``limit``."""
        found: set[Node] = set()
        queue = deque([node])
        while queue and len(found) < limit:
            for user in self.dataflow.successors(queue.popleft()):
                if user not in found:
                    found.add(user)
                    queue.append(user)
        return found


def body_of(node: Node) -> GraphModule | None:
    """The graph that ``node`` calls, if it is a call of one that is understood."""
    where = BODIES.get(op(node)) if node.op == "call_function" else None
    held = node.args[where[0]] if where and len(node.args) > where[0] else None
    if not isinstance(held, Node) or held.op != "get_attr":
        return None
    owner = held.graph.owning_module
    body = getattr(owner, str(held.target), None) if owner is not None else None
    return body if isinstance(body, GraphModule) else None


def source_name(node: Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None) or getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _root(source: str) -> str:
    """``L['model']._modules['layers']`` -> ``L['model']``; under a decorator the module is one of ``L['args']``."""
    found = re.match(r"L\['args'\]\[\d+\]|[LG]\['[^']*'\]", source)
    return found[0] if found else ""


def module_path(source: str, root: str = "") -> str:
    """``L['self']._modules['layers']._modules['0']._parameters['weight']`` -> ``layers.0.weight``. ``root`` is left out."""
    path = source.removeprefix(root)
    path = re.sub(r"\.__dict__\['(_\w+)'\]", r".\1", path)
    path = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    path = re.sub(r"^(?:[LG]\['(?:self|fn)'\]|L\['([^']*)'\]|G\['([^']*)'\])", r"\1\2", path)
    return path.lstrip(".") or ("" if source == root else source)


def module_of(node: Node) -> str:
    """The path of the module whose forward made ``node`` below the outermost one, as far as Dynamo recorded it."""
    stack = node.meta.get("nn_module_stack")
    path = next(reversed(stack.values()))[0] if stack else ""
    return module_path(path, _root(path))
