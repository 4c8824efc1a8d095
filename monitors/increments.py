"""What moved between two points of a run, from the factors of a head: norms and spectra of the QK increment (arXiv 2606.28116).

With ``dWq = Wq_t - Wq_base`` and ``dWk`` likewise, per head:

    Delta2 = dWq Wk^T + Wq dWk^T      first order, base-point factors
    Delta3 = dWq dWk^T                second order; Delta2 + Delta3 is the whole change of Wq Wk^T

The ``[hidden, hidden]`` products are never formed. ``Delta2 = A B^T`` with ``A = [dWq, Wq]`` and ``B = [Wk, dWk]``, and the
eigenvalues of ``(A^T A)(B^T B)`` are its squared singular values: one Gram matrix a side, one square root and one symmetric
eigensolve, batched over every head of every layer of one shape. Weights and increments are scaled to norm 1 first, so that a
relative update of 1e-5 loses no digits.

Weights of float32 and below are measured in float32: their differences are exact or rounded once, so that they are right to
seven digits however small. Where a sum is much less than its terms that is not enough; `statistics` says where, and the caller
asks again in float64.

Of a low-rank chain ``W = I O`` (latent attention) the product is not formed either: ``[dW, W] = [dI, I] C`` with
``C = [[O', 0], [dO, O]]``, ``O'`` the matrix now, so that ``C^T [dI, I]^T [dI, I] C`` is its Gram matrix, and no increment is a
difference of products. Gains are kept beside the matrices in float64, and their difference is taken there, for the same reason.

A head whose weights are not finite has NaN for every statistic that they enter, and the heads beside it have their numbers.

Shapes: L layers of one shape, H heads, d hidden, h head dim, r latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foreshock.monitors.metrics import STATISTICS
from foreshock.records import Array

UPDATE_RATIO = "optim/update_ratio"
MATRICES = ("delta2", "delta3", "dwq", "dwk")
PEAKS = ("attention/dwq_peak", "attention/dwk_peak")
# Relative; a Gram matrix of rank below its size (small updates) still factors, and s^2 moves by as much.
CHOLESKY_SHIFT = {torch.float32: 2e-6, torch.float64: 1e-14}
# Of each stage ``[L, groups, inputs, channels]`` in the dtype to measure in, and its gains, float64 ``[L, groups, channels]``.
Stages = Sequence[tuple[Tensor, Tensor | None]]
CANCELLED = 300.0  # a float32 sum of squares this far below its terms is asked again; errors stay below 2e-4


@dataclass(frozen=True, slots=True)
class Increment:
    """One side of a shape: the Gram matrix of ``[dW / |dW|, W / |W|]``, ``[L, groups, 2h, 2h]``, 0 where it is not finite;
    ``size = |dW| / |W|`` a head, ``[L, groups]``, NaN there; ``norm = |W|``, float64 ``[L, groups]``, 1 for 0; the squared norms
    of ``dW`` and ``W`` over all heads, ``[L]``; how far that of a head's ``dW`` is below its terms', ``[L, groups]``; and the
    largest entry of ``dW``, of a chain's last matrix, over its norm, ``[L, groups]``, NaN where it is not finite."""

    gram: Tensor
    size: Tensor
    norm: Tensor
    moved: Tensor
    whole: Tensor
    cancelled: Tensor
    peak: Tensor


def precision(dtypes: Iterable[torch.dtype], stages: int) -> torch.dtype:
    """In which weights of these dtypes are measured, chains of ``stages`` matrices at most.

    Of longer chains it is not known what cancels within the inner ones, and products in float32 must not be cut to TF32.
    """
    try:
        whole = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set for some backend only
        whole = False
    return torch.float32 if whole and stages <= 2 and torch.float64 not in dtypes else torch.float64


