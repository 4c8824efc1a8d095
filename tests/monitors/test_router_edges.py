"""Every metric of the router probe is that of float64 on the same tensors: dtypes, scorings, sizes, selection biases, edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock import Watch
from foreshock.monitors.router_probe import BINS_A_DECADE, ROUTER, backward, finish, forward

Arrays = dict[str, np.ndarray]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCORINGS = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
    "sqrtsoftplus": lambda x: functional.softplus(x).sqrt(),
    "none": lambda x: x,
}
SIZES = {  # tokens, experts, chosen
    "usual": (64, 6, 2),
    "odd": (7, 5, 3),
    "one token": (1, 6, 2),
    "one expert": (9, 1, 1),
    "all experts": (9, 4, 4),
    "more experts than tokens": (3, 33, 8),
    "one choice": (33, 8, 1),
}
WITHOUT_NUMBERS = ("entropy", "entropy_norm", "gate_mass", "z", "logit_absmax")


def drawn(tokens: int, experts: int, dtype: torch.dtype = torch.float32, size: float = 2.0) -> Tensor:
    return (torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)) * size).to(dtype)


def log_mass(logits: Tensor, scoring: str) -> Tensor:
    exact = logits.double()
    if scoring == "sigmoid":
        return functional.logsigmoid(exact)
    if "softplus" in scoring:
        log = torch.where(exact < -30, exact, functional.softplus(exact).log())
        return log / 2 if scoring == "sqrtsoftplus" else log
    return exact


def reference(facts: dict[str, Any], t: dict[str, Tensor]) -> dict[str, Any]:
    """All metrics of a choice by indices, one token after the other."""
    logits, experts, k = t["logits"].double(), facts["experts"], facts["top_k"]
    p = log_mass(t["logits"], facts["scoring"]).softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1).mean()
    load, mass = np.zeros(experts), np.zeros(experts)
    margins, overlaps = [], []
    for token, chosen in enumerate(t["indices"].tolist()):
        gates = log_mass(t["logits"], facts["scoring"])[token, chosen].softmax(-1).tolist()
        for expert, gate in zip(chosen, gates, strict=True):
            load[expert] += 1
            mass[expert] += gate
        ordered = t["scores"][token].double().sort(descending=True)[0]
        if k < experts and torch.isfinite(ordered[k - 1] - ordered[k]):
            margins.append((ordered[k - 1] - ordered[k]).item())
        if "unbiased" in t:
            overlaps.append(overlap(t["unbiased"][token].tolist(), chosen, t["open"][token].tolist(), k))
    share = load / load.sum()
    spread = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum()
    found: dict[str, Any] = {
        "router/entropy": entropy,
        "router/load": share,
        "router/load_max_ratio": share.max() * experts,
        "router/max_violation": share.max() * experts - 1,
        "router/load_cv": share.std() * experts,
        "router/load_entropy": spread,
        "router/effective_experts": np.exp(spread),
        "router/dead_experts": (share < 0.1 / experts).mean(),
        "router/gate_mass": mass / mass.sum(),
        "router/z": logits.logsumexp(-1).square().mean(),
        "router/logit_absmax": logits.abs().max(),
        "router/nonfinite": (~torch.isfinite(logits)).sum(),
        "router/input_rms": t["input"].double().square().mean().sqrt(),
        "router/input_absmax": t["input"].double().abs().max(),
        "law/token_count": 0.0,
    }
    found["router/entropy_norm"] = math.nan if experts == 1 else entropy / math.log(experts)
    if k < experts:
        found["router/margin"] = np.mean(margins) if margins else math.nan
        found["router/margin_p1"], found["router/margin_p10"] = (
            np.quantile(margins, share, method="inverted_cdf") if margins else math.nan for share in (0.01, 0.1)
        )
    if "unbiased" in t:
        bias = t["bias"].double() * (-1 if facts.get("bias_subtracted") else 1)
        found |= {
            "router/bias_overlap": np.mean(overlaps),
            "router/bias_mean": bias.mean(),
            "router/bias_spread": bias.std(correction=0),
        }
    return found


def overlap(scores: list[float], chosen: list[int], may: list[bool], k: int) -> float:
    """Jaccard of ``chosen`` with the k best of ``scores`` that may be taken; among equals those that were chosen come first."""
    order = sorted(range(len(scores)), key=lambda e: (not may[e], -scores[e], e not in chosen))
    free = set(order[:k])
    return len(free & set(chosen)) / len(free | set(chosen))


def measured(facts: dict[str, Any], t: dict[str, Tensor]) -> Arrays:
    found = forward(facts, {role: x for role, x in t.items() if role != "open"}, torch.zeros(0))
    return finished(facts, found)


def finished(facts: dict[str, Any], found: Any) -> Arrays:
    return dict(finish(facts, {name: x.reshape(-1).double().numpy() for name, x in found.items()}))


def agree(got: Arrays, expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, values in got.items():
        wanted = np.asarray(expected[name], np.float64).reshape(-1)
        if name in ("router/margin_p1", "router/margin_p10"):  # from bins
            factor = 10 ** (1 / BINS_A_DECADE)
            near = (values <= wanted * factor + 1e-6) & (values >= wanted / factor - 1e-6)
            assert (near | (np.isnan(values) & np.isnan(wanted))).all(), (name, values, wanted)
        else:
            np.testing.assert_allclose(values, wanted, rtol=2e-5, atol=1e-6, err_msg=name)


def routed(size: str, scoring: str, dtype: torch.dtype = torch.float32, **facts: Any) -> tuple[dict[str, Any], Any]:
    tokens, experts, k = SIZES[size]
    logits = drawn(tokens, experts, dtype)
    scores = SCORINGS[scoring](logits)
    told = {"experts": experts, "top_k": k, "scoring": scoring, **facts}
    return told, {"logits": logits, "scores": scores, "indices": scores.topk(k)[1], "input": drawn(tokens, 16, dtype)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: torch.dtype, scoring: str, size: str) -> None:
    told, t = routed(size, scoring, dtype)
    agree(measured(told, t), reference(told, t))


@pytest.mark.parametrize("masked", [None, 0.0, -math.inf])
@pytest.mark.parametrize("subtracted", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_selection_bias(dtype: torch.dtype, scoring: str, subtracted: bool, masked: float | None) -> None:
    """With groups that lost masked out, as DeepSeek does, the choice is repeated among the rest."""
    told, t = routed("usual", scoring, dtype, **({"bias_subtracted": True} if subtracted else {}))
    bias = torch.linspace(-0.4, 0.5, 6).to(dtype) * (-1 if subtracted else 1)
    biased = t["scores"] - bias if subtracted else t["scores"] + bias
    closed = torch.zeros(64, 6).bool()
    if masked is not None:
        closed[::2, :3] = True
        closed[1::2, 3:] = True
        biased = biased.masked_fill(closed, masked if scoring != "none" else -math.inf)
    t |= {"unbiased": t["scores"], "bias": bias, "scores": biased, "indices": biased.topk(2)[1], "open": ~closed}
    got = measured(told, t)
    agree(got, reference(told, t))
    assert 0.3 < got["router/bias_overlap"] < 1


def test_no_bias_changes_no_choice() -> None:
    told, t = routed("usual", "sigmoid")
    t["logits"] = torch.zeros(64, 6)  # all alike: whoever wins the tie would have won it
    scores = t["logits"].sigmoid()
    t |= {"unbiased": scores, "bias": torch.zeros(1, 6), "scores": scores}
    got = measured(told, t)
    assert (got["router/bias_overlap"], got["router/bias_mean"], got["router/bias_spread"]) == (1, 0, 0)
    np.testing.assert_allclose(got["router/entropy"], math.log(6), rtol=1e-6)
    assert (got["router/margin"], got["router/margin_p10"] < 1e-6) == (0, True)


def test_a_choice_by_other_scores_is_compared_with_all_experts() -> None:
    """Where more than the bias stands between the scores, which experts were barred is not told."""
    told, t = routed("usual", "sigmoid")
    bias = torch.linspace(-0.4, 0.5, 6)
    scores = (t["scores"] + bias) * 2.5
    t |= {"unbiased": t["scores"], "bias": bias, "scores": scores, "indices": scores.topk(2)[1]}
    t["open"] = torch.ones(64, 6).bool()
    agree(measured(told, t), reference(told, t))


def test_a_bias_adds_up_over_microbatches() -> None:
    told, t = routed("usual", "sigmoid")
    merged: dict[str, Tensor] = {}
    for bias in (torch.zeros(6), torch.linspace(-0.4, 0.5, 6)):
        scores = t["scores"] + bias
        one = {**t, "unbiased": t["scores"], "bias": bias, "scores": scores, "indices": scores.topk(2)[1]}
        for name, x in forward(told, one, torch.zeros(0)).items():
            known = merged.get(name)
            merged[name] = x if known is None else torch.maximum(known, x) if name in ROUTER.maxima else known + x
    got = finished(told, merged)
    np.testing.assert_allclose(got["router/bias_mean"], 0.025, rtol=1e-5)
    np.testing.assert_allclose(got["router/bias_spread"], np.linspace(-0.2, 0.25, 6).std(), rtol=1e-5)


@pytest.mark.parametrize("scoring", ["sigmoid", "softplus", "sqrtsoftplus"])
@pytest.mark.parametrize("size", [-150.0, 60.0])
def test_scores_that_underflow_still_have_shares(scoring: str, size: float) -> None:
    """In float32 every sigmoid is 0 at -150; the shares of a token are those of the logits all the same."""
    told, t = routed("usual", scoring)
    t["logits"] = t["logits"] + size
    agree({**measured(told, t)}, reference(told, t))


def test_experts_that_are_masked_out_have_no_share() -> None:
    told, t = routed("usual", "softmax")
    t["logits"][:, 4:] = -math.inf
    t["scores"] = t["logits"].softmax(-1)
    t["indices"] = t["scores"].topk(2)[1]
    got = measured(told, t)
    agree(got, reference(told, t))
    assert got["router/nonfinite"] == [128]
    assert np.isfinite(got["router/entropy"]).all()
    np.testing.assert_allclose(got["router/dead_experts"], 2 / 6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_logit_that_is_no_number(dtype: torch.dtype, scoring: str, value: float) -> None:
    """The load needs only the choice; what needs the logits is not available where NaN or plus infinity stands among them."""
    told, t = routed("usual", scoring, dtype)
    t["logits"][3, 2] = value
    t["scores"] = SCORINGS[scoring](t["logits"])
    t["indices"] = t["scores"].topk(2)[1]
    got, load = measured(told, t), torch.bincount(t["indices"].reshape(-1), minlength=6) / 128
    np.testing.assert_allclose(got["router/load"], load)
    assert got["router/nonfinite"] == [1]
    assert np.isfinite(got["router/margin"]).all()
    for name, values in got.items():
        if name.removeprefix("router/") not in WITHOUT_NUMBERS:
            assert np.isfinite(values).all(), name
    assert not np.isfinite(got["router/logit_absmax"]).all()
    assert np.isnan(got["router/entropy"]).all() == (math.isnan(value) or (value > 0 and scoring != "sigmoid"))


def test_nothing_assigned_is_nothing_known_of_the_load() -> None:
    logits = drawn(8, 6)
    told = {"experts": 6, "top_k": None, "scoring": "softmax", "selection": "threshold"}
    taken = torch.zeros(8, 6).bool()
    got = measured(told, {"logits": logits, "scores": logits.softmax(-1), "chosen": taken})
    for name in ("load", "load_max_ratio", "max_violation", "load_cv", "load_entropy", "effective_experts", "margin"):
        assert np.isnan(got[f"router/{name}"]).all(), name
    assert np.isnan(got["router/dead_experts"]).all()
    assert np.isnan(got["router/gate_mass"]).all()
    assert (got["router/unserved_tokens"], got["router/experts_per_token"]) == (1, 0)
    dropped = torch.full((8, 2), -1)
    got = measured(
        {"experts": 6, "top_k": 2, "scoring": "softmax"},
        {"logits": logits, "scores": logits.softmax(-1), "indices": dropped},
    )
    assert np.isnan(got["router/load"]).all()
    assert got["law/token_count"] == [0]


def test_margins_of_bare_logits_are_not_cut_off_at_one() -> None:
    told, t = routed("usual", "none")
    t["scores"] = t["logits"] = t["logits"] * 100
    got = measured(told, t)
    agree(got, reference(told, t))
    assert got["router/margin_p10"] > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: torch.dtype) -> None:
    told, t = routed("usual", "softmax", dtype)
    g = drawn(64, 6, dtype, 0.1)
    got = finished(told, backward(told, t, {"logits": g}))
    exact = g.double()
    np.testing.assert_allclose(got["router/grad_norm"], exact.norm(), rtol=1e-5)
    surest = t["logits"].double().softmax(-1).amax(-1)
    floor = exact.numel() * torch.finfo(dtype).tiny ** 2 if dtype is torch.float16 else 0.0
    size = (exact.square().sum(-1) / (1 - surest).clamp(min=2.0**-24).square()).sum() + floor
    np.testing.assert_allclose(got["law/router_shift"], (exact.sum(-1).square().sum() / size).sqrt(), rtol=1e-4)
    assert got["router/grad_nonfinite"] == [0]
    zero = finished(told, backward(told, t, {"logits": torch.zeros_like(g)}))
    assert zero["router/grad_norm"] == [0]
    assert zero["law/router_shift"] == [0] if dtype is torch.float16 else np.isnan(zero["law/router_shift"]).all()
    g[3, 2], g[5, 1] = math.nan, math.inf
    broken = finished(told, backward(told, t, {"logits": g}))
    assert broken["router/grad_nonfinite"] == [2]
    assert np.isnan(broken["router/grad_norm"]).all()


# -- through a compiled model --------------------------------------------------------------------------------------------


class Biased(nn.Module):
    """A router with a selection bias; ``groups`` as DeepSeek has them, ``sign`` of the bias."""

    def __init__(self, groups: bool, sign: int) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 6, bias=False)
        self.experts = nn.Parameter(torch.randn(6, 8, 8) * 0.3)
        self.register_buffer("bias", torch.linspace(-0.2, 0.3, 6))
        self.groups, self.sign = groups, sign

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The choice, and which experts were open to it."""
        moved, every = scores + self.bias if self.sign > 0 else scores - self.bias, torch.ones_like(scores).bool()
        if self.groups:
            best = moved.view(-1, 3, 2).topk(2, dim=-1)[0].sum(-1)
            group = torch.topk(best, k=2, dim=-1, sorted=False)[1]
            every = torch.zeros_like(best).scatter_(1, group, 1).unsqueeze(-1).expand(-1, 3, 2).reshape(-1, 6).bool()
            moved = moved.masked_fill(~every, 0.0)
        return moved.topk(2, dim=-1)[1], every

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        chosen, _ = self.choose(scores)
        weights = scores.gather(1, chosen)
        combine = torch.zeros_like(scores).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
        return torch.einsum("te,td,edf->tf", combine, x, self.experts)


