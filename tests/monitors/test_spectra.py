"""Increment spectra against a dense float64 SVD, and the router formulas against brute force."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from foreshock.monitors import RouterWeights, Spectra
from foreshock.monitors.metrics import STATISTICS, metric
from foreshock.monitors.spectra import UPDATE_RATIO
from foreshock.records import Site, Stage, WeightView

HIDDEN, HEADS, HEAD_DIM = 48, 4, 8


def view(parameter: torch.Tensor, groups: int, head_map: tuple[int, ...]) -> WeightView:
    index = np.arange(parameter.shape[0]).reshape(groups, -1)
    return WeightView((f"w{id(parameter)}",), (Stage(index, (0,), head_map),), (weakref.ref(parameter),))


def attention(name: str, q: torch.Tensor, k: torch.Tensor, groups: int) -> Site:
    k_map = tuple(head * groups // HEADS for head in range(HEADS))
    views = {"q_weight": view(q, HEADS, tuple(range(HEADS))), "k_weight": view(k, groups, k_map)}
    return Site(name, name, "attention", "test", heads=HEADS, kv_heads=groups, head_dim=HEAD_DIM, **views)


def weights(groups: int, seed: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS * HEAD_DIM, HIDDEN), (groups * HEAD_DIM, HIDDEN))
    q, k = (torch.nn.Parameter(torch.randn(shape, generator=generator) / HIDDEN**0.5) for shape in shapes)
    return q, k


def dense(matrix: torch.Tensor) -> tuple[float, float, float, float]:
    squares = torch.linalg.svdvals(matrix).square()
    entropy = torch.special.entr(squares / squares.sum()).sum()
    return tuple(float(x) for x in (squares.sum().sqrt(), squares.sum() / squares.max(), entropy, entropy.exp()))


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("groups", [4, 2])
def test_every_statistic_agrees_with_a_dense_svd(size: float, groups: int) -> None:
    q, k = weights(groups, seed=1)
    site, spectra = attention("a", q, k, groups), Spectra(windows=(10,))
    assert spectra.update(0, [site]) == []
    q_base, k_base = q.detach().double(), k.detach().double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        q += size * torch.randn(q.shape, generator=generator) / HIDDEN**0.5
        rank_1 = torch.randn(k.shape[0], 1, generator=generator) @ torch.randn(1, HIDDEN, generator=generator)
        k += 0.03 * size * rank_1 / HIDDEN**0.5  # a far smaller and low-rank update beside the full one
    found = {reading.metric: reading.values for reading in spectra.update(10, [site])}
    k_map = site.k_weight.head_map
    for head in range(HEADS):
        wq, dq = (x.reshape(HEADS, HEAD_DIM, HIDDEN)[head].T for x in (q_base, q.detach().double() - q_base))
        wk, dk = (x.reshape(groups, HEAD_DIM, HIDDEN)[k_map[head]].T for x in (k_base, k.detach().double() - k_base))
        expected = {"delta2": dq @ wk.T + wq @ dk.T, "delta3": dq @ dk.T, "dwq": dq, "dwk": dk}
        for name, matrix in expected.items():
            got = [found[f"attention/{name}_{statistic}"][head] for statistic in STATISTICS]
            np.testing.assert_allclose(got, dense(matrix), rtol=1e-3, atol=1e-6)


def product(weights: list[torch.Tensor]) -> torch.Tensor:
    """``[hidden, head dim]`` a head of ``outer [H * h, r]``, a gain ``[r]`` with one added, and ``inner [r, hidden]``."""
    outer, gain, inner = (w.detach().double() for w in weights)
    return (outer.reshape(HEADS, HEAD_DIM, -1) @ ((1 + gain[:, None]) * inner)).mT


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_a_chain_with_gains_agrees_with_the_dense_product(size: float) -> None:
    """The product is never formed, and its increment is no difference of rounded numbers."""
    rank, generator = 12, torch.Generator().manual_seed(9)
    shapes = ((HEADS * HEAD_DIM, rank), (rank,), (rank, HIDDEN))
    q, k = ([torch.nn.Parameter(torch.randn(s, generator=generator) / s[-1] ** 0.5) for s in shapes] for _ in "qk")

    def chain(weights: list[torch.nn.Parameter]) -> WeightView:
        outer, gain, inner = weights
        stages = (
            Stage(np.arange(HEADS * HEAD_DIM).reshape(HEADS, -1), (0,), tuple(range(HEADS))),
            Stage(np.arange(rank)[None], (0,), (0,), gains=((np.arange(rank)[None], 1.0),)),
        )
        return WeightView(("outer", "inner", "gain"), stages, tuple(weakref.ref(w) for w in (outer, inner, gain)))

    views = {"q_weight": chain(q), "k_weight": chain(k)}
    torch.testing.assert_close(views["q_weight"].factors(), product(q).float(), rtol=1e-4, atol=1e-5)
    site, spectra = Site("a", "a", "attention", "test", heads=HEADS, **views), Spectra(windows=(10,))
    spectra.update(0, [site])
    base = {role: product(w) for role, w in (("q", q), ("k", k))}
    with torch.no_grad():
        for weight in (*q, *k):
            weight += size * torch.randn(weight.shape, generator=generator)
    found = {reading.metric: reading.values for reading in spectra.update(10, [site])}
    for head in range(HEADS):
        (wq, dq), (wk, dk) = ((base[r][head], product(w)[head] - base[r][head]) for r, w in (("q", q), ("k", k)))
        expected = {"delta2": dq @ wk.T + wq @ dk.T, "delta3": dq @ dk.T, "dwq": dq, "dwk": dk}
        for name, matrix in expected.items():
            got = [found[f"attention/{name}_{statistic}"][head] for statistic in STATISTICS]
            np.testing.assert_allclose(got, dense(matrix), rtol=1e-6)


def test_views_that_do_not_meet_are_left_out() -> None:
    q, k = weights(4, seed=10)
    site = attention("a", q, k, 4)
    cut = replace(site, k_weight=site.k_weight.only(range(3)))
    assert cut.k_weight.factors().shape == (HEADS, HIDDEN, 3)
    spectra = Spectra(windows=(10,))
    spectra.update(0, [cut])
    assert spectra.update(10, [cut]) == []


def test_windows_choose_their_base_and_carry_a_suffix() -> None:
    q, k = weights(4, seed=3)
    site, spectra = attention("a", q, k, 4), Spectra(windows=(10, 50))
    seen = {}
    for step in range(0, 61, 5):
        with torch.no_grad():
            q += 0.01
        seen[step] = {reading.metric: reading.values[0] for reading in spectra.update(step, [site])}
    assert seen[5] == {}  # no oftener than the shortest window
    assert "attention/dwq_norm@50" not in seen[40]
    assert seen[50]["attention/dwq_norm@50"] == pytest.approx(5 * seen[50]["attention/dwq_norm"], rel=1e-4)
    assert all(metric(name).axis in ("heads", "scalar") for name in seen[60])
    assert f"{UPDATE_RATIO}@50" not in seen[60]


def test_a_weight_that_did_not_move_has_norm_zero_and_no_rank() -> None:
    q, k = weights(4, seed=4)
    site, spectra = attention("a", q, k, 4), Spectra(windows=(10,))
    spectra.update(0, [site])
    found = {reading.metric: reading.values for reading in spectra.update(10, [site])}
    for matrix in ("delta2", "delta3", "dwq", "dwk"):
        assert (found[f"attention/{matrix}_norm"] == 0).all()
        assert np.isnan(found[f"attention/{matrix}_effective_rank"]).all()


def test_sites_that_share_weights_share_a_snapshot_and_layers_of_one_shape_are_one_batch() -> None:
    q, k = weights(4, seed=5)
    other_q, other_k = weights(4, seed=6)
    sites = [attention("a", q, k, 4), attention("twin", q, k, 4), attention("b", other_q, other_k, 4)]
    spectra = Spectra(windows=(10,))
    spectra.update(0, sites)
    assert [len(taken) for _, taken in spectra._ring] == [2]
    with torch.no_grad():
        q += 0.1
    norms = {r.site: r.values for r in spectra.update(10, sites) if r.metric == "attention/delta2_norm"}
    assert norms.keys() == {"a", "twin", "b"}
    np.testing.assert_array_equal(norms["a"], norms["twin"])
    assert (norms["b"] == 0).all()


def test_a_resumed_ring_goes_on_without_a_gap_and_autograd_is_untouched() -> None:
    q, k = weights(4, seed=7)
    site, first = attention("a", q, k, 4), Spectra(windows=(10,))
    first.update(0, [site])
    second = Spectra(windows=(10,))
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        k += 0.1
    for left, right in zip(first.update(10, [site]), second.update(10, [site]), strict=True):
        np.testing.assert_array_equal(left.values, right.values)
    assert q.grad is None
    assert q.requires_grad
    assert not any(x.requires_grad for _, taken in second._ring for f in taken.values() for x in f.q)


def test_router_weights_match_brute_force() -> None:
    generator = torch.Generator().manual_seed(8)
    weight = torch.nn.Parameter(torch.randn(6, 16, generator=generator) + 0.5)
    found = {r.metric: r.values[0] for r in RouterWeights().update(0, [router(weight)])}
    rows = weight.detach().double().numpy()
    norms = np.linalg.norm(rows, axis=1)
    pairs = [rows[i] @ rows[j] / norms[i] / norms[j] for i, j in itertools.permutations(range(6), 2)]
    mean = rows.mean(0)
    share = np.linalg.svd(rows, compute_uv=False) ** 2
    share /= share.sum()
    expected = {
        "router/similarity": np.mean(pairs),
        "router/conditioning": max(np.linalg.norm(row - mean) for row in rows) / np.linalg.norm(mean),
        "router/effective_rank": np.exp(-(share * np.log(share)).sum()),
        "router/row_norm_min": norms.min(),
        "router/row_norm_max": norms.max(),
        "router/row_norm_mean": norms.mean(),
    }
    assert found == pytest.approx(expected, rel=1e-10)


def test_a_dead_router_row_gives_no_similarity_rather_than_an_error() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 8))
    with torch.no_grad():
        weight[1] = 0
    found = {r.metric: r.values[0] for r in RouterWeights().update(0, [router(weight)])}
    assert np.isnan(found["router/similarity"])
    assert found["router/row_norm_min"] == 0


def router(weight: torch.Tensor) -> Site:
    return Site("r", "r", "router", "test", experts=weight.shape[0], top_k=2, weight=view(weight, 1, (0,)))
