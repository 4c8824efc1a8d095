"""The attention probe against float64 arithmetic on the same tensors: eagerly with rows chosen, and through a compiled model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock import Watch
from foreshock.monitors.attention_probe import backward, finish, forward
from foreshock.monitors.sampled_rows import SEQUENCES

sdpa = functional.scaled_dot_product_attention
LAWS = ("law/key_shift", "law/value_mass", "law/euler")


def _facts(q: Tensor, k: Tensor, **facts):
    return {
        "layout": {},
        "scale": q.shape[-1] ** -0.5,
        "causal": False,
        "dropout": 0.0,
        "rows": min(SEQUENCES, q.shape[0]) * q.shape[2],
        **facts,
    }


def _tensors(B=2, H=4, G=4, S=5, T=5, d=8, dv=8, seed=0, dtype=torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        return torch.randn(*sizes, generator=g).to(dtype)

    return {"q": draw(B, H, S, d), "k": draw(B, G, T, d), "v": draw(B, G, T, dv), "do": draw(B, H, S, dv)}


def _every_row(facts, batch: int) -> Tensor:
    """Uniform numbers that pick every position of the first sequences, each sequence once."""
    rows, sequences = facts["rows"], min(SEQUENCES, batch, facts["rows"])
    uniform = torch.full((2 * rows,), 0.5)
    uniform[rows : rows + sequences] = (torch.arange(sequences) + 0.5) / batch
    return uniform


def _run(t: dict[str, Tensor], facts, mask: Tensor | None = None, rows: Tensor | None = None) -> dict[str, np.ndarray]:
    """Probe values of PyTorch's own kernel on ``t``, finished."""
    q, k, v = (t[role].clone().requires_grad_() for role in "qkv")
    out = sdpa(q, k, v, attn_mask=mask, is_causal=facts["causal"], scale=facts["scale"], enable_gqa=True)
    gradients = dict(zip("qkv", torch.autograd.grad(out, (q, k, v), t["do"]), strict=True))
    tensors = {"q": q.detach(), "k": k.detach(), "v": v.detach(), "out": out.detach()}
    masked = tensors if mask is None else {**tensors, "mask": mask}
    found = dict(forward(facts, masked, _every_row(facts, q.shape[0]) if rows is None else rows))
    found |= backward(facts, tensors, {**gradients, "out": t["do"]})
    return dict(finish(facts, {name: x.reshape(-1).double().numpy() for name, x in found.items()}))


