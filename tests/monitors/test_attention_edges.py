"""Every metric of the attention probe is that of `attention_reference` on the same tensors: dtypes, head layouts, masks, edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from attention_reference import reference
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from foreshock.monitors.attention_probe import ATTENTION, backward, finish, forward
from foreshock.monitors.metrics import metric
from foreshock.monitors.sampled_rows import SEQUENCES

Arrays = dict[str, np.ndarray]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES: dict[str, dict[str, int]] = {
    "MHA": {},
    "GQA": {"H": 6, "G": 2},
    "MQA": {"G": 1},
    "MLA": {"d": 12, "dv": 8},
    "MLA, grouped": {"H": 6, "G": 3, "d": 5, "dv": 11},
    "odd sizes": {"B": 3, "H": 3, "G": 3, "S": 7, "T": 7, "d": 5, "dv": 3},
    "one head": {"H": 1, "G": 1},
    "one channel": {"d": 1, "dv": 1},
    "one position": {"S": 1, "T": 1},
    "one row": {"B": 1, "S": 1, "T": 1},
    "one query": {"S": 1, "T": 6},
}
RESIDUALS = ("law/key_shift", "law/value_mass", "law/euler", "law/shadow", "law/hull", "law/bias_num")
OF_HEADS = ("logit_max", "entropy", "entropy_se", "entropy_norm", "sink", "sink_se", "lse", "lse_se")


def drawn(B=2, H=4, G=4, S=5, T=5, d=8, dv=8, dtype=torch.float32, seed=0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = {"q": (B, H, S, d), "k": (B, G, T, d), "v": (B, G, T, dv), "do": (B, H, S, dv)}
    return {role: torch.randn(*size, generator=g).to(dtype) for role, size in sizes.items()}


def facts_of(t: dict[str, Tensor], **facts: Any) -> dict[str, Any]:
    rows = min(SEQUENCES, t["q"].shape[0]) * t["q"].shape[2]
    return {"layout": {}, "scale": 0.4, "causal": False, "dropout": 0.0, "rows": rows, **facts}


def boundary(
    t: dict[str, Tensor], facts: dict[str, Any], mask: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors and gradients as PyTorch's own kernel makes them."""
    q, k, v = (t[role].clone().requires_grad_() for role in "qkv")
    if mask is not None and facts["causal"]:  # PyTorch takes either: the probe, of a site that has both
        seen = mask if mask.dtype == torch.bool else mask > -9e3
        mask = seen & torch.ones(q.shape[2], k.shape[2]).bool().tril()
        out = sdpa(q, k, v, attn_mask=mask, scale=facts["scale"], enable_gqa=True)
    else:
        out = sdpa(q, k, v, attn_mask=mask, is_causal=facts["causal"], scale=facts["scale"], enable_gqa=True)
    made = dict(zip("qkv", torch.autograd.grad(out, (q, k, v), t["do"]), strict=True))
    return {"q": t["q"], "k": t["k"], "v": t["v"], "out": out.detach()}, {**made, "out": t["do"]}


def every_row(facts: dict[str, Any], batch: int) -> Tensor:
    rows, sequences = facts["rows"], min(SEQUENCES, batch, facts["rows"])
    uniform = torch.full((2 * rows,), 0.5)
    uniform[rows : rows + sequences] = (torch.arange(sequences) + 0.5) / batch
    return uniform


def quantities(facts, t, g, mask=None, rows: Tensor | None = None) -> dict[str, Tensor]:
    masked = t if mask is None else {**t, "mask": mask}
    rows = every_row(facts, t["q"].shape[0]) if rows is None else rows
    return {**forward(facts, masked, rows), **backward(facts, t, g)}


def finished(facts, found: dict[str, Tensor]) -> Arrays:
    return dict(finish(facts, {name: x.reshape(-1).double().numpy() for name, x in found.items()}))


def agree(got: Arrays, expected: Arrays) -> None:
    """Residuals are rounding and known to that of float32; what they are taken of is known to its last digits."""
    assert got.keys() == expected.keys()
    for name, values in got.items():
        assert metric(name).name == name
        atol = 3e-6 if name in RESIDUALS or name.startswith("attention/shadow") else 2e-6
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=atol, err_msg=name)


