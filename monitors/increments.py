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
        [matrix * gain[:, :, None] for matrix, gain in zip(of[::2], of[1::2], strict=True)] for of in (now, base)
    )
    change = new - old
    metric: Tensor | None = None
    if inner_new:
        metric = _gram(_met(torch.cat(_change_of_product(inner_new, inner_old, maps[1:]), -1), maps[0]))
        left = torch.cat([new, change], -2)
        right = torch.cat([torch.zeros_like(old), old], -2)
    else:
        left, right = change, old
    squares = [
        (_gram(x) if metric is None else x.mT @ metric @ x).diagonal(dim1=-2, dim2=-1).sum(-1) for x in (left, right)
    ]
    moved, whole = (x.clamp_min(0) for x in squares)
    size = moved.sqrt() / torch.where(whole > 0, whole, torch.ones_like(whole)).sqrt()
    joined = torch.cat([left / _nonzero(size)[..., None, None], right], -1)
    gram = _gram(joined) if metric is None else joined.mT @ metric @ joined
    return Increment(gram, size, moved.sum(-1), whole.sum(-1))


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
    return x if x.shape[1] == 1 else x[:, list(head_map)]


@torch.no_grad()
def statistics(q: Increment, k: Increment, q_map: Sequence[int], k_map: Sequence[int], age: int) -> dict[str, Any]:
    """Norm, stable rank, entropy and effective rank of Delta2, Delta3, dWq and dWk, each float64 ``[L, H]``.

    ``q_map`` and ``k_map`` give each head's group. ``optim/update_ratio`` (``[L, 1]``) is the relative change of both weights a
    step.
    """
    ratio = ((q.moved + k.moved) / (q.whole + k.whole)).sqrt() / max(age, 1)
    gram_q, gram_k = q.gram[:, list(q_map)], k.gram[:, list(k_map)]
    q_size, k_size = q.size[:, list(q_map)], k.size[:, list(k_map)]
    h = gram_q.shape[-1] // 2
    dq_gram, dk_gram = gram_q[..., :h, :h], gram_k[..., :h, :h]
    gram_k = gram_k.roll((h, h), (-2, -1))  # B = [Wk, dWk]

    # Delta2 = size * [dWq / q_size * a, Wq * b] [Wk, dWk / k_size]^T with a = q_size / size, b = k_size / size.
    size = torch.maximum(q_size, k_size)
    a, b = q_size / _nonzero(size), k_size / _nonzero(size)
    weight = torch.cat([a[..., None].expand(*a.shape, h), b[..., None].expand(*b.shape, h)], -1)
    spectra = {
        "delta2": (_squared_singular(gram_q * weight[..., None] * weight[..., None, :], gram_k), size),
        "delta3": (_squared_singular(dq_gram, dk_gram), q_size * k_size),
        "dwq": (_eigenvalues(dq_gram), q_size),
        "dwk": (_eigenvalues(dk_gram), k_size),
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
    finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    gram = torch.where(finite, gram, 0.0)
    mean_diagonal = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root, failed = torch.linalg.cholesky_ex(gram + (CHOLESKY_SHIFT * mean_diagonal) * eye)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(gram[failed > 0])
        root[failed > 0] = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return torch.where(finite, root, torch.nan)


def _eigenvalues(symmetric: Tensor) -> Tensor:
    """Of each matrix, ascending; NaN where one is not finite, for which LAPACK would refuse the whole batch."""
    finite = symmetric.isfinite().all(-1).all(-1)
    values: Tensor = torch.linalg.eigvalsh(torch.where(finite[..., None, None], symmetric, 0.0))
    return torch.where(finite[..., None], values, torch.nan)


def _gram(x: Tensor) -> Tensor:
    return x.mT @ x


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
