"""flex_attention: what its two small graphs say, and the laws through a training step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import flex_attention as flex

from foreshock import Watch

B, S, H, G, D, HIDDEN = 2, 16, 4, 2, 16, 32
BIAS = torch.linspace(-1, 1, H)


def _block(mask):
    return flex.create_block_mask(mask, None, None, S, S, device="cpu")


class Flex(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.q = nn.Linear(HIDDEN, H * D, bias=False)
        self.k, self.v = (nn.Linear(HIDDEN, G * D, bias=False) for _ in range(2))
        self.options = options

    def forward(self, x):
        q, k, v = (y(x).unflatten(-1, (-1, D)).transpose(1, 2) for y in (self.q, self.k, self.v))
        return flex.flex_attention(q, k, v, enable_gqa=True, **self.options)


@pytest.fixture(autouse=True)
def trained_on_cpu(monkeypatch) -> None:
    """PyTorch refuses to train flex_attention on a CPU, although its reference implementation can."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)


def _seen(score, b, h, i, j):
    return torch.where(i >= j, score, -float("inf"))


CASES = {
    "plain": ({}, {"causal": False, "masked": False, "scale": 0.25}, ()),
    "causal": ({"block_mask": lambda b, h, i, j: i >= j}, {"causal": True, "masked": False}, ()),
    "causal, turned": ({"block_mask": lambda b, h, i, j: j <= i}, {"causal": True, "masked": False}, ()),
    "causal, from zero": ({"block_mask": lambda b, h, i, j: j + 0 <= i + 0}, {"causal": True, "masked": False}, ()),
    "window": (
        {"block_mask": lambda b, h, i, j: (i >= j) & (i - j < 4)},
        {"causal": True, "masked": True, "recompute": False},
        ("value_mass",),
    ),
    "shifted": ({"block_mask": lambda b, h, i, j: i >= j + 1}, {"causal": None, "masked": True}, ("value_mass",)),
    "future": ({"block_mask": lambda b, h, i, j: i <= j}, {"causal": None, "masked": True}, ("value_mass",)),
    "scale": ({"scale": 0.5}, {"scale": 0.5}, ()),
    "scaled score": ({"score_mod": lambda s, b, h, i, j: s * 2}, {"scale": 0.5}, ()),
    "bias": (
        {"score_mod": lambda s, b, h, i, j: s + BIAS[h] * (j - i)},
        {"scale": 0.25, "recompute": False, "softcap": None},
        (),
    ),
    "cap": (
        {"score_mod": lambda s, b, h, i, j: 20.0 * torch.tanh(s / 20.0)},
        {"softcap": 20.0, "scale": 0.25, "recompute": False},
        ("key_shift", "bias"),
    ),
    "hidden": ({"score_mod": _seen}, {"masked": True, "recompute": False}, ("value_mass",)),
    "by position": (
        {"score_mod": lambda s, b, h, i, j: s * (i - j)},
        {"scale": None, "recompute": False},
        ("key_shift", "bias"),
    ),
}  # fmt: skip


def _model(case: str) -> Flex:
    options = dict(CASES[case][0])
    if "block_mask" in options:
        options["block_mask"] = _block(options["block_mask"])
    return Flex(**options)


@pytest.mark.parametrize("case", CASES)
def test_each_modification_is_read_as_far_as_it_is_plain(capture, case: str) -> None:
    _, facts, broken = CASES[case]
    model = _model(case)
    match = capture(model, torch.randn(B, S, HIDDEN)).match
    assert match.pattern == "flex_attention"
    assert match.facts.items() >= {"heads": H, "kv_heads": G, "head_dim": D, **facts}.items()
    read = match.facts["causal"] is not None and match.facts.get("recompute", True)
    lost = set(broken) if read else {*broken, "shadow"}
    assert {law.removeprefix("law/") for law, reason in match.laws.items() if reason} == lost
    assert match.weights["q_weight"].names == ("q.weight",)
    assert match.weights["k_weight"].read_by(H) == (0, 0, 1, 1)
    assert match.operands == {"q": 0, "k": 1, "v": 2}


@pytest.mark.parametrize("case", CASES)
def test_laws_that_are_said_to_hold_do(one_thread, case: str) -> None:
    model = _model(case)
    with Watch(every=1, inner="aot_eager", strict=True, detectors=[]) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compiled(torch.randn(B, S, HIDDEN)).square().sum().backward()
        optimizer.step()
        watch.flush()
        (status,) = watch.coverage
        held = [law for law, reason in status.laws.items() if not reason and law != "law/bias"]
        assert "law/euler" in held
        for law in held:
            assert np.nanmax(watch.series(law)[1]) < 1e-5, law
        assert ("attention/shadow_rms" in watch.metrics()) == ("recompute" not in status.site.facts)
        if "attention/shadow_rms" in watch.metrics():
            assert (watch.series("attention/shadow_rms")[1] < 1e-5).all()


def test_an_output_nobody_uses_is_no_site(capture) -> None:
    def call(q):
        return flex.flex_attention(q, q, q, return_aux=flex.AuxRequest(lse=True))[1].lse

    captured = capture(call, torch.randn(1, 2, S, D))
    assert captured.findings.matches == ()
    assert captured.reasons == ["its output is not used"]