@torch.no_grad()
def increment(now: Stages, base: Stages, maps: Sequence[tuple[int, ...]]) -> Increment:
    """From the stages of one side."""
    (left, right), *inner = (_change(*of, *before) for of, before in zip(now, base, strict=True))
    peak = torch.maximum(left.amax((-2, -1)), -left.amin((-2, -1)))  # a norm of order inf is a loop over scalars on CPU
    # The blocks of the Gram matrix, each product once: half of it is the other half's transpose.
    if inner:
        peak = peak / _nonzero(torch.linalg.vector_norm(left, dim=(-2, -1)))
        metric, r = _gram(_met(torch.cat(_change_of_product(inner, maps[1:]), -1), maps[0])), right.shape[-2]
        after = left + right
        by_inner, by_outer, met = metric[..., :r] @ after, metric[..., r:] @ left, metric[..., r:] @ right
        terms = (after * by_inner[..., :r, :]).sum((-2, -1)) + (left * by_outer[..., r:, :]).sum((-2, -1))
        left = torch.cat([after, left], -2)
        change, across, whole = left.mT @ (by_inner + by_outer), left.mT @ met, right.mT @ met[..., r:, :]
    else:
        change, across, whole = _gram(left), left.mT @ right, _gram(right)
        terms = _trace(change)
        peak = peak / _nonzero(terms.clamp_min(0)).sqrt()
    moved, held = _trace(change).clamp_min(0), _trace(whole).clamp_min(0)
    shift, norm = _nonzero(moved).sqrt()[..., None, None], _nonzero(held).sqrt()[..., None, None]
    size = moved.sqrt() / norm[..., 0, 0]
    change, across, whole = change / shift / shift, across / shift / norm, whole / norm / norm
    gram = torch.cat([torch.cat([change, across], -1), torch.cat([across.mT, whole], -1)], -2)
    broken = ~(moved + held).isfinite()  # no entry off the diagonal is larger
    gram, size, peak = (
        gram.masked_fill_(broken[..., None, None], 0),
        *(x.masked_fill(broken, torch.nan) for x in (size, peak)),
    )
    totals = moved.double().sum(-1), held.double().sum(-1)
    return Increment(gram, size, norm[..., 0, 0].double(), *totals, terms / _nonzero(moved), peak)


def _change(now: Tensor, gain: Tensor | None, base: Tensor, gain_before: Tensor | None) -> tuple[Tensor, Tensor]:
    """How one stage's matrix times its gain changed, and what it was."""
    if gain is None or gain_before is None:
        return now - base, base
    gain, grown, before = (x.to(now.dtype)[:, :, None] for x in (gain, gain - gain_before, gain_before))
    return (now - base) * gain + base * grown, base * before