def compared(t: dict[str, Tensor], mask: Tensor | None = None, **facts: Any) -> Arrays:
    told = facts_of(t, **facts)
    at, gradients = boundary(t, told, mask)
    got = finished(told, quantities(told, at, gradients, mask))
    agree(got, reference(told, at, gradients, mask))
    return got


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype: torch.dtype, shape: str, causal: bool) -> None:
    compared(drawn(**SHAPES[shape], dtype=dtype), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fill", [None, -math.inf, "lowest", -1e4])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding(dtype: torch.dtype, left: bool, fill: Any, causal: bool) -> None:
    """Boolean or additive, on either side; on the left with causality, rows see nothing."""
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None]
    seen = seen.flip(-1) if left else seen
    lowest = torch.finfo(dtype).min if fill == "lowest" else fill
    mask = seen if fill is None else torch.zeros(seen.shape).masked_fill(~seen, lowest).to(dtype)
    t = drawn(H=6, G=2, dv=4, dtype=dtype)
    if left and causal:
        told = facts_of(t, causal=True)
        at, gradients = boundary(t, told, seen)  # what a kernel makes of a row without keys is its own affair
        got = finished(told, quantities(told, at, gradients, mask))
        agree(got, reference(told, at, gradients, mask))
    else:
        compared(t, mask, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_on_the_logits_is_part_of_them(dtype: torch.dtype) -> None:
    bias = torch.linspace(-2, 2, 4 * 25).view(1, 4, 5, 5).to(dtype)
    compared(drawn(dtype=dtype), bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_logits_alike(dtype: torch.dtype) -> None:
    t = drawn(dtype=dtype)
    t["q"].zero_()
    got = compared(t)
    np.testing.assert_allclose(got["attention/entropy"], math.log(5), rtol=1e-6)
    np.testing.assert_allclose(got["attention/entropy_norm"], 1, rtol=1e-6)
    assert (got["attention/sink_se"] < 1e-7).all()


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_rows_that_see_one_key(size: float) -> None:
    t = drawn()
    t["q"] *= size
    told = facts_of(t, causal=True)
    at, gradients = boundary(t, told, None)
    got, expected = finished(told, quantities(told, at, gradients)), reference(told, at, gradients)
    for name in OF_HEADS:
        values = expected[f"attention/{name}"]
        np.testing.assert_allclose(got[f"attention/{name}"], values, rtol=2e-4, atol=2e-6, err_msg=name)


def test_an_entropy_beside_large_logits_keeps_its_digits() -> None:
    """All keys alike but for a little, at logits of 3000: lse - sum p s would be off by a thousandth."""
    t = drawn(d=2)
    t["q"][..., 0], t["k"][..., 0] = 100.0, 75.0
    got = compared_rows(t)
    np.testing.assert_allclose(got[0]["attention/entropy"], got[1]["attention/entropy"], rtol=1e-4)
    assert got[1]["attention/lse"].min() > 2990


def compared_rows(t: dict[str, Tensor]) -> tuple[Arrays, Arrays]:
    told = facts_of(t)
    at, gradients = boundary(t, told, None)
    return finished(told, quantities(told, at, gradients)), reference(told, at, gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_is_no_residual(dtype: torch.dtype) -> None:
    t = drawn(dtype=dtype)
    t["do"].zero_()
    told = facts_of(t)
    at, gradients = boundary(t, told, None)
    got = finished(told, quantities(told, at, gradients))
    for law in ("law/key_shift", "law/euler", "law/key_gain", "law/euler_gain"):
        assert np.isnan(got[law]).all(), law
    assert ((got["law/value_mass"] == 0) if dtype is torch.float16 else np.isnan(got["law/value_mass"])).all()
    zero = [name for name in got if name.startswith("attention/grad_")]
    assert len(zero) == 8
    assert all((got[name] == 0).all() for name in (*zero, "law/bias_num", "law/bias_den"))


def test_rows_without_a_gradient_have_no_sign() -> None:
    t = drawn()
    t["do"][:, :, :3] = 0
    got = compared(t)
    assert (np.abs(got["attention/grad_delta_sign"]) <= 0.4).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_near_the_largest_number(dtype: torch.dtype) -> None:
    t = drawn(dtype=dtype)
    most = torch.finfo(dtype).max
    t["v"][0, 0, :3, 0], t["v"][0, 1, 0, 0], t["v"][1, 2, 2, 2] = most * 0.75, -most * 0.51, most * 0.49
    told = facts_of(t)
    tensors = {"q": t["q"], "k": t["k"], "v": t["v"], "out": t["do"]}
    got = finished(told, forward(told, tensors, every_row(told, 2)))
    np.testing.assert_allclose(got["attention/near_overflow"], [0, 0, 4 / 320, 0], rtol=1e-6)
    assert got["attention/nonfinite"].sum() == 0
    assert np.isfinite(got["attention/v_absmax"]).all()
    assert np.isinf(got["attention/v_rms"][0]) == (dtype is not torch.float16)  # squares leave float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["q", "k", "v", "do"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_that_holds_no_numbers_leaves_the_others(dtype: torch.dtype, role: str, value: float) -> None:
    t = drawn(dtype=dtype)
    clean = compared(t)
    t[role][0, 1, 2, 3] = value
    told = facts_of(t)
    at, gradients = boundary(t, told, None)
    got = finished(told, quantities(told, at, gradients))
    assert got.keys() == clean.keys()
    for name, values in got.items():
        if len(values) == 4 and metric(name).axis in ("heads", "kv_heads"):
            np.testing.assert_allclose(values[[0, 2, 3]], clean[name][[0, 2, 3]], rtol=1e-4, atol=3e-6, err_msg=name)
    place = ("q", "k", "v", "do").index(role)
    assert got["attention/grad_nonfinite" if role == "do" else "attention/nonfinite"][place] == 1
    expected = reference(told, at, gradients)
    if role in ("q", "v"):  # one row of q is left out; what stands in v does not reach the probabilities
        for name in OF_HEADS[1:]:
            np.testing.assert_allclose(got[f"attention/{name}"], expected[f"attention/{name}"], rtol=1e-4, atol=2e-6)
    for name in ("attention/logit_max",) if role == "q" and not math.isnan(value) else ():
        np.testing.assert_array_equal(np.isfinite(got[name]), np.isfinite(expected[name]))
    if role == "k":  # every row of one sequence meets it, and another sequence is left
        assert np.isfinite(got["attention/entropy"]).all()
    if role != "do":
        assert not np.isfinite(got[f"attention/{role}_rms"][1])
    else:
        assert not np.isfinite(got["attention/grad_out_norm"][1])


def test_garbage_at_keys_that_nobody_sees_stays_there() -> None:
    """Padding may hold anything in q and k; the kernel's own output stays finite, and so do its rows."""
    t = drawn()
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None]
    clean = compared(t, seen)
    t["k"][1, :, 3:] = 1e30
    told = facts_of(t)
    at, _ = boundary(drawn(), told, seen)
    got = finished(told, forward(told, {**at, "k": t["k"], "mask": seen}, every_row(told, 2)))
    for name in ("logit_max", "entropy", "sink", "lse", "lse_max", "shadow_rms"):
        np.testing.assert_allclose(got[f"attention/{name}"], clean[f"attention/{name}"], rtol=1e-5, atol=1e-7)


def test_microbatches_of_different_sizes_count_by_their_sizes() -> None:
    small, large = drawn(B=1, S=3, T=3), drawn(B=3, seed=1)
    parts, merged = [], {}
    for t in (small, large):
        told = facts_of(t)
        at, gradients = boundary(t, told, None)
        parts.append((told, at, gradients))
        for name, x in quantities(told, at, gradients).items():
            known = merged.get(name)
            merged[name] = x if known is None else torch.maximum(known, x) if name in ATTENTION.maxima else known + x
    got = finished(parts[0][0], merged)
    one, other = (reference(*part) for part in parts)
    sizes = {role: [p[1][role][:, 0, :, 0].numel() for p in parts] for role in ("q", "k", "v", "out")}

    def pooled(a: np.ndarray, b: np.ndarray, weights: list[int]) -> np.ndarray:
        return np.average([a, b], axis=0, weights=weights)

    for role in ("q", "k", "v", "out"):
        name = f"attention/{role}_rms"
        np.testing.assert_allclose(got[name], np.sqrt(pooled(one[name] ** 2, other[name] ** 2, sizes[role])), rtol=1e-5)
    n = np.array(sizes["q"])
    for name in ("attention/entropy", "attention/sink", "attention/lse"):
        np.testing.assert_allclose(got[name], pooled(one[name], other[name], sizes["q"]), rtol=1e-5)
        errors = np.sqrt((n[0] * one[f"{name}_se"]) ** 2 + (n[1] * other[f"{name}_se"]) ** 2) / n.sum()
        np.testing.assert_allclose(got[f"{name}_se"], errors, rtol=1e-4)


def test_a_standard_error_is_the_spread_of_the_mean() -> None:
    """Over many draws: rows of a sequence that all look alike, drawn anew each time."""
    t = drawn(B=1, S=400, T=8)
    told = facts_of(t, rows=16)
    at = {"q": t["q"], "k": t["k"], "v": t["v"], "out": t["do"]}
    generator = torch.Generator().manual_seed(3)
    draws = [finished(told, forward(told, at, torch.rand(32, generator=generator))) for _ in range(300)]
    for name in ("entropy", "sink", "lse"):
        means, errors = (np.stack([d[f"attention/{name}{of}"] for d in draws]) for of in ("", "_se"))
        np.testing.assert_allclose(np.sqrt((errors**2).mean(0)), means.std(0), rtol=0.2)