@pytest.mark.parametrize(
    ("inner", "sign", "groups"),
    [
        *((inner, s, g) for inner in ("eager", "aot_eager") for s in (1, -1) for g in (False, True)),
        ("inductor", 1, True),
    ],
)
def test_a_selection_bias_in_a_compiled_model(one_thread: None, inner: str, sign: int, groups: bool) -> None:
    model, x = Biased(groups, sign), torch.randn(64, 8) * 2
    with Watch(every=1, inner=inner, strict=True, detectors=[]).bind(model) as watch:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        torch.compile(model, backend=watch.backend)(x).square().sum().backward()
        optimizer.step()
        got = {name: watch.series(name)[1].item() for name in watch.metrics() if "bias" in name}
        (site,) = watch.sites
    assert site.biased
    scores = model.gate(x).detach().sigmoid()
    chosen, may = model.choose(scores)
    rows = zip(scores.tolist(), chosen.tolist(), may.tolist(), strict=True)
    expected = np.mean([overlap(row, taken, mask, 2) for row, taken, mask in rows])
    assert got == {
        "router/bias_overlap": pytest.approx(expected, rel=1e-6),
        "router/bias_mean": pytest.approx(sign * 0.05, rel=1e-5),
        "router/bias_spread": pytest.approx(np.linspace(-0.2, 0.3, 6).std(), rel=1e-5),
    }
    assert 0.3 < expected < 1
