"""Copy a captured graph and the bodies it calls, for Dynamo reads the one it handed out again afterwards."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from foreshock import _torch
from foreshock.patterns.graph import body_of


def copy_graph(module: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy that shares ``module``'s other submodules and metadata, and the map from old to new nodes of the outermost graph."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    returned: Any = graph.graph_copy(module.graph, mapping, return_output_node=True)
    value, old_output = returned if returned is not None else (None, None)
    if old_output is not None:
        new_output = graph.output(value)
        new_output.meta = dict(old_output.meta)
        mapping[old_output] = new_output
    for old, new in mapping.items():
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # how AOTAutograd tells inputs apart
    copied = _torch.graph_module(module, graph)
    copied.meta = dict(module.meta)
    bodies = {str(node.args[0].target): body_of(node) for node in copied.graph.nodes if body_of(node) is not None}
    for name, body in bodies.items():
        assert body is not None
        setattr(copied, name, copy_graph(body)[0])
    return copied, mapping
