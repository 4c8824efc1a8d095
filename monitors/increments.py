"""What moved between two points of a run, from the factors of a head: norms and spectra of the QK increment (arXiv 2606.28116).

With ``dWq = Wq_t - Wq_base`` and ``dWk`` likewise, per head:

    Delta2 = dWq Wk^T + Wq dWk^T      first order, base-point factors
    Delta3 = dWq dWk^T                second order; Delta2 + Delta3 is the whole change of Wq Wk^T

The ``[hidden, hidden]`` products are never formed. ``Delta2 = A B^T`` with ``A = [dWq, Wq]`` and ``B = [Wk, dWk]``, and the
eigenvalues of ``(A^T A)(B^T B)`` are its squared singular values: one float64 Gram matrix a side, one square root and one
symmetric eigensolve, batched over every head of every layer of one shape. Each increment is scaled to its weight's size
first, so that a relative update of 1e-5 loses no digits.

Of a low-rank chain ``W = I O`` (latent attention) the product is not formed either: ``[dW, W] = [dI, I] C`` with
``C = [[O', 0], [dO, O]]``, ``O'`` the matrix now, so that ``C^T [dI, I]^T [dI, I] C`` is its Gram matrix, and no increment is a
difference of products. Gains are kept beside the matrices and multiplied in float64, for the same reason.

A head whose weights are not finite has NaN for every statistic that they enter, and the heads beside it have their numbers.

Shapes: L layers of one shape, H heads, d hidden, h head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreshock.monitors.metrics import STATISTICS

UPDATE_RATIO = "optim/update_ratio"
CHOLESKY_SHIFT = (
    1e-14  # relative; a Gram matrix of rank below its size (small updates) still factors, and s^2 moves by 1e-14
)


@dataclass(frozen=True, slots=True)
class Increment:
    """One side of a shape: the Gram matrix of ``[dW / size, W]``, ``[L, groups, 2h, 2h]``; ``size = |dW| / |W|`` a head,
    ``[L, groups]``; and the squared norms of ``dW`` and ``W`` over all heads, ``[L]``."""

    gram: Tensor
    size: Tensor
    moved: Tensor
    whole: Tensor


@torch.no_grad()
def increment(now: Sequence[Tensor], base: Sequence[Tensor], maps: Sequence[tuple[int, ...]]) -> Increment:
    """From the stages of one side, float64 ``[L, groups, inputs, channels]`` and their gains ``[L, groups, channels]``."""
    (new, *inner_new), (old, *inner_old) = (
        [_scaled(matrix, gain) for matrix, gain in zip(of[::2], of[1::2], strict=True)] for of in (now, base)
    )
    left, right = new - old, old
    met_left, met_right = left, right
    if inner_new:
        metric = _gram(_met(torch.cat(_change_of_product(inner_new, inner_old, maps[1:]), -1), maps[0]))
        left, right = torch.cat([new, left], -2), torch.cat([torch.zeros_like(old), old], -2)
        met_left, met_right = metric @ left, metric @ right
    # The blocks of the Gram matrix, each product once: half of it is the other half's transpose.
    change, across, whole = left.mT @ met_left, left.mT @ met_right, right.mT @ met_right
    moved, held = (x.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0) for x in (change, whole))
    size = moved.sqrt() / _nonzero(held).sqrt()
    unit = _nonzero(size)[..., None, None]
    change, across = change / unit.square(), across / unit
    gram = torch.cat([torch.cat([change, across], -1), torch.cat([across.mT, whole], -1)], -2)
    return Increment(gram, size, moved.sum(-1), held.sum(-1))


def _scaled(matrix: Tensor, gain: Tensor) -> Tensor:
    return matrix if bool((gain == 1).all()) else matrix * gain[:, :, None]


def _change_of_product(
    now: Sequence[Tensor], base: Sequence[Tensor], maps: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Of the product of a chain's matrices, the last one first: how it changed, and what it was."""
    if len(now) == 1:
        return now[0] - base[0], base[0]
    change, whole = (_met(x, maps[0]) for x in _change_of_product(now[1:], base[1:], maps[1:]))
    return change @ now[0] + whole @ (now[0] - base[0]), whole @ base[0]


def _met(x: Tensor, head_map: Sequence[int]) -> Tensor:
    """``x [L, heads, ...]`` for each head that reads it; one for all broadcasts."""
    return x if x.shape[1] == 1 else _by_head(x, head_map)