def _exact(t: dict[str, Tensor], facts, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Everything in float64, rows written out: logits, p, lse, entropy, visible ``[B, H, S, T]``, out and gradients."""
    q, k, v = (t[role].double().requires_grad_() for role in "qkv")
    repeat = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(repeat, 1).mT * facts["scale"]
    visible = torch.ones_like(logits, dtype=torch.bool)
    if facts["causal"]:
        visible = visible.tril()
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask > torch.finfo(mask.dtype).min / 2)
        logits = logits + mask.double()
    logits = logits.masked_fill(~visible, -math.inf)
    p = logits.softmax(-1).nan_to_num()
    out = p @ v.repeat_interleave(repeat, 1)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), t["do"].double())
    entropy = -torch.special.xlogy(p, p).sum(-1)
    found = {"q": q, "k": k, "v": v, "logits": logits, "p": p, "visible": visible, "out": out, "entropy": entropy}
    return {name: x.detach() for name, x in (found | {"dq": dq, "dk": dk, "dv": dv, "do": t["do"].double()}).items()}


def _close(got: np.ndarray, expected, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(got, np.asarray(expected, dtype=np.float64).reshape(-1), rtol=rtol, atol=atol)


SHAPES = {
    "plain": {},
    "grouped": {"G": 2},
    "one key head": {"G": 1},
    "cross": {"S": 3, "T": 7},
    "wide values": {"dv": 12},
    "one head": {"H": 1, "G": 1},
    "one position": {"S": 1, "T": 1},
    "one query": {"S": 1, "T": 6},
    "many sequences": {"B": 6},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_and_gradients(shape: str) -> None:
    t = _tensors(**SHAPES[shape])
    facts = _facts(t["q"], t["k"])
    got, exact = _run(t, facts), _exact(t, facts)
    for role in ("q", "k", "v", "out"):
        _close(got[f"attention/{role}_rms"], exact[role].square().mean((0, 2, 3)).sqrt())
        _close(got[f"attention/{role}_absmax"], exact[role].abs().amax((0, 2, 3)))
        heads = exact[f"d{role[0]}"].square().sum((0, 2, 3)).sqrt()
        _close(got[f"attention/grad_{role}_norm"], heads, atol=2e-6)
    delta = (exact["do"] * exact["out"]).sum(-1)
    _close(got["attention/grad_delta"], delta.mean((0, 2)))
    _close(got["attention/grad_delta_sign"], delta.sign().mean((0, 2)))
    _close(got["attention/grad_absmax"], [exact[name].abs().max() for name in ("dq", "dk", "dv", "do")], atol=2e-6)
    _close(got["attention/nonfinite"], np.zeros(4))
    _close(got["attention/grad_nonfinite"], np.zeros(4))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "many sequences"])
def test_rows(shape: str, causal: bool) -> None:
    t = _tensors(**SHAPES[shape])
    facts = _facts(t["q"], t["k"], causal=causal, scale=0.7)
    _rows_agree(_run(t, facts), _exact(t, facts))


def _rows_agree(got, exact) -> None:
    p, logits, visible = exact["p"], exact["logits"], exact["visible"]
    alive = visible.any(-1)
    n = alive.double().sum((0, 2))
    lse = torch.where(alive, logits.logsumexp(-1), 0.0)
    entropy = exact["entropy"]
    _close(got["attention/logit_max"], logits.amax((0, 2, 3)))
    _close(got["attention/entropy"], entropy.sum((0, 2)) / n, atol=2e-6)
    several = visible.sum(-1) > 1
    share = torch.where(several, entropy / visible.sum(-1).clamp(min=2).log(), 0.0).sum((0, 2)) / several.sum((0, 2))
    _close(got["attention/entropy_norm"], share, atol=2e-6)
    first = visible.float().argmax(-1, keepdim=True)
    _close(got["attention/sink"], (p.gather(-1, first)[..., 0] * alive).sum((0, 2)) / n)
    _close(got["attention/lse"], lse.sum((0, 2)) / n)
    _close(got["attention/lse_max"], torch.where(alive, lse, -math.inf).amax((0, 2)))
    assert (np.abs(got["attention/shadow_bias"]) < 1e-6).all()
    assert (got["attention/shadow_rms"] < 1e-6).all()


HOLES = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
PADDING = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None]
LOWEST = torch.finfo(torch.float32).min
EMPTY_ROWS = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
MASKS = {
    "bool": HOLES,
    "bool, three axes": HOLES.expand(1, 5, 5),
    "a mask a head": torch.stack([HOLES, HOLES.flip(-1), HOLES.T | HOLES, torch.ones(5, 5).bool()])[None],
    "padding": PADDING,
    "padding and causality": PADDING & torch.ones(5, 5).bool().tril(),
    "additive": torch.zeros(5, 5).masked_fill(~HOLES, -math.inf),
    "additive, lowest": torch.zeros(2, 1, 5, 5).masked_fill(~PADDING, LOWEST),
    "a bias": torch.linspace(-2, 2, 100).view(1, 4, 5, 5),
    "a bias with holes": torch.linspace(-2, 2, 100).view(1, 4, 5, 5).masked_fill(~HOLES, LOWEST),
    "empty rows": EMPTY_ROWS,
    "empty rows, additive": torch.zeros(5, 5).masked_fill(~EMPTY_ROWS, -math.inf),
}


@pytest.mark.parametrize("mask", MASKS)
def test_rows_under_a_mask(mask: str) -> None:
    t = _tensors()
    facts = _facts(t["q"], t["k"])
    _rows_agree(_run(t, facts, MASKS[mask]), _exact(t, facts, MASKS[mask]))


def test_a_head_that_sees_nothing_has_no_rows() -> None:
    t = _tensors(S=3, T=3)
    facts = _facts(t["q"], t["k"])
    mask = torch.ones(1, 4, 3, 3).bool()
    mask[:, 1] = False
    got = _run(t, facts, mask)
    for name in ("entropy", "sink", "lse"):
        assert np.isnan(got[f"attention/{name}"]).tolist() == [False, True, False, False]
        assert np.isnan(got[f"attention/{name}_se"]).tolist() == [False, True, False, False]
    for name in ("logit_max", "lse_max"):
        assert np.isnan(got[f"attention/{name}"]).tolist() == [False, True, False, False]
    assert got["attention/nonfinite"].tolist() == [0, 0, 0, 0]


def test_a_sample_of_padding_alone_is_no_sign_of_a_fault() -> None:
    t = _tensors(S=3, T=3)
    nothing = torch.zeros(3, 3).bool()
    got = _run(t, _facts(t["q"], t["k"]), nothing)
    assert not any(name.startswith(("attention/lse", "attention/entropy", "attention/logit")) for name in got)
    t["q"][0, 0, 0, 0] = math.nan
    assert np.isnan(_run(t, _facts(t["q"], t["k"]), nothing)["attention/lse"]).all()


def test_sampled_rows_are_rows_of_the_sampled_sequences() -> None:
    t = _tensors(B=6, S=9, T=9)
    facts = _facts(t["q"], t["k"], causal=True, rows=8)
    uniform = torch.rand(16, generator=torch.Generator().manual_seed(1))
    exact = _exact(t, facts)
    b = [int(uniform[8 + i] * 6) for i in range(4)]
    i = [[int((j + uniform[2 * n + j]) / 2 * 9) for j in range(2)] for n in range(4)]
    entropy = torch.stack([exact["entropy"][b[n]][:, i[n]] for n in range(4)]).mean((0, 2))
    got = _run(t, facts, rows=uniform)
    _close(got["attention/entropy"], entropy)
    largest = torch.stack([exact["logits"][b[n]][:, i[n]].amax((1, 2)) for n in range(4)]).amax(0)
    _close(got["attention/logit_max"], largest)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_draws_stay_inside(uniform: float) -> None:
    t = _tensors()
    facts = _facts(t["q"], t["k"], rows=3)
    assert np.isfinite(_run(t, facts, rows=torch.full((6,), uniform))["attention/entropy"]).all()


def test_positions_first_is_the_same_site_transposed() -> None:
    t = _tensors(G=2)
    facts = _facts(t["q"], t["k"], causal=True)
    tensors = {role: t[role] for role in "qkv"} | {"out": t["do"]}
    swapped = {role: x.transpose(1, 2).contiguous() for role, x in tensors.items()}
    bshd = dict.fromkeys(("q", "k", "v", "out"), "b s h d")
    rows = _every_row(facts, 2)
    for one, other in zip(
        (forward(facts, tensors, rows), backward(facts, tensors, tensors)),
        (forward({**facts, "layout": bshd}, swapped, rows), backward({**facts, "layout": bshd}, swapped, swapped)),
        strict=True,
    ):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_laws_hold_to_rounding(shape: str, causal: bool) -> None:
    t = _tensors(**SHAPES[shape])
    got = _run(t, _facts(t["q"], t["k"], causal=causal))
    for law in LAWS:
        values = got[law]
        assert len(values) == t["k"].shape[1]
        if shape == "one position" or (causal and t["q"].shape[2] == 1):
            continue  # one visible key: its gradient is rounding alone, or nothing
        assert (values < 1e-5).all(), law


@pytest.mark.parametrize("causal", [False, True])
def test_laws_hold_with_a_mask(causal: bool) -> None:
    t = _tensors(G=2)
    got = _run(t, _facts(t["q"], t["k"]), mask=HOLES & torch.ones(5, 5).bool().tril() if causal else HOLES)
    assert all((got[law] < 1e-5).all() for law in LAWS)


def test_law_sums() -> None:
    t = _tensors(G=2)
    facts = _facts(t["q"], t["k"], scale=0.3)
    exact = _exact(t, facts)
    noise = torch.Generator().manual_seed(5)
    wrong = {role: exact[f"d{role}"] + 0.1 * torch.randn(exact[f"d{role}"].shape, generator=noise) for role in "qkv"}
    found = backward(
        facts,
        {role: exact[role].float() for role in ("q", "k", "v", "out")},
        {**{role: x.float() for role, x in wrong.items()}, "out": t["do"]},
    )
    got = finish(facts, {name: x.reshape(-1).double().numpy() for name, x in found.items()})

    def groups(x_BH: Tensor) -> Tensor:
        return x_BH.unflatten(1, (2, 2)).sum(2)

    q, k, out, do, dq, dk, dv = (*(exact[name] for name in ("q", "k", "out", "do")), *(wrong[role] for role in "qkv"))
    _close(got["law/key_shift"], dk.sum(2).square().sum((0, 2)).sqrt() / dk.square().sum((0, 2, 3)).sqrt())
    mass, brought = dv.sum(2), groups(do.sum(2))
    size = mass.square().sum((0, 2)) + brought.square().sum((0, 2))
    _close(got["law/value_mass"], ((mass - brought).square().sum((0, 2)) / size).sqrt())
    left, right = groups((q * dq).sum(3).mT.sum(1)), (k * dk).sum((2, 3))
    size = groups((q * dq).sum(3).square().sum(2)).sum(0) + (k * dk).sum(3).square().sum((0, 2))
    _close(got["law/euler"], (left.sum(0) - right.sum(0)).abs() / size.sqrt(), rtol=1e-4)
    u = groups(((do * out).sum(3, keepdim=True) * q).sum(2)) * 0.3
    _close(got["law/bias_num"], -(dk.sum(2) * u).sum((0, 2)), rtol=1e-4)
    _close(got["law/bias_den"], u.square().sum((0, 2)), rtol=1e-4)


@pytest.mark.parametrize("bias", [3e-3, -1e-2])
def test_a_biased_output_in_the_backward_is_estimated(bias: float) -> None:
    """Flash attention's backward takes D from the stored output: biased by c, every row of dS sums to -c D."""
    t = _tensors(B=2, H=4, G=2, S=16, T=16)
    facts = _facts(t["q"], t["k"], causal=True)
    exact = _exact(t, facts)
    do, out, p = exact["do"], exact["out"] * (1 + bias), exact["p"]
    v, k = (exact[role].repeat_interleave(2, 1) for role in "vk")
    ds = p * (do @ v.mT - (do * out).sum(-1, keepdim=True)) * facts["scale"]
    dk = (ds.mT @ exact["q"]).unflatten(1, (2, 2)).sum(2)
    gradients = {"q": ds @ k, "k": dk, "v": exact["dv"], "out": do}
    found = backward(facts, {"q": exact["q"], "k": exact["k"], "v": exact["v"], "out": out}, gradients)
    got = finish(facts, {name: x.reshape(-1).double().numpy() for name, x in found.items()})
    _close(got["law/bias_num"] / got["law/bias_den"], np.full(2, bias / (1 + bias)), rtol=2e-3)
    assert (got["law/key_shift"] > 1e-4).all()


def test_without_rows_the_rest_is_measured() -> None:
    t = _tensors()
    got = _run(t, _facts(t["q"], t["k"], rows=0), rows=torch.zeros(0))
    assert "attention/entropy" not in got
    assert "attention/q_rms" in got
    assert "law/key_shift" in got


def test_dropout_keeps_the_shadow_out() -> None:
    t = _tensors()
    facts = _facts(t["q"], t["k"], dropout=0.1)
    tensors = {role: t[role] for role in "qkv"} | {"out": t["do"]}
    found = forward(facts, tensors, _every_row(facts, 2))
    assert "row_entropy" in found
    assert not any(name.startswith("shadow") for name in found)


def test_a_wrong_kernel_shows_in_the_shadow() -> None:
    t = _tensors()
    facts = _facts(t["q"], t["k"])
    out = _exact(t, facts)["out"].float()
    for factor in (1.01, 0.98):
        tensors = {role: t[role] for role in "qkv"} | {"out": out * factor}
        got = finish(facts, {n: x.double().numpy() for n, x in forward(facts, tensors, _every_row(facts, 2)).items()})
        _close(got["attention/shadow_bias"], np.full(4, factor - 1), rtol=1e-3)
        _close(got["attention/shadow_rms"], np.full(4, abs(factor - 1)), rtol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["q", "k", "v", "do"])
def test_a_value_that_is_no_number_is_counted_and_breaks_nothing(role: str, value: float) -> None:
    t = _tensors()
    t[role][0, 1, 2, 3] = value
    got = _run(t, _facts(t["q"], t["k"]))
    place = ("q", "k", "v", "do").index(role)
    assert got["attention/grad_nonfinite" if role == "do" else "attention/nonfinite"][place] == 1
    if role != "do":
        assert not np.isfinite(got[f"attention/{role}_rms"][1])
        assert np.isfinite(got[f"attention/{role}_rms"][[0, 2, 3]]).all()
        assert not np.isfinite(got[f"attention/{role}_absmax"][1])
    assert np.isfinite(got["attention/entropy"][[0, 2, 3]]).all()


def test_half_precision_is_measured_in_single() -> None:
    t = _tensors(dtype=torch.bfloat16)
    facts = _facts(t["q"], t["k"])
    exact = _exact(t, facts)
    got = _run(t, facts)
    _close(got["attention/q_rms"], exact["q"].square().mean((0, 2, 3)).sqrt())
    _close(got["attention/entropy"], exact["entropy"].mean((0, 2)), rtol=1e-5, atol=1e-5)
    assert all((got[law] < 0.05).all() for law in LAWS)


# -- through a compiled model --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, heads: int = 4, kv_heads: int = 2, head_dim: int = 8) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(16, heads * head_dim)
        self.k, self.v = (nn.Linear(16, kv_heads * head_dim) for _ in range(2))
        self.o = nn.Linear(heads * head_dim, 16)

    def parts(self, x):
        return [y(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for y in (self.q, self.k, self.v)]

    def forward(self, x):
        out = sdpa(*self.parts(x), is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_compiled_model_says_the_same(one_thread, inner: str) -> None:
    layer, x = Layer(), torch.randn(2, 1, 6, 16)
    exact = []
    for batch in x:
        q, k, v = (y.detach() for y in layer.parts(batch))
        do = (layer(batch).detach() * 2 @ layer.o.weight.detach()).view(1, 6, 4, 8).transpose(1, 2)
        facts = _facts(q, k, causal=True)
        exact.append(_exact({"q": q, "k": k, "v": v, "do": do}, facts))
    with Watch(every=1, inner=inner, rows=6, strict=True) as watch:
        model = torch.compile(layer, backend=watch.backend)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        for batch in x:  # two microbatches
            model(batch).square().sum().backward()
        optimizer.step()
        assert watch.step == 1
        got = {name: watch.series(name)[1].reshape(-1) for name in watch.metrics()}
        (status,) = watch.coverage
        assert (status.evaluations, status.sampled) == (2, 2)
    both = {name: torch.cat([e[name] for e in exact]) for name in exact[0]}
    _rows_agree(got, both)
    for role in ("q", "k", "v", "out"):
        _close(got[f"attention/{role}_rms"], both[role].square().mean((0, 2, 3)).sqrt())
        _close(got[f"attention/{role}_absmax"], both[role].abs().amax((0, 2, 3)))
        _close(got[f"attention/grad_{role}_norm"], both[f"d{role[0]}"].square().sum((0, 2, 3)).sqrt(), atol=1e-5)
    delta = (both["do"] * both["out"]).sum(-1)
    _close(got["attention/grad_delta"], delta.mean((0, 2)), rtol=1e-4)
    u = ((delta.unsqueeze(-1) * both["q"]).sum(2) * 8**-0.5).unflatten(1, (2, 2)).sum(2)
    _close(got["law/bias_den"], u.square().sum((0, 2)), rtol=1e-4)
    for law in LAWS:
        assert (got[law] < 1e-5).all()


# -- forms beyond one kernel's --------------------------------------------------------------------------------------------


def _written_out(t: dict[str, Tensor], facts, change=lambda logits: logits) -> tuple[dict[str, np.ndarray], Tensor]:
    """Probe values where the logits that enter the softmax are at hand, and those logits."""
    q, k, v = (t[role].clone().requires_grad_() for role in "qkv")
    repeat = q.shape[1] // k.shape[1]
    logits = change(q @ k.repeat_interleave(repeat, 1).mT * facts["scale"])
    first = facts.get("first_key", 0)
    p = logits.softmax(-1)[..., first : first + k.shape[2]]
    out = p @ v.repeat_interleave(repeat, 1)
    gradients = dict(zip("qkv", torch.autograd.grad(out, (q, k, v), t["do"]), strict=True))
    tensors = {"q": q.detach(), "k": k.detach(), "v": v.detach(), "out": out.detach()}
    found = dict(forward(facts, {**tensors, "logits": logits.detach()}, _every_row(facts, q.shape[0])))
    found |= backward(facts, tensors, {**gradients, "out": t["do"]})
    got = finish(facts, {name: x.reshape(-1).double().numpy() for name, x in found.items()})
    return dict(got), logits.detach().double()


@pytest.mark.parametrize("shape", SHAPES)
def test_given_logits_say_what_recomputed_rows_say(shape: str) -> None:
    t = _tensors(**SHAPES[shape])
    facts = _facts(t["q"], t["k"], scale=0.7)
    got, exact = _written_out(t, facts)[0], _run(t, facts)
    assert got.keys() == exact.keys()
    for name in got:
        if not name.startswith("law/"):  # residuals are rounding: each kernel has its own
            np.testing.assert_allclose(got[name], exact[name], rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("fill", [-math.inf, LOWEST, -1e9, -1e4])
@pytest.mark.parametrize("mask", [HOLES, EMPTY_ROWS])
def test_masked_logits_hide_keys_however_they_are_masked(mask: Tensor, fill: float) -> None:
    t = _tensors()
    facts = _facts(t["q"], t["k"], causal=None)
    got, _ = _written_out(
        t, facts, lambda logits: logits.masked_fill(~mask, 0.0) + torch.zeros(5, 5).masked_fill(~mask, fill)
    )
    exact = _exact(t, _facts(t["q"], t["k"]), mask)
    for name in ("logit_max", "entropy", "entropy_norm", "sink", "lse", "lse_max"):
        assert np.isfinite(got[f"attention/{name}"]).all()
    alive = mask.any(-1)
    entropy = exact["entropy"][:, :, alive].mean((0, 2))
    _close(got["attention/entropy"], entropy, rtol=1e-4, atol=2e-6)
    _close(got["attention/logit_max"], exact["logits"].amax((0, 2, 3)))
    assert (got["attention/shadow_rms"] < 1e-6).all()


@pytest.mark.parametrize("first", [0, 1])
def test_sink_columns_take_a_share_and_are_no_keys(first: int) -> None:
    t = _tensors(G=2)
    sink = torch.linspace(-1, 2, 4).view(1, 4, 1, 1).expand(2, 4, 5, 1)
    facts = _facts(t["q"], t["k"], sinks=True, first_key=first)
    got, whole = _written_out(t, facts, lambda logits: torch.cat([sink, logits] if first else [logits, sink], -1))
    p = whole.softmax(-1)[..., first : first + 5]
    _close(got["attention/entropy"], -torch.special.xlogy(p, p).sum(-1).mean((0, 2)))
    _close(got["attention/sink"], p[..., 0].mean((0, 2)))
    _close(got["attention/lse"], whole.logsumexp(-1).mean((0, 2)))
    _close(got["attention/logit_max"], whole[..., first : first + 5].amax((0, 2, 3)))
    assert (got["attention/shadow_rms"] < 1e-6).all()
    assert (got["law/euler"] < 1e-5).all()
    assert (got["law/key_shift"] > 1e-3).all()


def test_logits_that_are_no_numbers_are_not_taken_for_masked() -> None:
    t = _tensors()
    facts = _facts(t["q"], t["k"])
    t["q"][0, 1, 2, 3] = math.nan
    got, _ = _written_out(t, facts)
    assert np.isnan(got["attention/logit_max"]).tolist() == [False, True, False, False]
    assert np.isfinite(got["attention/entropy"]).all()


def test_keys_of_one_sequence_serve_a_batch() -> None:
    t = _tensors(B=3, G=2)
    facts = _facts(t["q"], t["k"])
    t["k"], t["v"] = t["k"][:1], t["v"][:1]
    q, k, v = (t[role].clone().requires_grad_() for role in "qkv")
    out = sdpa(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), enable_gqa=True)
    gradients = dict(zip("qkv", torch.autograd.grad(out, (q, k, v), t["do"]), strict=True))
    tensors = {"q": q.detach(), "k": k.detach(), "v": v.detach(), "out": out.detach()}
    found = dict(forward(facts, tensors, _every_row(facts, 3)))
    found |= backward(facts, tensors, {**gradients, "out": t["do"]})
    got = finish(facts, {name: x.reshape(-1).double().numpy() for name, x in found.items()})
    for law in LAWS:
        assert len(got[law]) == 2
        assert (got[law] < 1e-5).all()
    delta = (t["do"] * out.detach()).sum(-1, keepdim=True)
    u = (delta * q.detach()).sum((0, 2)).unflatten(0, (2, 2)).sum(1) * facts["scale"]
    _close(got["law/bias_den"], u.square().sum(1), rtol=1e-4)
    assert (got["attention/shadow_rms"] < 1e-6).all()


def test_without_an_output_the_rest_is_still_read() -> None:
    t = _tensors()
    facts = _facts(t["q"], t["k"])
    q, k, v = (t[role].clone().requires_grad_() for role in "qkv")
    logits = q @ k.mT * facts["scale"]
    gradients = dict(zip("qkv", torch.autograd.grad(logits.softmax(-1) @ v, (q, k, v), t["do"]), strict=True))
    tensors = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
    found = dict(forward(facts, {**tensors, "logits": logits.detach()}, _every_row(facts, 2)))
    found |= backward(facts, tensors, gradients)
    got = finish(facts, {name: x.reshape(-1).double().numpy() for name, x in found.items()})
    full = _run(t, facts)
    missing = {name for name in full if name not in got}
    assert missing == {
        *("attention/out_rms", "attention/out_absmax", "attention/grad_out_norm", "attention/shadow_bias"),
        *("attention/shadow_rms", "attention/grad_delta", "attention/grad_delta_sign"),
        *("law/value_mass", "law/bias_num", "law/bias_den", "law/hull", "law/shadow", "law/key_gain"),
    }
    assert (got["law/key_shift"] < 1e-5).all()
    _close(got["attention/entropy"], full["attention/entropy"])
