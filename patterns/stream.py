"""The residual stream at an attention: what the projected output is added to.

Behind a site's ``out`` the first sum is looked for in which one summand comes from ``out`` through a projection, and the other
is something that the queries were made from. The second half tells the stream from what else is added on the way: a bias, the
output of an MLP that runs in parallel. Norms, gates, scales and dropout may stand in between, on either side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from torch.fx import Node

from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import args, op, shape, tensor
from foreshock.patterns.pattern import Match
from foreshock.patterns.pullback import Pull

_FAR = 192  # nodes behind the output that are looked at
_NEAR = 256  # and nodes before the queries
_SCALED = frozenset({"mul", "div", "cast", "identity", "dropout", "reshape", "transpose", "permute"})
_CHANNELS_FIRST = frozenset({"conv1d", "conv2d", "conv3d"})


def with_stream(match: Match) -> Match:
    """An attention with its residual stream as role ``residual``, ``[..., channels]``; with a note where there is none."""
    if match.kind != "attention" or match.view is None:
        return match
    found = _stream(match.view, match)
    if isinstance(found, str):
        return match.with_note(f"no residual stream: {found}")
    return replace(match, roles={**match.roles, "residual": found})


def _stream(view: GraphView, match: Match) -> Node | str:
    """The summand, or why none was found."""
    out = match.roles.get("out")
    if out is None:
        return "the attention's output has no tensor of its own"
    pull, made = Pull(view), _ancestors(match.roles["q"])
    through: dict[Node, Node | None] = {out: None}  # what comes from the output, and the projection it has gone through
    node = out
    for _ in range(_FAR):
        node = node.next
        if node.op in ("output", "root"):
            break
        before = [source for source in view.dataflow.predecessors(node) if source in through]
        if not before:
            continue
        projected = next((through[x] for x in before if through[x] is not None), None)
        through[node] = projected or (node if pull.projection(view, node) is not None else None)
        stream = _summand(node, set(through), made) if projected is not None and op(node) == "add" else None
        if stream is not None:
            assert projected is not None
            if op(projected) in _CHANNELS_FIRST:
                return f"the output is projected by `{op(projected)}`, and channels do not lie last"
            return stream
    if all(projection is None for projection in through.values()):
        return "its output meets no projection in this graph"
    return "its projected output is added to nothing that the queries are made from"


def _summand(node: Node, derived: set[Node], made: set[Node]) -> Node | None:
    """Of the sum ``node`` what is not derived from the output, if the queries were made from it."""
    for x in args(node)[:2]:
        if isinstance(x, Node) and x not in derived and tensor(x) is not None:
            return next((y for y in _unscaled(x) if y in made and shape(y) == shape(node)), None)
    return None


def _unscaled(node: Node) -> Iterator[Node]:
    """``node`` and what it is a scaled copy of."""
    yield node
    while op(node) in _SCALED and isinstance(args(node)[0], Node):
        node = args(node)[0]
        yield node


def _ancestors(node: Node) -> set[Node]:
    """What ``node`` is made from in its graph, the nearest first, at most a fixed number."""
    found: set[Node] = set()
    queue = deque([node])
    while queue and len(found) < _NEAR:
        for source in queue.popleft().all_input_nodes:
            if source not in found:
                found.add(source)
                queue.append(source)
    return found
