"""How a tensor at an attention boundary lies: its axes by name, outermost first.

An axis is named by what runs along it: ``b`` batch, ``h`` heads, ``s`` positions (queries or keys), ``d`` channels. ``"b h s d"``
is what PyTorch's own attention takes, ``"b h d s"`` a key already transposed, ``"(b h=8) s d"`` batch and 8 heads merged into one
axis with heads running fastest, ``"b h0 h1 s d"`` heads split into groups, ``"s d"`` one head of one sequence. Axes of one letter
are joined in the order of their digits; an axis that is missing has size 1.
"""

from __future__ import annotations

import functools
import math
import re

from torch import Tensor

CLASSES = "bhsd"
BHSD = "b h s d"


def words(layout: str) -> list[str]:
    """``"(b h=8) s d"`` -> ``["(b h=8)", "s", "d"]``: one for each axis."""
    return re.findall(r"\([^)]*\)|\S+", layout)


@functools.lru_cache(maxsize=256)
def parse(layout: str) -> tuple[tuple[str, ...], ...]:
    """``"(b h=8) s d"`` -> ``(("b", "h=8"), ("s",), ("d",))``."""
    axes = tuple(tuple(part.strip("()").split()) for part in words(layout))
    names = [name for axis in axes for name in axis]
    if any(name[0] not in CLASSES for name in names) or len(set(names)) != len(names):
        raise ValueError(
            f"reading the layout {layout!r}: axes are named b, h, s or d, with a digit if there are several"
        )
    if any(len(axis) > 1 and sum("=" in name for name in axis) != len(axis) - 1 for axis in axes):
        raise ValueError(f"reading the layout {layout!r}: of merged axes all but one need their size, as in (b h=8)")
    return axes


def _size(name: str) -> int:
    return int(name.partition("=")[2] or -1)


def canonical(x: Tensor, layout: str) -> Tensor:
    """``x``, which lies as ``layout`` says, as ``[B, H, S, D]``: a view where strides allow."""
    axes = parse(layout)
    if layout == BHSD:
        return x
    for position in reversed(range(len(axes))):
        if len(axes[position]) > 1:
            x = x.unflatten(position, [_size(name) for name in axes[position]])
    names = [name for axis in axes for name in axis]
    order = sorted(range(len(names)), key=lambda i: (CLASSES.index(names[i][0]), names[i]))
    x = x.permute(order)
    sizes = {letter: [x.shape[i] for i, at in enumerate(order) if names[at][0] == letter] for letter in CLASSES}
    return x.reshape([math.prod(sizes[letter]) for letter in CLASSES])
