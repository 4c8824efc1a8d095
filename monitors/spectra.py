"""The spectrum of each head's QK increment, from weights alone (arXiv 2606.28116).

With ``dWq = Wq_t - Wq_base`` and ``dWk`` likewise, per head:

    Delta2 = dWq Wk^T + Wq dWk^T      first order, base-point factors
    Delta3 = dWq dWk^T                second order; Delta2 + Delta3 is the whole change of Wq Wk^T

The ``[hidden, hidden]`` products are never formed. ``Delta2 = A B^T`` with ``A = [dWq, Wq]`` and ``B = [Wk, dWk]``, and the
eigenvalues of ``(A^T A)(B^T B)`` are its squared singular values: one float64 Gram matrix a side, one Cholesky factor and one
symmetric eigensolve, batched over every head of every layer of one shape. Each increment is scaled to its weight's size
first, so that a relative update of 1e-5 loses no digits.

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


@dataclass(frozen=True, slots=True)
class Factors:
    """One site's weights at one step, float32: ``q [q groups, d, h]``, ``k [k groups, d, h]``."""

    q: Tensor
    k: Tensor


class Spectra:
    """Keeps base snapshots of the query and key factors and measures the increment since them.

    ``windows`` are in steps; the first carries the plain metric names, the others a suffix (``@50``). A snapshot is taken, and
    the spectra are read, no oftener than every ``stride`` steps (default: the shortest window), so the memory is
    ``max(windows) / stride + 1`` float32 copies of the query and key weights.
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
        if q.resolve() is None or k.resolve() is None:
            continue
        key = tuple((id(view.resolve()), view.axis, view.index.tobytes()) for view in (q, k))
        if key in first:
            twins[first[key]].append(site)
            continue
        first[key] = site
        twins[site] = [site]
        taken[site] = Factors(q.factors().float().contiguous(), k.factors().float().contiguous())
    return taken, twins


def _by_shape(
    now: Mapping[str, Factors], base: Mapping[str, Factors], views: Mapping[str, Any], age: int
) -> list[tuple[list[str], dict[str, Any]]]:
    """Measure the sites of one shape together: ``[(sites, {metric: float64 [L, H]})]``."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, factors in now.items():
        old = base.get(name)
        if old is None or old.q.shape != factors.q.shape or old.k.shape != factors.k.shape:
            continue
        q, k = views[name]
        heads = max(len(q.head_map), len(k.head_map))
        maps = (q.read_by(heads), k.read_by(heads))
        groups.setdefault((factors.q.shape, factors.k.shape, *maps, factors.q.device), []).append(name)
    measured = []
    for key, names in groups.items():
        q_now, q_base, k_now, k_base = (
            torch.stack([getattr(taken[name], role).to(key[-1]) for name in names]).double()
            for role in ("q", "k")
            for taken in (now, base)
        )
        measured.append((names, increment_statistics(q_now, q_base, k_now, k_base, key[2], key[3], age)))
    return measured


@torch.no_grad()
def increment_statistics(
    q_now: Tensor,
    q_base: Tensor,
    k_now: Tensor,
    k_base: Tensor,
    q_map: Sequence[int],
    k_map: Sequence[int],
    age: int = 1,
) -> dict[str, Any]:
    """Norm, stable rank, entropy and effective rank of Delta2, Delta3, dWq and dWk, each float64 ``[L, H]``.

    Inputs are float64 ``[L, groups, d, h]``; ``q_map`` and ``k_map`` give each head's group. ``optim/update_ratio`` (``[L, 1]``)
    is the relative change of both weights a step.
    """
    dq, dk = q_now - q_base, k_now - k_base
    ratio = ((_square(dq) + _square(dk)) / (_square(q_base) + _square(k_base))).sqrt() / max(age, 1)
    q_size, k_size = _relative_size(dq, q_base), _relative_size(dk, k_base)
    gram_q = _gram(torch.cat([dq / _nonzero(q_size), q_base], -1))[:, list(q_map)]
    gram_k = _gram(torch.cat([k_base, dk / _nonzero(k_size)], -1))[:, list(k_map)]
    q_size, k_size = q_size[:, list(q_map), 0, 0], k_size[:, list(k_map), 0, 0]
    h = dq.shape[-1]
    dq_gram, dk_gram = gram_q[..., :h, :h], gram_k[..., h:, h:]

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
    values: dict[str, Any] = {UPDATE_RATIO: ratio.flatten(1).cpu().numpy()}
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


def _square(x: Tensor) -> Tensor:
    return x.square().sum((-3, -2, -1), keepdim=True)[..., 0]


def _relative_size(change: Tensor, base: Tensor) -> Tensor:
    """``|change| / |base|`` a head, ``[L, groups, 1, 1]``; the change's own size where the base is zero."""
    size = base.square().sum((-2, -1), keepdim=True).sqrt()
    return change.square().sum((-2, -1), keepdim=True).sqrt() / torch.where(size > 0, size, torch.ones_like(size))


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
