"""Where two activations meet, whatever it is called: products, means of products, and distances.

An attention may compare queries and keys by any of these. A pattern knows products alone (`foreshock.patterns.products`); the
others are for `foreshock.patterns.overlooked`, which asks only what met what and along which axes.
"""

from __future__ import annotations

from torch.fx import Node

from foreshock.patterns.coordinates import axes
from foreshock.patterns.ops import args, argument, op, shape
from foreshock.patterns.pattern import Edge
from foreshock.patterns.products import Product, product, reduced

_INNER = "torch._C._linalg::linalg_vecdot"
PRODUCTS = frozenset({"matmul", "baddbmm", "einsum", "sum", "mean", _INNER})  # as meetings that may sum over keys
MEETINGS = PRODUCTS | {"cdist"}


def meeting(node: Node) -> Product | None:
    """How two tensors or more meet in ``node``, as if it were their product; None if it is nothing of the kind."""
    if op(node) == _INNER:
        return reduced(node, node, argument(node, 2, "dim", -1)) if not argument(node, 2, "keepdim") else None
    if op(node) == "cdist":
        return _distances(node)
    found = product(node) if op(node) != "mean" else None
    source = argument(node, 0, "input")
    if found is not None or op(node) not in ("sum", "mean") or not isinstance(source, Node):
        return found
    dims = argument(node, 1, "dim")
    if op(node) == "mean":
        return reduced(node, source, dims) if op(source) == "mul" else None
    squared = args(source)[0] if op(source) == "square" or (op(source) == "pow" and args(source)[1] == 2) else None
    return reduced(node, squared, dims) if isinstance(squared, Node) and op(squared) == "sub" else None


def _distances(node: Node) -> Product | None:
    """``[..., M, K]`` and ``[..., N, K]`` to ``[..., M, N]``."""
    if len(args(node)) < 2 or any(shape(x) is None for x in args(node)[:2]):
        return None
    batch = list(range(axes(node) - 2))
    sizes = [batch[len(batch) - (axes(x) - 2) :] for x in args(node)[:2]]
    letters = ((*sizes[0], "m", "k"), (*sizes[1], "n", "k"))
    return Product(node, (Edge(node, 0), Edge(node, 1)), letters, (*batch, "m", "n"))
