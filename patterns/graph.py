"""What every pattern sees of a captured graph: its nodes, its parameters and their names, and slices of its dataflow."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch.fx import Graph, Node


@dataclass(eq=False)
class GraphView:
    """A graph with the example inputs of its capture. ``parameters`` maps placeholders to live parameters."""

    graph: Graph
    parameters: Mapping[Node, torch.Tensor]
    names: Mapping[Node, str]

    @classmethod
    def of(
        cls, graph: Graph, example_inputs: Sequence[Any], name_of: Callable[[Any], str | None] = lambda parameter: None
    ) -> GraphView:
        """``name_of(parameter)`` is its name in the user's model, where known; it wins over the path that Dynamo recorded."""
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        parameters = {
            node: example
            for node, example in zip(placeholders, example_inputs, strict=False)
            if isinstance(example, torch.nn.Parameter) or _source_name(node).find("._parameters[") >= 0
        }
        names = {node: name_of(parameter) or module_path(_source_name(node)) for node, parameter in parameters.items()}
        return cls(graph, parameters, names)

    @functools.cached_property
    def dataflow(self) -> nx.DiGraph:
        """Producer -> consumer, over all nodes."""
        flow: nx.DiGraph = nx.DiGraph()
        flow.add_nodes_from(self.graph.nodes)
        flow.add_edges_from((source, node) for node in self.graph.nodes for source in node.all_input_nodes)
        return flow

    def forward_slice(self, node: Node) -> set[Node]:
        """Every node that depends on ``node``."""
        return set(nx.descendants(self.dataflow, node))


def _source_name(node: Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None) or getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def module_path(source: str) -> str:
    """``L['self']._modules['layers']._modules['0']._parameters['weight']`` -> ``layers.0.weight``."""
    path = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", source)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    path = re.sub(r"^(?:[LG]\['(?:self|fn)'\]|L\['([^']*)'\]|G\['([^']*)'\])", r"\1\2", path)
    return path.lstrip(".") or source


def module_of(node: Node) -> str:
    """The path of the module whose forward made ``node``, as far as Dynamo recorded it."""
    stack = node.meta.get("nn_module_stack")
    return module_path(next(reversed(stack.values()))[0]) if stack else ""
