"""Between a graph and the bodies it calls, and out to its inputs."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Node

from foreshock.patterns.coordinates import Columns
from foreshock.patterns.graph import GraphView, source_name
from foreshock.patterns.trail import Trail

Step = tuple[GraphView, Node, Node | None, Columns]  # the next node, in which graph, who reads it, and which elements


def outside(view: GraphView, node: Node) -> tuple[GraphView, Any]:
    """What a body's placeholder is in the graph that calls it, or further out; ``node`` itself in the outermost graph."""
    found = view.source(node)
    while isinstance(found, Node) and view.parent is not None and found.graph is not view.graph:
        view = view.parent
    return view, found


def caller(view: GraphView, outer: GraphView) -> Node | None:
    """The call in ``outer`` inside which ``view`` lies."""
    call = view.call
    while view.parent is not None and view is not outer:
        view, call = view.parent, view.call
    return call


def inside(child: GraphView, call: Node, index: Any, c: Columns) -> Step | str:
    """Result ``index`` of a call, as its body returns it."""
    end, results = next(iter(reversed(child.graph.nodes))), child.results
    found = results[index] if isinstance(index, int) and index < len(results) else None
    return (child, found, end, c) if isinstance(found, Node) else f"{call.name}: its result {index} is no tensor"


def cut(node: Node) -> str:
    """Why a trail ends at a graph input."""
    if is_buffer(node):
        return f"{node.name}: a buffer"
    places = (
        re.search(r"torch_dynamo_resume_in_(\w+)_at_(\d+)", n.meta.get("stack_trace") or "") for n in node.graph.nodes
    )
    resumed = next((f", resumed in {place[1]} at line {place[2]}" for place in places if place), "")
    return f"{node.name}: a graph input (the trail was cut by a graph break{resumed}): {source_name(node) or node.name}"


def is_buffer(node: Node) -> bool:
    return "._buffers[" in source_name(node)


def makes(view: GraphView, node: Node, trail: Trail) -> bool:
    """Whether the projection at the end of ``trail`` is made from ``node``, not far away."""
    end, where = trail.node, trail.view
    while where is not view and where.parent is not None and where.call is not None:
        end, where = where.call, where.parent
    return where is view and end in view.forward_slice(node)
