"""The router probe against float64 arithmetic on the same logits, eagerly and through a compiled model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foreshock import Watch
from foreshock.monitors.metrics import metric
from foreshock.monitors.router_probe import ROUTER, finish, forward

T, E, K = 64, 6, 2


def _facts(**facts):
    return {"experts": E, "top_k": K, "scoring": "softmax", **facts}


def _logits(T: int = T, E: int = E, seed: int = 0) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * 2


def _finished(facts, found) -> dict[str, np.ndarray]:
    return dict(finish(facts, {name: x.reshape(-1).double().numpy() for name, x in found.items()}))


def _run(facts, logits: Tensor, scores: Tensor | None = None, chosen: Tensor | None = None, **more: Tensor):
    if scores is None:
        scores = logits.softmax(-1) if facts["scoring"] == "softmax" else logits.sigmoid()
    chosen = scores.topk(facts["top_k"])[1] if chosen is None else chosen
    tensors = {"logits": logits, "scores": scores, "indices": chosen, **more}
    return _finished(facts, forward(facts, tensors, torch.zeros(0)))


def _close(got: np.ndarray, expected, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    np.testing.assert_allclose(got, np.asarray(expected, dtype=np.float64).reshape(-1), rtol=rtol, atol=atol)


def _agree(got, logits: Tensor, chosen: Tensor, scores: Tensor, scoring: str) -> None:
    """All router metrics, from float64 logits ``[T, E]``, selection scores and choices ``[T, k]``."""
    tokens, experts = logits.shape
    mass = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    p = mass / mass.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(p, p).sum(-1).mean()
    _close(got["router/entropy"], entropy)
    _close(got["router/entropy_norm"], entropy / math.log(experts))
    load = torch.bincount(chosen.reshape(-1), minlength=experts) / chosen.numel()
    _close(got["router/load"], load)
    _close(got["router/load_max_ratio"], load.max() * experts)
    _close(got["router/max_violation"], load.max() * experts - 1, atol=1e-6)
    _close(got["router/load_cv"], load.double().std(correction=0) * experts)
    spread = -torch.special.xlogy(load.double(), load.double()).sum()
    _close(got["router/load_entropy"], spread)
    _close(got["router/effective_experts"], spread.exp())
    gates = p.gather(-1, chosen)
    gates = gates / gates.sum(-1, keepdim=True)
    gate_mass = torch.zeros(experts, dtype=torch.float64).scatter_add(0, chosen.reshape(-1), gates.reshape(-1)) / tokens
    _close(got["router/gate_mass"], gate_mass)
    _close(got["router/z"], logits.logsumexp(-1).square().mean())
    _close(got["router/logit_absmax"], logits.abs().max())
    if chosen.shape[1] < experts:
        ordered = scores.sort(-1, descending=True)[0]
        margin = ordered[:, chosen.shape[1] - 1] - ordered[:, chosen.shape[1]]
        _close(got["router/margin"], margin.mean())
        for name, share in (("p1", 0.01), ("p10", 0.1)):
            (value,) = got[f"router/margin_{name}"]
            below = (margin < value * 10 ** (1 / 6)).double().mean(), (margin < value / 10 ** (1 / 6)).double().mean()
            assert below[1] - 1 / tokens <= share <= below[0] + 1 / tokens


@pytest.mark.parametrize("top_k", [1, 2, 5, 6])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_all_metrics(scoring: str, top_k: int) -> None:
    logits = _logits()
    facts = _facts(scoring=scoring, top_k=top_k)
    got = _run(facts, logits)
    exact = logits.double()
    scores = exact.softmax(-1) if scoring == "softmax" else exact.sigmoid()
    _agree(got, exact, scores.topk(top_k)[1], scores, scoring)
    assert ("router/margin" in got) == (top_k < E)
    assert got["router/dead_experts"] == [0]
    assert got["router/nonfinite"] == [0]


def test_a_selection_bias_moves_the_margin_and_not_the_gates() -> None:
    logits, bias = _logits(), torch.linspace(-0.3, 0.3, E)
    facts = _facts(scoring="sigmoid")
    scores = logits.sigmoid() + bias
    exact = logits.double()
    biased = exact.sigmoid() + bias.double()
    _agree(_run(facts, logits, scores), exact, biased.topk(K)[1], biased, "sigmoid")


def test_batches_of_sequences_are_tokens() -> None:
    logits = _logits()
    got, flat = _run(_facts(), logits.view(4, 16, E)), _run(_facts(), logits)
    assert got.keys() == flat.keys()
    for name, values in got.items():
        np.testing.assert_array_equal(values, flat[name])


def test_dead_experts() -> None:
    chosen = torch.tensor([[0, 1]] * 60 + [[2, 3]] * 4)
    got = _run(_facts(), _logits(), chosen=chosen)
    _close(got["router/load"], np.array([60, 60, 4, 4, 0, 0]) / 128)
    _close(got["router/dead_experts"], [2 / 6])
    _close(got["router/load_max_ratio"], [60 / 128 * 6])


def test_collapse_and_balance_are_the_ends_of_the_scale() -> None:
    one = _run(_facts(top_k=1), torch.tensor([[50.0] + [0.0] * 5]).expand(T, E))
    _close(one["router/entropy"], [0])
    _close(one["router/effective_experts"], [1])
    _close(one["router/load_max_ratio"], [6])
    _close(one["router/margin"], [1])
    even = _run(_facts(), torch.zeros(T, E), chosen=torch.arange(2 * T).view(T, 2) % E)
    _close(even["router/entropy_norm"], [1])
    _close(even["router/margin"], [0])
    _close(even["router/margin_p10"], [0], atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_value_that_is_no_number_is_counted_and_breaks_nothing(scoring: str, value: float) -> None:
    logits = _logits()
    logits[3, 2] = value
    got = _run(_facts(scoring=scoring), logits)
    assert got["router/nonfinite"] == [1]
    assert not np.isfinite(got["router/logit_absmax"]).all()
    _close(got["router/load"].sum(), [1])


def test_tokens_without_another_expert_to_choose_have_no_margin() -> None:
    logits, few = _logits(), torch.arange(T).unsqueeze(-1) < 40
    scores = logits.sigmoid().masked_fill(few & (torch.arange(E) >= K), -math.inf)
    got = _run(_facts(scoring="sigmoid"), logits, scores)
    ordered = logits[40:].double().sigmoid().sort(-1, descending=True)[0]
    _close(got["router/margin"], (ordered[:, K - 1] - ordered[:, K]).mean())
    assert (got["router/margin_p10"] < 1).all()
    assert np.isfinite(got["router/entropy"]).all()
    none = _run(_facts(scoring="sigmoid"), logits, logits.masked_fill(torch.arange(E) >= K, -math.inf))
    assert all(np.isnan(none[name]).all() for name in ("router/margin", "router/margin_p1", "router/margin_p10"))


def test_the_input() -> None:
    x = torch.randn(T, 8, generator=torch.Generator().manual_seed(1))
    got = _run(_facts(), _logits(), input=x)
    _close(got["router/input_rms"], x.double().square().mean().sqrt())
    _close(got["router/input_absmax"], x.abs().max())
    assert "router/input_rms" not in _run(_facts(), _logits())


def test_bins_of_the_margin_add_up() -> None:
    """Percentiles of two microbatches are those of all their tokens, for the sketches are summed, never averaged."""
    logits = torch.cat([_logits() * 0.01, _logits(seed=1) * 3])
    facts, parts = _facts(), {}
    for half in logits.chunk(2):
        scores = half.softmax(-1)
        tensors = {"logits": half, "scores": scores, "indices": scores.topk(K)[1]}
        for name, x in forward(facts, tensors, torch.zeros(0)).items():
            known = parts.get(name)
            parts[name] = x if known is None else torch.maximum(known, x) if name in ROUTER.maxima else known + x
    merged, whole = _finished(facts, parts), _run(facts, logits)
    for name, values in merged.items():
        _close(values, whole[name])


# -- other ways to choose ------------------------------------------------------------------------------------------------


def _same(got, expected) -> None:
    assert got.keys() >= expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-6, err_msg=name)


def test_transposed_logits_say_the_same() -> None:
    logits = _logits()
    scores = logits.softmax(-1)
    chosen = scores.topk(K)[1]
    facts = _facts(axes={"logits": 0, "scores": 0, "chosen": 0})
    _same(_run(facts, logits.T, scores.T, chosen.T), _run(_facts(), logits))


def test_scores_may_lie_otherwise_than_logits() -> None:
    logits = _logits().view(4, 16, E)
    scores = logits.softmax(-1)
    facts = _facts(axes={"logits": 2, "scores": 1, "chosen": 1})
    across = scores.transpose(1, 2)
    _same(_run(facts, logits, across, across.topk(K, dim=1)[1]), _run(_facts(), logits.view(-1, E)))


@pytest.mark.parametrize("keepdim", [False, True])
def test_two_argmaxes_are_a_top_2(keepdim: bool) -> None:
    logits = _logits()
    scores = logits.softmax(-1)
    first = scores.argmax(-1, keepdim=keepdim)
    rest = logits.scatter(-1, first.view(-1, 1), -math.inf)
    facts = _facts(selection="argmax")
    _same(_run(facts, logits, scores, first, indices_2=rest.argmax(-1, keepdim=keepdim)), _run(_facts(), logits))


@pytest.mark.parametrize("inverted", [False, True])
def test_a_mask_of_the_top_k_says_the_same(inverted: bool) -> None:
    logits = _logits()
    scores = logits.softmax(-1)
    taken = torch.zeros(T, E).scatter(-1, scores.topk(K)[1], 1.0) > 0
    facts = _facts(selection="threshold", top_k=None, inverted=inverted)
    tensors = {"logits": logits, "scores": scores, "chosen": taken ^ inverted}
    got = _finished(facts, forward(facts, tensors, torch.zeros(0)))
    top_k = _run(_facts(), logits)
    assert top_k.pop("law/token_count") == [0]
    _same(got, top_k)
    assert "law/token_count" not in got
    assert got["router/unserved_tokens"] == [0]
    assert got["router/experts_per_token"] == got["router/experts_per_token_max"] == [K]


def test_a_threshold_takes_a_varying_number() -> None:
    logits = _logits()
    scores = logits.sigmoid()
    facts = _facts(scoring="sigmoid", selection="threshold", top_k=None)
    taken = scores > 0.8
    got = _finished(facts, forward(facts, {"logits": logits, "scores": scores, "chosen": taken}, torch.zeros(0)))
    given = taken.sum(-1)
    assert 0 < (given == 0).sum() < T
    _close(got["router/unserved_tokens"], (given == 0).double().mean())
    _close(got["router/experts_per_token"], given.double().mean())
    _close(got["router/experts_per_token_max"], given.max())
    _close(got["router/load"], taken.sum(0) / taken.sum())
    p = scores.double() / scores.double().sum(-1, keepdim=True) * taken
    _close(got["router/gate_mass"], (p[given > 0] / p[given > 0].sum(-1, keepdim=True)).sum(0) / (given > 0).sum())
    parted = (given > 0) & (given < E)
    worst = torch.where(taken, scores.double(), math.inf).amin(-1)
    best = torch.where(taken, -math.inf, scores.double()).amax(-1)
    _close(got["router/margin"], (worst - best)[parted].mean())


def test_a_threshold_that_takes_nothing() -> None:
    logits = _logits()
    facts = _facts(scoring="sigmoid", selection="threshold", top_k=None)
    tensors = {"logits": logits, "scores": logits.sigmoid(), "chosen": torch.zeros(T, E, dtype=torch.bool)}
    got = _finished(facts, forward(facts, tensors, torch.zeros(0)))
    assert got["router/unserved_tokens"] == [1]
    assert got["router/experts_per_token"] == [0]
    assert np.isfinite(got["router/entropy"]).all()


@pytest.mark.parametrize("batched", [False, True])
def test_experts_that_choose_tokens(batched: bool) -> None:
    logits = _logits().view(4, 16, E) if batched else _logits()
    scores = logits.softmax(-1).transpose(-1, -2)
    chosen = scores.topk(5, dim=-1)[1]
    dims = logits.dim()
    facts = _facts(selection="tokens", top_k=5, axes={"logits": dims - 1, "scores": dims - 2, "chosen": dims - 1})
    got = _run(facts, logits, scores, chosen)
    taken = torch.zeros_like(scores).scatter(-1, chosen, 1.0).transpose(-1, -2).reshape(T, E)
    _close(got["router/load"], np.full(E, 1 / E))
    _close(got["router/unserved_tokens"], (taken.sum(-1) == 0).double().mean())
    _close(got["router/experts_per_token"], taken.sum(-1).double().mean())
    _close(got["router/experts_per_token_max"], taken.sum(-1).max())
    assert "router/margin" not in got


@pytest.mark.parametrize("scoring", ["softplus", "sqrtsoftplus"])
def test_scores_of_one_expert_at_a_time(scoring: str) -> None:
    logits = _logits()
    scores = torch.nn.functional.softplus(logits)
    scores = scores.sqrt() if scoring == "sqrtsoftplus" else scores
    got = _run(_facts(scoring=scoring), logits, scores)
    p = scores.double() / scores.double().sum(-1, keepdim=True)
    _close(got["router/entropy"], -torch.special.xlogy(p, p).sum(-1).mean())


def test_every_metric_is_described() -> None:
    logits = _logits()
    facts = _facts(selection="threshold", top_k=None)
    tensors = {"logits": logits, "scores": logits, "chosen": logits > 0, "input": logits}
    for name in _finished(facts, forward(facts, tensors, torch.zeros(0))):
        assert metric(name).name == name


# -- through a compiled model --------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    def __init__(self, scoring: str) -> None:
        super().__init__()
        self.gate = nn.Linear(8, E, bias=False)
        self.experts = nn.Parameter(torch.randn(E, 8, 8) * 0.3)
        self.scoring = scoring

    def forward(self, x_TD):
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1) if self.scoring == "softmax" else logits_TE.sigmoid()
        weights_TK, chosen_TK = scores_TE.topk(K, dim=-1)
        combine_TE = torch.zeros_like(scores_TE).scatter(-1, chosen_TK, weights_TK)
        return torch.einsum("te,td,edf->tf", combine_TE, x_TD, self.experts)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_compiled_model_says_the_same(one_thread, inner: str, scoring: str) -> None:
    model, x = Mixture(scoring), torch.randn(2, T, 8)
    exact = Mixture(scoring).double()
    exact.load_state_dict(model.state_dict())
    logits, gradients = [], []
    for batch in x.double():
        seen = []

        def remember(module, args, out, seen=seen) -> None:
            out.retain_grad()
            seen.append(out)

        handle = exact.gate.register_forward_hook(remember)
        exact(batch).square().sum().backward()
        handle.remove()
        logits.append(seen[0].detach())
        gradients.append(seen[0].grad)
    with Watch(every=1, inner=inner, strict=True) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for batch in x:
            compiled(batch).square().sum().backward()
        optimizer.step()
        got = {name: watch.series(name)[1].reshape(-1) for name in watch.metrics()}
        (site,) = watch.sites
    assert (site.kind, site.experts, site.top_k, site.scoring) == ("router", E, K, scoring)
    every = torch.cat(logits)
    scores = every.softmax(-1) if scoring == "softmax" else every.sigmoid()
    _agree(got, every, scores.topk(K)[1], scores, scoring)
    _close(got["router/grad_norm"], torch.cat(gradients).square().sum().sqrt())
    _close(got["router/input_rms"], x.double().square().mean().sqrt())
    assert got["router/grad_nonfinite"] == [0]


class Argmaxes(Mixture):
    """Two experts a token by two argmaxes."""

    def forward(self, x_TD):
        scores_TE = self.gate(x_TD).softmax(-1)
        first_T = scores_TE.argmax(-1)
        rest_TE = scores_TE.masked_fill(torch.nn.functional.one_hot(first_T, E).bool(), 0.0)
        chosen_TK = torch.stack([first_T, rest_TE.argmax(-1)], -1)
        combine_TE = torch.zeros_like(scores_TE).scatter(-1, chosen_TK, scores_TE.gather(-1, chosen_TK))
        return torch.einsum("te,td,edf->tf", combine_TE, x_TD, self.experts)


class Threshold(Mixture):
    def forward(self, x_TD):
        scores_TE = self.gate(x_TD).softmax(-1)
        return torch.einsum("te,td,edf->tf", scores_TE * (scores_TE > 0.2), x_TD, self.experts)


class ExpertChoice(Mixture):
    def forward(self, x_TD):
        weights_EC, chosen_EC = self.gate(x_TD).softmax(-1).T.topk(8, dim=-1)
        y_ECD = torch.bmm(x_TD[chosen_EC.reshape(-1)].view(E, 8, 8), self.experts) * weights_EC.unsqueeze(-1)
        return torch.zeros_like(x_TD).index_add(0, chosen_EC.reshape(-1), y_ECD.reshape(-1, 8))


@pytest.mark.parametrize("kind", [Argmaxes, Threshold, ExpertChoice])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_other_choices_in_a_compiled_model(one_thread, inner: str, kind: type[Mixture]) -> None:
    model, x = kind("softmax"), torch.randn(T, 8)
    scores = model.gate(x).softmax(-1).detach()
    taken = {
        Argmaxes: torch.zeros(T, E).scatter(-1, scores.topk(2)[1], 1.0),
        Threshold: (scores > 0.2).float(),
        ExpertChoice: torch.zeros(E, T).scatter(-1, scores.T.topk(8)[1], 1.0).T,
    }[kind]
    with Watch(every=1, inner=inner, strict=True) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss = compiled(x).square().sum()
        loss.backward()
        torch.testing.assert_close(loss.detach(), model(x).square().sum().detach())
        optimizer.step()
        got = {name: watch.series(name)[1].reshape(-1) for name in watch.metrics()}
        (site,) = watch.sites
    assert site.selection == {Argmaxes: "argmax", Threshold: "threshold", ExpertChoice: "tokens"}[kind]
    _close(got["router/load"], taken.sum(0) / taken.sum())
    assert got["router/grad_norm"] > 0
    if kind is not Argmaxes:
        _close(got["router/unserved_tokens"], (taken.sum(-1) == 0).double().mean())
        _close(got["router/experts_per_token"], taken.sum(-1).double().mean())
