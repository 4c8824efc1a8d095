"""Every statistic of an increment against a dense float64 SVD, whatever the layout of the weights and the size of the update."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from projections import LAYOUTS, Projection, latent, separate
from torch import Tensor

from foreshock.monitors import Spectra
from foreshock.monitors.increments import PEAKS, UPDATE_RATIO, _root
from foreshock.monitors.metrics import STATISTICS
from foreshock.records import Array

MATRICES = ("delta2", "delta3", "dwq", "dwk")
SIZES = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
# Relative, of every statistic; float32 by its own rounding alone, and where much cancels (measured: 3e-5 and 2e-4).
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-4}
CANCELLING = 1e-3


def dense_statistics(matrix: Tensor) -> list[float]:
    squares = torch.linalg.svdvals(matrix).square()
    entropy = torch.special.entr(squares / squares.sum()).sum()
    return [float(x) for x in (squares.sum().sqrt(), squares.sum() / squares.max(), entropy, entropy.exp())]


def increments(base: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The four matrices, ``[H, ...]``, formed in full."""
    (wq, wk), (dq, dk) = base, (after - before for before, after in zip(base, now, strict=True))
    return {"delta2": dq @ wk.mT + wq @ dk.mT, "delta3": dq @ dk.mT, "dwq": dq, "dwk": dk}


def cast(projection: Projection, dtype: torch.dtype) -> Projection:
    for p in projection.parameters:
        p.data = p.data.to(dtype)
    return projection


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
            p += (size * (0.03 if place % 2 else 1.0) * p.double().norm() * noise / noise.norm()).to(p.dtype)


def move_along_one(parameters: list[Tensor], size: float) -> None:
    """Updates of rank one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (p for p in parameters if p.dim() == 2):
            one = torch.outer(*(torch.randn(n, generator=generator, dtype=torch.float64) for n in p.shape))
            p += (size * p.double().norm() * one / one.norm()).to(p.dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_statistic_agrees_with_a_dense_svd(layout: str, size: float, dtype: torch.dtype) -> None:
    projection, spectra = cast(LAYOUTS[layout](), dtype), Spectra(windows=(10,))
    spectra.update(0, [projection.site])
    base = projection.factors()
    move(projection.parameters, size, seed=6)
    found, wanted = measured(spectra, projection, 10), expected(projection, base)
    for name in MATRICES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=BOUNDS[dtype], err_msg=name)


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("layout", ["heads of their own", "grouped keys", "wide heads", "norm gains", "latent chains"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_updates_of_rank_one_leave_nothing_but_noise(layout: str, size: float, dtype: torch.dtype) -> None:
    """An entropy near zero is asked to the same number, absolute."""
    projection, spectra = cast(LAYOUTS[layout](), dtype), Spectra(windows=(10,))
    spectra.update(0, [projection.site])
    base = projection.factors()
    move_along_one(projection.parameters, size)
    found, wanted = measured(spectra, projection, 10), expected(projection, base)
    bound = 1e-8 if dtype == torch.float64 else CANCELLING
    for name in MATRICES:
        numbers = [place for place, statistic in enumerate(STATISTICS) if statistic != "entropy"]
        np.testing.assert_allclose(found[name][:, numbers], wanted[name][:, numbers], rtol=bound, err_msg=name)
        entropy = STATISTICS.index("entropy")
        np.testing.assert_allclose(
            found[name][:, entropy], wanted[name][:, entropy], rtol=bound, atol=bound, err_msg=name
        )


@pytest.mark.parametrize("left", [1e-3, 3e-4, 1e-4, 6e-5, 3e-5, 1e-5])
@pytest.mark.parametrize("within", [False, True], ids=["between the sides", "within a chain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_left_of_what_cancels_has_its_digits(within: bool, left: float, dtype: torch.dtype) -> None:
    """Growth of 1e-3 against shrinking by as much, and noise of the relative size ``left``, down to float32's own last digits."""
    projection, spectra = cast(latent() if within else separate(d=96, h=16), dtype), Spectra(windows=(10,))
    spectra.update(0, [projection.site])
    base, generator = projection.factors(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for place, p in enumerate(p for p in projection.parameters if p.dim() == 2):
            p *= 1 + 1e-3 * (-1) ** place
            p += left * p.norm() / p.numel() ** 0.5 * torch.randn(p.shape, generator=generator).to(p.dtype)
    found, wanted = measured(spectra, projection, 10), expected(projection, base)
    for name in MATRICES:
        bound = 1e-7 if dtype == torch.float64 else CANCELLING
        np.testing.assert_allclose(found[name], wanted[name], rtol=bound, err_msg=name)


@pytest.mark.parametrize("scale", [1e-15, 1e-10, 1e10, 1e15, 1e25])
def test_weights_far_from_one_are_measured_as_any(scale: float) -> None:
    """Products of two Gram matrices have the fourth power of it; at the last, even squares are beyond float32."""
    projection, spectra = separate(), Spectra(windows=(10,))
    for p in projection.parameters:
        p.data *= scale
    spectra.update(0, [projection.site])
    base = projection.factors()
    move(projection.parameters, 1e-3, seed=6)
    found, wanted = measured(spectra, projection, 10), expected(projection, base)
    for name in MATRICES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=BOUNDS[torch.float32], err_msg=name)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_that_would_be_cut_short_are_taken_in_float64(precision: str) -> None:
    projection, spectra = separate(), Spectra(windows=(10,))
    spectra.update(0, [projection.site])
    base = projection.factors()
    move(projection.parameters, 1e-3, seed=6)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = measured(spectra, projection, 10)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, wanted in expected(projection, base).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-8, err_msg=name)


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
    root, exact = _root(gram)
    assert exact.all()
    assert (root.triu(1) == 0).all()
    torch.testing.assert_close(root @ root.mT, gram, rtol=0, atol=1e-10)
    single, exact = _root((gram - 1e-4 * torch.eye(16)).float())
    assert exact.tolist() == [False, True, False]
    assert (single[::2] == 0).all()


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


def test_a_peak_is_the_share_of_the_largest_entry() -> None:
    projection, spectra = separate(groups=2), Spectra(windows=(10,))
    spectra.update(0, [projection.site])
    base = projection.factors()
    move(projection.parameters, 1e-3, seed=9)
    with torch.no_grad():
        projection.parameters[0][8 + 3, 5] += 0.5  # of head 1
    found = {r.metric: r.values for r in spectra.update(10, [projection.site])}
    for name, change in zip(PEAKS, (increments(base, projection.factors())[x] for x in ("dwq", "dwk")), strict=True):
        wanted = change.abs().amax((1, 2)) / change.norm(dim=(1, 2))
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5)
    assert (found[PEAKS[0]] > 0.9).tolist() == [False, True, False, False]


def test_keys_that_did_not_move_leave_the_queries_their_numbers() -> None:
    projection, spectra = separate(groups=2), Spectra(windows=(10,))
    spectra.update(0, [projection.site])
    base = projection.factors()
    move(projection.parameters[:1], 1e-3, seed=7)
    found, (wq, wk) = measured(spectra, projection, 10), base
    matrices = increments((wq, wk), projection.factors())
    for name in ("delta2", "dwq"):
        wanted = [dense_statistics(matrix) for matrix in matrices[name]]
        np.testing.assert_allclose(found[name], wanted, rtol=BOUNDS[torch.float32])
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
