"""The spectrum of each head's QK increment, from weights alone (arXiv 2606.28116).

With ``dWq = Wq_t - Wq_base`` and ``dWk`` likewise, per head:

    Delta2 = dWq Wk^T + Wq dWk^T      first order, base-point factors
    Delta3 = dWq dWk^T                second order; Delta2 + Delta3 is the whole change of Wq Wk^T

The ``[hidden, hidden]`` products are never formed. ``Delta2 = A B^T`` with ``A = [dWq, Wq]`` and ``B = [Wk, dWk]``, and the
eigenvalues of ``(A^T A)(B^T B)`` are its squared singular values: one float64 Gram matrix a side, one Cholesky factor and one
symmetric eigensolve, batched over every head of every layer of one shape. Each increment is scaled to its weight's size
first, so that a relative update of 1e-5 loses no digits.

Of a low-rank chain ``W = I O`` (latent attention) the product is not formed either: ``[dW, W] = [dI, I] C`` with
``C = [[O', 0], [dO, O]]``, ``O'`` the matrix now, so that ``C^T [dI, I]^T [dI, I] C`` is its Gram matrix, and no increment is a
difference of products. Gains are kept beside the matrices and multiplied in float64, for the same reason.

Shapes: L layers of one shape, H heads, d hidden, h head dim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreshock.monitors.metrics import STATISTICS
from foreshock.records import Reading, Site, WeightView

CHOLESKY_SHIFT = (
    1e-14  # relative; a Gram matrix of rank below its size (small updates) still factors, and s^2 moves by 1e-14
)
UPDATE_RATIO = "optim/update_ratio"


MOST_NUMBERS = 2**26  # in float64 at a time: layers of one shape are measured together up to half a gigabyte

Side = tuple[
    Tensor, ...
]  # of each stage its matrix [heads, inputs, channels], float32, and its gain [heads, channels], float64


@dataclass(frozen=True, slots=True)
class Factors:
    """One site's weights at one step: the stages of its query and of its key, the one nearest the kernel first."""

    q: Side
    k: Side


