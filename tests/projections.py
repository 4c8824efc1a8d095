"""Query and key weights in the layouts that models keep them in, each with its dense float64 factors cut out independently.

Shapes: H query heads, G key heads, d hidden, h head dim, r latent.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from foreshock.records import Site, Stage, WeightView

Dense = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]  # parameters -> Wq, Wk, each float64 [H, d, h]


@dataclass(frozen=True, eq=False)
class Projection:
    """Live parameters, the site that reads them, and how to cut its factors out by hand."""

    parameters: list[Parameter]
    site: Site
    dense: Dense

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.dense([p.detach().to(torch.float64, copy=True) for p in self.parameters])


def attention(name: str, q: WeightView, k: WeightView) -> Site:
    heads = len(q.head_map)
    return Site(name, name, "attention", "test", heads=heads, kv_heads=k.heads, q_weight=q, k_weight=k)


def view(parameters: Sequence[Tensor], *stages: Stage) -> WeightView:
    return WeightView(tuple(f"w{i}" for i in range(len(parameters))), stages, tuple(weakref.ref(p) for p in parameters))


def rows(start: int, heads: int, head_dim: int, step: int | None = None) -> Any:
    """``[heads, head dim]`` positions, each head ``step`` (default: the head dim) after the one before."""
    return start + (step or head_dim) * np.arange(heads)[:, None] + np.arange(head_dim)


def read(groups: int, heads: int) -> tuple[int, ...]:
    return tuple(head * groups // heads for head in range(heads))


def random(*shapes: tuple[int, ...], seed: int) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5) for shape in shapes]


def separate(name: str = "a", *, heads: int = 4, groups: int = 4, d: int = 48, h: int = 8, seed: int = 1) -> Projection:
    """``q [H * h, d]`` and ``k [G * h, d]``, as `nn.Linear` keeps them."""
    q, k = random((heads * h, d), (groups * h, d), seed=seed)
    q_view = view([q], Stage(rows(0, heads, h), (0,), read(heads, heads)))
    k_view = view([k], Stage(rows(0, groups, h), (0,), read(groups, heads)))

    def dense(of: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        wq, wk = (w.unflatten(0, (-1, h)).mT for w in of)
        return wq, wk.repeat_interleave(heads // groups, 0)

    return Projection([q, k], attention(name, q_view, k_view), dense)


def fused(
    *, transposed: bool = False, interleaved: bool = False, d: int = 48, h: int = 8, heads: int = 4
) -> Projection:
    """One weight for q, k and v: ``[3 * H * h, d]``, the transposed ``[d, 3 * H * h]``, or ``[H * 3 * h, d]`` by heads."""
    (weight,) = random((d, 3 * heads * h) if transposed else (3 * heads * h, d), seed=2)
    step, next_ = (3 * h, h) if interleaved else (h, heads * h)
    views = (
        view([weight], Stage(rows(at, heads, h, step), (int(transposed),), read(heads, heads))) for at in (0, next_)
    )

    def dense(of: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        whole = of[0].T if transposed else of[0]
        parts = whole.view(heads, 3, h, d).unbind(1) if interleaved else whole.view(3, heads, h, d).unbind(0)
        return parts[0].mT, parts[1].mT

    return Projection([weight], attention("fused", *views), dense)


def normed(*, offset: float = 0.0, heads: int = 4, groups: int = 2, d: int = 48, h: int = 8) -> Projection:
    """Separate weights, with the gain of a norm over each head's channels: ``W * (gain + offset)``."""
    plain = separate(heads=heads, groups=groups, d=d, h=h, seed=3)
    gains = [Parameter(x + (1 - offset)) for x in random((h,), (h,), seed=4)]
    positions = [np.tile(np.arange(h), (of, 1)) for of in (heads, groups)]
    views = []
    for weight, gain, at, known in zip(
        plain.parameters, gains, positions, (plain.site.q_weight, plain.site.k_weight), strict=True
    ):
        stage = Stage(known.index, (0,), known.head_map, gains=((at, offset),))
        views.append(view([weight, gain], stage))

    def dense(of: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        wq, wk = plain.dense(of[:2])
        return wq * (of[2] + offset), wk * (of[3] + offset)

    return Projection([*plain.parameters, *gains], attention("normed", *views), dense)


def latent(*, heads: int = 4, d: int = 48, h: int = 8, r: int = 12) -> Projection:
    """Low-rank chains, ``outer [H * h, r]`` behind ``(1 + gain [r]) * inner [r, d]``, on either side."""
    parameters = random(*((heads * h, r), (r,), (r, d)) * 2, seed=5)

    def chain(outer: Tensor, gain: Tensor, inner: Tensor) -> WeightView:
        within = Stage(np.arange(r)[None], (0,), (0,), gains=((np.arange(r)[None], 1.0),))
        return view([outer, inner, gain], Stage(rows(0, heads, h), (0,), read(heads, heads)), within)

    def product(outer: Tensor, gain: Tensor, inner: Tensor) -> Tensor:
        return (outer.view(heads, h, r) @ ((1 + gain[:, None]) * inner)).mT

    site = attention("latent", chain(*parameters[:3]), chain(*parameters[3:]))
    return Projection(parameters, site, lambda of: (product(*of[:3]), product(*of[3:])))


LAYOUTS: dict[str, Callable[[], Projection]] = {
    "heads of their own": separate,
    "grouped keys": lambda: separate(groups=2),
    "wide heads": lambda: separate(heads=2, groups=1, d=256, h=64),
    "one key head": lambda: separate(groups=1),
    "one head": lambda: separate(heads=1, groups=1),
    "heads wider than the model": lambda: separate(heads=2, groups=2, d=16, h=40),
    "fused": fused,
    "fused by heads": lambda: fused(interleaved=True),
    "transposed": lambda: fused(transposed=True),
    "norm gains": normed,
    "norm gains with one added": lambda: normed(offset=1.0),
    "latent chains": latent,
}