def _by_head(x: Tensor, head_map: Sequence[int]) -> Tensor:
    """``x [L, groups, ...]`` for each head; a view where heads have groups of their own, or one together."""
    if x.shape[1] == 1:
        return x.expand(x.shape[0], len(head_map), *x.shape[2:])
    return x if tuple(head_map) == tuple(range(x.shape[1])) else x[:, list(head_map)]


@torch.no_grad()
def statistics(q: Increment, k: Increment, q_map: Sequence[int], k_map: Sequence[int], age: int) -> dict[str, Any]:
    """Norm, stable rank, entropy and effective rank of Delta2, Delta3, dWq and dWk, each float64 ``[L, H]``.

    ``q_map`` and ``k_map`` give each head's group. ``optim/update_ratio`` (``[L, 1]``) is the relative change of both weights a
    step.
    """
    ratio = ((q.moved + k.moved) / (q.whole + k.whole)).sqrt() / max(age, 1)
    h = q.gram.shape[-1] // 2
    gram_q, q_size = (_by_head(x, q_map) for x in (q.gram, q.size))
    gram_k, k_size = (_by_head(x, k_map) for x in (k.gram, k.size))
    dq_gram, dk_gram = gram_q[..., :h, :h], gram_k[..., :h, :h]

    # Delta2 = size * [dWq / q_size * a, Wq * b] [Wk, dWk / k_size]^T with a = q_size / size, b = k_size / size.
    size = torch.maximum(q_size, k_size)
    a, b = q_size / _nonzero(size), k_size / _nonzero(size)
    weight = torch.cat([a[..., None].expand(*a.shape, h), b[..., None].expand(*b.shape, h)], -1)
    weighted = (gram_q * weight[..., None]).mul_(weight[..., None, :])
    # What a weight alone is asked is asked once for all heads that read it.
    own_q, own_k = (_eigenvalues(side.gram[..., :h, :h]) for side in (q, k))
    spectra = {
        "delta2": (_squared_singular(weighted, gram_k.roll((h, h), (-2, -1))), size),  # B = [Wk, dWk]
        "delta3": (_squared_singular(dq_gram, dk_gram), q_size * k_size),
        "dwq": (_by_head(own_q, q_map), q_size),
        "dwk": (_by_head(own_k, k_map), k_size),
    }
    values: dict[str, Any] = {UPDATE_RATIO: ratio[:, None].cpu().numpy()}
    for matrix, (squares, scale) in spectra.items():
        for statistic, value in zip(STATISTICS, _summarise(squares, scale), strict=True):
            values[f"attention/{matrix}_{statistic}"] = value.cpu().numpy()
    return values


def _summarise(squares: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From squared singular values ``[L, H, n]`` over a common scale: norm, stable rank, entropy, effective rank ``[L, H]``.

    A zero matrix has norm 0; its ranks and entropy are not available (NaN), nor is anything of a matrix that is not finite.
    """
    squares = squares.clamp_min(0)
    total, top = squares.sum(-1), squares.amax(-1)
    p = squares / total[..., None]
    entropy = torch.special.entr(p).sum(-1)
    absent = (total * scale.square()) == 0
    stable, entropy, effective = (x.masked_fill(absent, torch.nan) for x in (total / top, entropy, entropy.exp()))
    return total.sqrt() * scale, stable, entropy, effective


def _squared_singular(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """Squared singular values of ``A B^T`` from ``A^T A`` and ``B^T B``."""
    root = _root(gram_a)
    return _eigenvalues(root.mT @ gram_b @ root)


def _root(gram: Tensor) -> Tensor:
    """``R`` with ``R R^T = gram``: Cholesky's factor, or that of the eigenvectors where rounding left a negative pivot.

    A matrix that is not finite has NaN, a zero one zero.
    """
    finite = _finite(gram)
    gram = torch.where(finite, gram, 0.0)
    mean_diagonal = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(CHOLESKY_SHIFT * mean_diagonal)
    root, failed = torch.linalg.cholesky_ex(shifted)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(gram[failed > 0])
        root[failed > 0] = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return torch.where(finite, root, torch.nan)


def _eigenvalues(symmetric: Tensor) -> Tensor:
    """Of each matrix, ascending; NaN where one is not finite, for which LAPACK would refuse the whole batch."""
    finite = _finite(symmetric)
    values: Tensor = torch.linalg.eigvalsh(torch.where(finite, symmetric, 0.0))
    return torch.where(finite[..., 0], values, torch.nan)


def _finite(x: Tensor) -> Tensor:
    """``[..., 1, 1]``: whether a matrix is; one entry that is not makes the sum so."""
    return x.sum((-2, -1), keepdim=True).isfinite()


def _gram(x: Tensor) -> Tensor:
    return x.mT @ x


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