class Spectra:
    """Keeps base snapshots of the query and key factors and measures the increment since them.

    ``windows`` are in steps; the first carries the plain metric names, the others a suffix (``@50``). A snapshot is taken, and
    the spectra are read, no oftener than every ``stride`` steps (default: the shortest window), so the memory is
    ``max(windows) / stride + 1`` float32 copies of the query and key weights, a chain's matrices each by itself.
    """

    def __init__(self, windows: Sequence[int] = (10, 50), stride: int | None = None) -> None:
        self.windows = tuple(windows)
        self.stride = min(self.windows) if stride is None else stride
        self._ring: deque[tuple[int, dict[str, Factors]]] = deque()

    def update(self, step: int, sites: Sequence[Site]) -> list[Reading]:
        """Readings of every attention site whose two weights are known, each with one value a query head."""
        if self._ring and step < self._ring[-1][0] + self.stride:
            return []
        views = {site.id: (site.q_weight, site.k_weight) for site in sites if site.q_weight and site.k_weight}
        views = {site: (q, k) for site, (q, k) in views.items() if q.index.shape[1] == k.index.shape[1]}
        now, twins = _snapshot(views)
        readings: list[Reading] = []
        for position, window in enumerate(self.windows):
            base = self._base(step - window)
            if base is None:
                continue
            suffix = "" if position == 0 else f"@{window}"
            for names, values in _by_shape(now, base[1], views, step - base[0]):
                if position:
                    values.pop(UPDATE_RATIO)
                readings += [
                    Reading(metric + suffix, site, rows[row])
                    for metric, rows in values.items()
                    for row, name in enumerate(names)
                    for site in twins[name]
                ]
        self._ring.append((step, now))
        while len(self._ring) > 1 and self._ring[1][0] <= step + self.stride - max(self.windows):
            self._ring.popleft()
        return readings

    def _base(self, newest: int) -> tuple[int, dict[str, Factors]] | None:
        """The newest snapshot no younger than asked."""
        return next((entry for entry in reversed(self._ring) if entry[0] <= newest), None)

    def state_dict(self) -> dict[str, Any]:
        """The snapshot ring, as tensors; a resumed run goes on without a gap."""
        return {"ring": [(step, {name: (f.q, f.k) for name, f in taken.items()}) for step, taken in self._ring]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ring = deque(
            (step, {name: Factors(q, k) for name, (q, k) in taken.items()}) for step, taken in state["ring"]
        )


def _snapshot(views: Mapping[str, tuple[WeightView, WeightView]]) -> tuple[dict[str, Factors], dict[str, list[str]]]:
    """The factors now, one entry for all sites that share both weights, and which sites those are."""
    taken: dict[str, Factors] = {}
    twins: dict[str, list[str]] = {}
    first: dict[tuple[Any, ...], str] = {}
    for site, (q, k) in views.items():
        held = [view.held() for view in (q, k)]
        if None in held:
            continue
        key = (*(id(x) for of in held for x in of or ()), *(view.index.tobytes() for view in (q, k)))
        if key in first:
            twins[first[key]].append(site)
            continue
        first[key] = site
        twins[site] = [site]
        taken[site] = Factors(_side(q), _side(k))
    return taken, twins


def _side(view: WeightView) -> Side:
    """Matrices as they stand, gains apart: in float32 their product would round away small increments."""
    found: list[Tensor] = []
    for matrix, gain in view.matrices():
        ones = torch.ones(matrix.shape[0], matrix.shape[2], dtype=torch.float64, device=matrix.device)
        found += [matrix.to(torch.float32, copy=True).contiguous(), ones if gain is None else gain]
    return tuple(found)


def _by_shape(
    now: Mapping[str, Factors], base: Mapping[str, Factors], views: Mapping[str, Any], age: int
) -> list[tuple[list[str], dict[str, Any]]]:
    """Measure the sites of one shape together: ``[(sites, {metric: float64 [L, H]})]``."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, factors in now.items():
        old = base.get(name)
        shapes = [tuple(x.shape for x in (*taken.q, *taken.k)) for taken in (factors, old) if taken is not None]
        if len(shapes) < 2 or shapes[0] != shapes[1]:
            continue
        q, k = views[name]
        heads = max(len(q.head_map), len(k.head_map))
        inner = tuple(tuple(stage.head_map for stage in view.stages[1:]) for view in (q, k))
        maps = (q.read_by(heads), k.read_by(heads))
        groups.setdefault((shapes[0], *maps, inner, factors.q[0].device), []).append(name)
    measured = []
    for (shapes_, q_map, k_map, (q_inner, k_inner), device), names in groups.items():
        at_once = max(1, MOST_NUMBERS // (2 * sum(shape.numel() for shape in shapes_)))
        for start in range(0, len(names), at_once):
            part = names[start : start + at_once]
            q_now, q_base, k_now, k_base = (
                _stacked([getattr(taken[n], role) for n in part], device)
                for role in ("q", "k")
                for taken in (now, base)
            )
            q_side, k_side = _increment(q_now, q_base, q_inner), _increment(k_now, k_base, k_inner)
            measured.append((part, _statistics(q_side, k_side, q_map, k_map, age)))
    return measured


def _stacked(sides: Sequence[Side], device: torch.device) -> list[Tensor]:
    """The sides of several sites as one, float64."""
    return [torch.stack([x.to(device).double() for x in of]) for of in zip(*sides, strict=True)]


@dataclass(frozen=True, slots=True)
class _Increment:
    """One side of a shape: the Gram matrix of ``[dW / size, W]``, ``[L, groups, 2h, 2h]``; ``size = |dW| / |W|`` a head,
    ``[L, groups]``; and the squared norms of ``dW`` and ``W`` over all heads, ``[L]``."""

    gram: Tensor
    size: Tensor
    moved: Tensor
    whole: Tensor


@torch.no_grad()
def _increment(now: Sequence[Tensor], base: Sequence[Tensor], maps: Sequence[tuple[int, ...]]) -> _Increment:
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
    return _Increment(gram, size, moved.sum(-1), whole.sum(-1))


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
def _statistics(q: _Increment, k: _Increment, q_map: Sequence[int], k_map: Sequence[int], age: int) -> dict[str, Any]:
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
        "dwq": (torch.linalg.eigvalsh(dq_gram), q_size),
        "dwk": (torch.linalg.eigvalsh(dk_gram), k_size),
    }
    values: dict[str, Any] = {UPDATE_RATIO: ratio[:, None].cpu().numpy()}
    for matrix, (squares, scale) in spectra.items():
        for statistic, value in zip(STATISTICS, _summarise(squares, scale), strict=True):
            values[f"attention/{matrix}_{statistic}"] = value.cpu().numpy()
    return values


def _summarise(squares: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From squared singular values ``[L, H, n]`` over a common scale: norm, stable rank, entropy, effective rank ``[L, H]``.

    A zero matrix has norm 0; its ranks and entropy are not available (NaN).
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
    mean_diagonal = gram_a.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(gram_a.shape[-1], dtype=gram_a.dtype, device=gram_a.device)
    root, _ = torch.linalg.cholesky_ex(gram_a + (CHOLESKY_SHIFT * mean_diagonal) * eye)
    squares: Tensor = torch.linalg.eigvalsh(root.mT @ gram_b @ root)
    return squares


def _gram(x: Tensor) -> Tensor:
    return x.mT @ x


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
