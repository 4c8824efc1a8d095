"""Where the input of a projection is another projection's output, the two are one low-rank map: multi-head latent attention.

What tells the latent between them from a residual stream is who reads it. Nothing lies between the two but views, casts, norms
and gains, and a latent has no reader but this one projection: every other use of it comes back into the norm between the two,
takes other channels (the rotary half of a joint projection), yields no tensor, carries no gradient where the latent does or ends
in indices (the indexer of a sparse attention), or returns it normed from the graph, as a cache. A stream is also added to
something, or read by several projections; so is the output of a patch embedding before the first block. Where the graph ends
before that can be seen, the stream is returned as it was before the norm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from foreshock.patterns.coordinates import Columns, Positions, corner, flat
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import op, shape, tensor, value
from foreshock.patterns.pullback import Pull
from foreshock.patterns.trail import Trail

_NEAR = 48  # nodes on which a use of the latent may come back
_NORMING = frozenset({"mul", "rms_norm", "layer_norm"})
_CUTS = frozenset({"split", "chunk", "tensor_split", "unbind"})


def latent(pull: Pull, trail: Trail, distinct: list[int], whole: tuple[int, int]) -> tuple[Trail, int, int] | None:
    """The trail of the inputs of the projection at the end of ``trail``, if they are a latent: it, their heads and their number.

    ``distinct`` are the heads to ask for, of the ``[heads, channels]`` that ``trail`` follows.
    """
    product = pull.projection(trail.view, trail.node)
    if product is None:
        return None
    met, side = product
    source, summed = met.operands[1 - side], met.summed(side)
    if any(size > 1 and letter not in met.letters[1 - side] for letter, size in summed.items()):
        return None
    straight = Pull(trail.view, straight=True)
    places = {
        letter: _of_heads(column, distinct, whole) for letter, column in zip(met.result, trail.coordinates, strict=True)
    }
    places = {letter: column for letter, column in places.items() if letter in met.letters[1 - side]}
    one = {letter: int(np.asarray(column).flat[0]) for letter, column in places.items()}
    ends = {letter: size - 1 for letter, size in summed.items()}
    if straight(source, met.columns(1 - side, {**one, **ends}), trail.node) is None:
        return None
    sizes = tuple(summed.values())
    rows = dict(zip(summed, np.indices(sizes).reshape(len(sizes), 1, -1), strict=True))
    inner = straight(source, met.columns(1 - side, {**places, **rows}), trail.node)
    if inner is None or inner.view is not trail.view or pull.projection(inner.view, inner.node) is None:
        return None
    heads = len(distinct) if any(np.ndim(column) for column in places.values()) else 1
    return (inner, heads, rows[next(iter(rows))].size) if _is_read_here_only(pull, inner, trail.node) else None


def _of_heads(column: Any, distinct: list[int], whole: tuple[int, int]) -> Any:
    """A column for the distinct heads, ``[heads, 1]``; a number where all agree."""
    found = np.broadcast_to(np.asarray(column), whole)[distinct, :1]
    return int(found[0, 0]) if (found == found[0]).all() else found


def _is_read_here_only(pull: Pull, inner: Trail, reader: Node) -> bool:
    view, made = inner.view, inner.node
    own = {made, *inner.path, reader}
    writers = {write.node for writes in view.writes.values() for write in writes}
    used = set(np.unique(_channels(pull, inner)).tolist())

    last_norm = max((i for i, node in enumerate(inner.path) if op(node) in _NORMING), default=len(inner.path))
    normed = inner.path[last_norm:]

    def harmless(node: Node, user: Node) -> bool:
        if user.op == "output":
            return node in normed
        if op(user) in _CUTS:
            return all(piece in own or harmless(user, piece) for piece in user.users)
        found = tensor(user)
        if found is None:
            return isinstance(value(user), int | float | torch.dtype | torch.device | torch.Size | torch.SymInt)
        loses_gradient = getattr(tensor(made), "requires_grad", False) and not found.requires_grad
        return loses_gradient or _comes_back(user, own, writers) or not used & _others(pull, view, made, user)

    return all(user in own or harmless(node, user) for node in (made, *inner.path) for user in node.users)


def _comes_back(node: Node, own: set[Node], writers: set[Node]) -> bool:
    """Whether all that is made of ``node`` meets again within ``own``, or ends in a choice: indices carry no gradient."""
    seen, ahead = {node}, [node]
    while ahead:
        step = ahead.pop()
        fake = tensor(step)
        if fake is not None and not fake.is_floating_point():
            continue
        if step.op == "output" or step in writers or len(seen) > _NEAR or not step.users:
            return False
        new = [user for user in step.users if user not in own and user not in seen]
        seen.update(new)
        ahead += new
    return True


def _others(pull: Pull, view: GraphView, made: Node, user: Node) -> set[int]:
    """The channels of ``made`` that ``user`` holds; all of them where that is not known."""
    sizes = shape(user) or ()
    c: Columns = (*corner(user)[:-1], np.arange(sizes[-1])) if sizes else ()
    found = Pull(view, straight=True).pieces(user, c)
    everything = set(range(int(np.prod(shape(made) or (1,)))))
    if isinstance(found, str) or any(trail.node is not made for trail in found):
        return everything
    return {int(position) for trail in found for position in np.unique(_channels(pull, trail))}


def _channels(pull: Pull, trail: Trail) -> Positions:
    """The position of elements of a projection's result along the axes that its weight makes."""
    product = pull.projection(trail.view, trail.node)
    assert product is not None
    met, side = product
    axes = [a for a, letter in enumerate(met.result) if letter in met.letters[side]]
    sizes = shape(trail.node) or ()
    return np.asarray(flat([trail.coordinates[a] for a in axes], [sizes[a] for a in axes]))
