"""Every statistic of an increment against a dense float64 SVD, whatever the layout of the weights and the size of the update."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from projections import LAYOUTS, Projection, latent, separate
from torch import Tensor

from foreshock.monitors import Spectra
from foreshock.monitors.increments import UPDATE_RATIO, _root
from foreshock.monitors.metrics import STATISTICS
from foreshock.records import Array

MATRICES = ("delta2", "delta3", "dwq", "dwk")
SIZES = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]


def dense_statistics(matrix: Tensor) -> list[float]:
    squares = torch.linalg.svdvals(matrix).square()
    entropy = torch.special.entr(squares / squares.sum()).sum()
    return [float(x) for x in (squares.sum().sqrt(), squares.sum() / squares.max(), entropy, entropy.exp())]


def increments(base: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The four matrices, ``[H, ...]``, formed in full."""
    (wq, wk), (dq, dk) = base, (after - before for before, after in zip(base, now, strict=True))
    return {"delta2": dq @ wk.mT + wq @ dk.mT, "delta3": dq @ dk.mT, "dwq": dq, "dwk": dk}


def expected(projection: Projection, base: tuple[Tensor, Tensor]) -> dict[str, Array]:
    found = increments(base, projection.factors())
    return {name: np.array([dense_statistics(matrix) for matrix in of]) for name, of in found.items()}


def measured(spectra: Spectra, projection: Projection, step: int) -> dict[str, Array]:
    found = {r.metric: r.values for r in spectra.update(step, [projection.site])}
    return {name: np.stack([found[f"attention/{name}_{s}"] for s in STATISTICS], -1) for name in MATRICES} | {
        UPDATE_RATIO: found[UPDATE_RATIO]
    }


def move(parameters: list[Tensor], size: float, seed: int) -> None:
    """A full update beside one direction that is much stronger; every second tensor moves far less."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for place, p in enumerate(parameters):
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 2:
                left, right = (torch.randn(n, generator=generator) for n in p.shape)
                noise = noise + 3 * torch.outer(left, right)
            p += size * (0.03 if place % 2 else 1.0) * p.norm() * noise / noise.norm()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_statistic_agrees_with_a_dense_svd(layout: str, size: float) -> None:
    projection, spectra = LAYOUTS[layout](), Spectra(windows=(10,))
    spectra.update(0, [projection.site])
    base = projection.factors()
    move(projection.parameters, size, seed=6)
    found, wanted = measured(spectra, projection, 10), expected(projection, base)
    for name in MATRICES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-8, err_msg=name)


def test_the_update_ratio_is_that_of_both_weights_a_step() -> None:
    projection, spectra = separate(), Spectra(windows=(10,))
    spectra.update(0, [projection.site])
    base = torch.cat([p.detach().double() for p in projection.parameters])
    move(projection.parameters, 1e-2, seed=6)
    moved = torch.cat([p.detach().double() for p in projection.parameters]) - base
    assert measured(spectra, projection, 10)[UPDATE_RATIO] == pytest.approx([float(moved.norm() / base.norm()) / 10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [separate, latent])
def test_weight_decay_alone_moves_along_the_weights(make, dtype: torch.dtype) -> None:
    """``dW = -c W`` makes ``[dW, W]`` half of full rank, and a Cholesky factor of its Gram matrix may fail."""
    projection, spectra = make(), Spectra(windows=(10,))
    for p in projection.parameters:
        p.data = p.data.to(dtype)
    spectra.update(0, [projection.site])
    base = projection.factors()
    with torch.no_grad():
        for p in projection.parameters:
            p *= 1 - 1e-3
    found, wanted = measured(spectra, projection, 10), expected(projection, base)
    for name in MATRICES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)


def test_a_gram_matrix_with_a_negative_pivot_is_factored_as_what_it_rounds() -> None:
    """Cholesky's factor of such a matrix is wrong without a word."""
    generator = torch.Generator().manual_seed(8)
    thin = torch.randn(16, 3, dtype=torch.float64, generator=generator)
    gram = torch.stack(
        [thin @ thin.mT - 1e-12 * torch.eye(16), torch.eye(16, dtype=torch.float64), torch.zeros(16, 16)]
    )
    assert torch.linalg.cholesky_ex(gram[0])[1] > 0
    root = _root(gram)
    torch.testing.assert_close(root @ root.mT, gram, rtol=0, atol=1e-10)


def test_what_cancels_in_the_circuit_is_gone_to_seven_digits() -> None:
    """Queries that grow as keys shrink leave the product alone in first order."""
    projection, spectra = separate(), Spectra(windows=(10,))
    for p in projection.parameters:
        p.data = p.data.double()
    spectra.update(0, [projection.site])
    with torch.no_grad():
        for p, sign in zip(projection.parameters, (1, -1), strict=True):
            p *= 1 + sign * 1e-3
    found = measured(spectra, projection, 10)
    wq, wk = projection.factors()
    assert (found["delta2"][:, 0] < 1e-6 * 1e-3 * (wq @ wk.mT).norm(dim=(1, 2)).numpy()).all()


def test_a_weight_that_did_not_move_has_norm_zero_and_no_rank() -> None:
    projection, spectra = separate(), Spectra(windows=(10,))
    spectra.update(0, [projection.site])
    found = measured(spectra, projection, 10)
    for name in MATRICES:
        assert (found[name][:, 0] == 0).all()
        assert np.isnan(found[name][:, 1:]).all()
    assert found[UPDATE_RATIO] == [0]


def test_keys_that_did_not_move_leave_the_queries_their_numbers() -> None:
    projection, spectra = separate(groups=2), Spectra(windows=(10,))
    spectra.update(0, [projection.site])
    base = projection.factors()
    move(projection.parameters[:1], 1e-3, seed=7)
    found, (wq, wk) = measured(spectra, projection, 10), base
    matrices = increments((wq, wk), projection.factors())
    for name in ("delta2", "dwq"):
        wanted = [dense_statistics(matrix) for matrix in matrices[name]]
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5)
    for name in ("delta3", "dwk"):
        assert (found[name][:, 0] == 0).all()
        assert np.isnan(found[name][:, 1:]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("late", [True, False], ids=["appears", "was there"])
def test_a_head_that_is_not_finite_is_nan_and_the_others_have_their_numbers(value: float, late: bool) -> None:
    """One bad head would make LAPACK refuse the batch of all heads of all layers."""
    broken, beside = separate("broken"), separate("beside", seed=8)
    sites, spectra = [broken.site, beside.site], Spectra(windows=(1,))
    base, corner = broken.factors(), broken.parameters[1].data[0, :1]  # of the first key head
    before = corner.clone()
    corner.fill_(before.item() if late else value)
    spectra.update(0, sites)
    corner.copy_(before)
    move([*broken.parameters, *beside.parameters], 1e-3, seed=9)
    corner.fill_(value)
    found = {(r.site, r.metric): r.values for r in spectra.update(1, sites)}
    wanted = increments(tuple(x[1:] for x in base), tuple(x[1:] for x in broken.factors()))
    for name in MATRICES:
        of_broken = np.stack([found["broken", f"attention/{name}_{s}"] for s in STATISTICS], -1)
        assert np.isfinite(of_broken[0]).all() == (name == "dwq")
        np.testing.assert_allclose(of_broken[1:], [dense_statistics(m) for m in wanted[name]], rtol=1e-5)
        assert all(np.isfinite(found["beside", f"attention/{name}_{s}"]).all() for s in STATISTICS)
    assert not np.isfinite(found["broken", UPDATE_RATIO]).any()