def _change_of_product(
    stages: Sequence[tuple[Tensor, Tensor]], maps: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Of the product of a chain's matrices, the last one first, each as `_change` gives it: the same."""
    (left, right), *inner = stages
    if not inner:
        return left, right
    change, whole = (_met(x, maps[0]) for x in _change_of_product(inner, maps[1:]))
    return change @ (left + right) + whole @ left, whole @ right


def _met(x: Tensor, head_map: Sequence[int]) -> Tensor:
    """``x [L, heads, ...]`` for each head that reads it; one for all broadcasts."""
    return x if x.shape[1] == 1 else _by_head(x, head_map)


def _by_head(x: Tensor, head_map: Sequence[int]) -> Tensor:
    """``x [L, groups, ...]`` for each head; a view where heads have groups of their own, or one together."""
    if x.shape[1] == 1:
        return x.expand(x.shape[0], len(head_map), *x.shape[2:])
    if tuple(head_map) == tuple(range(x.shape[1])):
        return x
    heads = x.unbind(1)  # a list of places would be copied to the device, and waited for
    return torch.stack([heads[head] for head in head_map], 1)


@torch.no_grad()
def statistics(
    q: Increment, k: Increment, q_map: Sequence[int], k_map: Sequence[int], age: int
) -> tuple[dict[str, Array], Array]:
    """Norm, stable rank, entropy and effective rank of Delta2, Delta3, dWq and dWk, and the peaks of the latter two, each float64
    ``[L, H]``.

    ``q_map`` and ``k_map`` give each head's group. ``optim/update_ratio`` (``[L, 1]``) is the relative change of both weights a
    step. And of which heads all this is as exact as the dtype is, bool ``[L, H]``: of the others, so much cancels, or rounding
    left so little of a square root, that float32 has too few digits.
    """
    h = q.gram.shape[-1] // 2
    root, factored = _root(q.gram)
    root, factored, q_size = (_by_head(x, q_map) for x in (root, factored, q.size))
    gram_k, k_size = (_by_head(x, k_map) for x in (k.gram, k.size))

    # With weights of norm 1, Delta2 = size * [dWq / q_size * a, Wq * b] [Wk, dWk / k_size]^T, a = q_size / size, b = k_size / size.
    size = torch.maximum(q_size, k_size)
    weight = torch.stack([q_size, k_size], -1) / _nonzero(size)[..., None]
    weight = weight.nan_to_num(0)[..., None].expand(*size.shape, 2, h).flatten(-2)
    meets = (root * weight[..., None]).roll(h, -2)  # [Wq, dWq], as it meets [dWk, Wk]
    of_dq = root[..., :h, :h]
    delta2, delta3 = meets.mT @ gram_k @ meets, of_dq.mT @ gram_k[..., :h, :h] @ of_dq
    # What a weight alone is asked is asked once for all heads that read it.
    small = [x.flatten(0, 1) for x in (delta3, q.gram[..., :h, :h], k.gram[..., :h, :h])]
    solved = torch.linalg.eigvalsh(torch.cat(small)).split([len(x) for x in small])
    both, own_q, own_k = (torch.nn.functional.pad(x, (h, 0)).unflatten(0, (len(size), -1)) for x in solved)
    squares = [torch.linalg.eigvalsh(delta2), both, _by_head(own_q, q_map), _by_head(own_k, k_map)]
    q_norm, k_norm = _by_head(q.norm, q_map), _by_head(k.norm, k_map)
    scales = [size * q_norm * k_norm, q_size * q_norm * (k_size * k_norm), q_size * q_norm, k_size * k_norm]
    told = _summarise(torch.stack(squares).double(), torch.stack(scales))
    # Heads whose products are far below what their factors could make: the Gram matrices' rounding is relative to that.
    entries, on = _by_head(q.gram.square(), q_map), weight.square()[..., None]
    terms2 = (on.mT @ entries @ on)[..., 0, 0].sqrt() * _size(gram_k)
    terms3 = entries[..., :h, :h].sum((-2, -1)).sqrt() * _size(gram_k[..., :h, :h])
    sure = factored & (_trace(delta2) * CANCELLED >= terms2) & (_trace(delta3) * CANCELLED >= terms3)
    for side, heads in ((q, q_map), (k, k_map)):
        sure = sure & (_by_head(side.cancelled, heads) <= CANCELLED)
    ratio = ((q.moved + k.moved) / (q.whole + k.whole)).sqrt()[:, None].expand(size.shape) / max(age, 1)
    rest = torch.stack([_by_head(q.peak, q_map), _by_head(k.peak, k_map), ratio, sure])
    rows = torch.cat([told.flatten(0, 1), rest.double()]).cpu().numpy()  # one copy to the host
    names = [*(f"attention/{matrix}_{statistic}" for statistic in STATISTICS for matrix in MATRICES), *PEAKS]
    return dict(zip(names, rows[:-2], strict=True)) | {UPDATE_RATIO: rows[-2, :, :1]}, rows[-1] > 0


def _summarise(squares: Tensor, scale: Tensor) -> Tensor:
    """From squared singular values ``[..., n]`` over a common scale: norm, stable rank, entropy, effective rank ``[4, ...]``.

    A zero matrix has norm 0; its ranks and entropy are not available (NaN), nor is anything of a matrix that is not finite.
    """
    squares = squares.clamp_min(0)
    total, top = squares.sum(-1), squares.amax(-1)
    entropy = torch.special.entr(squares / total[..., None]).sum(-1)
    present = total * scale.square() > 0
    ranks = torch.stack([total / top, entropy, entropy.exp()]).masked_fill(~present, torch.nan)
    return torch.cat([(total.sqrt() * scale)[None], ranks])


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Lower triangular ``R`` with ``R R^T = gram``, ``[..., n, n]``, and whether it is exact, ``[...]``.

    Cholesky's factor is wrong without a word where rounding left a negative pivot. There the root is 0 in float32, and in float64
    that of the eigenvectors. That of zero is zero.
    """
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(CHOLESKY_SHIFT[gram.dtype] * mean[..., None])
    root, failed = torch.linalg.cholesky_ex(shifted)
    exact = (failed == 0) | (mean == 0)
    if gram.dtype == torch.float64 and not bool(exact.all()):
        values, vectors = torch.linalg.eigh(gram[~exact])
        found = vectors * values.clamp_min(0).sqrt()[..., None, :]
        root[~exact] = torch.linalg.qr(found.mT, mode="r")[1].mT
        exact = torch.ones_like(exact)
    return root.masked_fill_(~(exact & (mean > 0))[..., None, None], 0), exact


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def _gram(x: Tensor) -> Tensor:
    return x.mT @ x


def _size(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1)).sqrt()


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
