"""The hull and shadow laws of the attention probe, on tensors made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from foreshock.monitors.attention_probe import ATTENTION, finish, forward

B, H, G, S, D = 2, 4, 2, 6, 3


def _values(seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """q, k, v and out of a causal attention, and its probabilities."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, S, D, generator=generator) for n in (H, G, G))
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    p = (q @ k.repeat_interleave(2, 1).mT * D**-0.5).masked_fill(hidden, -math.inf).softmax(-1)
    return {"q": q, "k": k, "v": v, "out": p @ v.repeat_interleave(2, 1)}, p


def _run(tensors: dict[str, Tensor], **facts) -> dict[str, np.ndarray]:
    given = {"layout": {}, "scale": D**-0.5, "causal": True, "dropout": 0.0, "rows": 2 * S, **facts}
    uniform = torch.full((4 * S,), 0.5)
    uniform[2 * S : 2 * S + 2] = torch.tensor([0.25, 0.75])
    found = forward(given, tensors, uniform)
    return dict(finish(given, {name: x.reshape(-1).double().numpy() for name, x in found.items()}))


def test_an_average_lies_in_the_hull() -> None:
    tensors, _ = _values()
    np.testing.assert_array_less(_run(tensors)["law/hull"], 2e-7)


def test_how_far_outside_is_told_by_head_relative_to_the_channel() -> None:
    """Query heads 0 and 1 share the first value head, 2 and 3 the second."""
    tensors, _ = _values()
    v, out = tensors["v"], tensors["out"].clone()
    out[1, 2, 3, 0] = v[1, 1, :, 0].max() + 0.5 * v[1, 1, :, 0].abs().max()
    out[0, 1, 4, 2] = v[0, 0, :, 2].min() - 2.0 * v[0, 0, :, 2].abs().max()
    got = _run({**tensors, "out": out})["law/hull"]
    np.testing.assert_allclose(got, [0, 2.0, 0.5, 0], atol=2e-7)


@pytest.mark.parametrize("shift", [-10.0, 10.0])
def test_a_row_without_keys_is_zero_or_no_number_and_breaks_nothing(shift: float) -> None:
    tensors, _ = _values()
    v, out = tensors["v"] + shift, tensors["out"] + shift
    assert _run({**tensors, "v": v, "out": out})["law/hull"].max() < 2e-7
    out[0, 0, 2], out[1, 3, 5] = 0.0, math.nan
    got = _run({**tensors, "v": v, "out": out})
    assert got["law/hull"].max() < 2e-7
    assert got["attention/nonfinite"].tolist() == [0, 0, 0, D]


def test_columns_that_are_no_keys_only_draw_towards_zero() -> None:
    tensors, p = _values()
    share = torch.rand(B, H, S, 1, generator=torch.Generator().manual_seed(1))
    out = (p * share) @ tensors["v"].repeat_interleave(2, 1)
    assert _run({**tensors, "out": out})["law/hull"].max() < 2e-7


def test_rows_that_sum_to_more_than_one_leave_the_hull() -> None:
    tensors, _ = _values()
    assert _run({**tensors, "out": tensors["out"] * 1.25})["law/hull"].min() > 0.05  # the first row is its only value
    assert _run({**tensors, "out": tensors["out"] * 0.75})["law/hull"].max() < 2e-7  # only the shadow sees those


def test_a_channel_of_zeros_has_a_finite_residual() -> None:
    tensors, _ = _values()
    v, out = tensors["v"].clone(), tensors["out"].clone()
    v[..., 1] = out[..., 1] = 0
    assert _run({**tensors, "v": v, "out": out})["law/hull"].max() < 2e-7
    out[0, 0, 0, 1] = 1e-9
    got = _run({**tensors, "v": v, "out": out})["law/hull"]
    assert np.isfinite(got).all()
    assert got[0] > 1e6


def test_values_of_one_sequence_serve_a_batch() -> None:
    tensors, _ = _values()
    k, v = tensors["k"][:1], tensors["v"][:1]
    out = v.repeat_interleave(2, 1).expand(B, -1, -1, -1).clone()
    assert (_run({**tensors, "k": k, "v": v, "out": out})["law/hull"] == 0).all()


def test_microbatches_merge_by_the_largest() -> None:
    assert "hull" in ATTENTION.maxima


def test_the_shadow_law_is_the_error_of_sampled_rows() -> None:
    tensors, _ = _values()
    got = _run({**tensors, "out": tensors["out"] * 1.1})
    np.testing.assert_allclose(got["law/shadow"], 0.1, rtol=1e-4)
    np.testing.assert_allclose(got["attention/shadow_bias"], 0.1, rtol=1e-4)
    assert "law/shadow" not in _run(tensors, dropout=0.1)
    assert "law/shadow" not in _run(tensors, rows=0)
    assert "law/hull" in _run(tensors, rows=0)
