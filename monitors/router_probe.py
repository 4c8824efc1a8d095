"""What is measured at a mixture-of-experts router: how sharply, how evenly and how decidedly it routes.

Shape suffixes: T tokens, E experts, K chosen experts a token. Definitions and sources: `foreshock.monitors.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from foreshock.monitors.attention_probe import bounded, told, underflow
from foreshock.records import Array, Facts, Probe, Tensors

# The margin sketch: bins a factor 10^(1/6) wide from 1e-6, where ties begin, to 1e4 (scores may be bare logits), and one below.
# Fixed bins add up over microbatches and ranks.
SMALLEST, LARGEST, BINS_A_DECADE = -6, 4, 6
BINS = (LARGEST - SMALLEST) * BINS_A_DECADE
MARGIN_EDGES = np.concatenate([[0.0], np.logspace(SMALLEST, LARGEST, BINS + 1)])

DROPPED = -1  # what kernels write where a choice found no room


def _log_softplus(x: Tensor) -> Tensor:
    """``log(log(1 + e^x))``, which is x far below zero, where the inner logarithm vanishes in float32."""
    return torch.where(x < -15, x, torch.nn.functional.softplus(x.clamp(min=-15)).log())


# The logarithm of each expert's mass; the routing distribution is its softmax, whatever underflows in the mass itself.
# With any other scoring it is the softmax of the logits.
_LOG_MASS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda x: -torch.nn.functional.softplus(-x),
    "softplus": _log_softplus,
    "sqrtsoftplus": lambda x: _log_softplus(x) / 2,
}


def forward(facts: Facts, tensors: Tensors, rows: Tensor) -> Mapping[str, Tensor]:
    """Sums over tokens."""
    experts, axes = facts["experts"], facts.get("axes", {})
    logits_TE = _by_expert(tensors["logits"], axes.get("logits", -1), experts, facts.get("first_expert", 0)).float()
    scores_TE = _by_expert(tensors["scores"], axes.get("scores", -1), experts).float()
    scoring = facts["scoring"]
    mass_TE = _LOG_MASS[scoring](logits_TE) if scoring in _LOG_MASS else logits_TE
    log_p_TE = mass_TE.log_softmax(-1)
    entropy_T = -_times(log_p_TE.exp(), log_p_TE).sum(-1)
    chosen_TK = _indices(facts, tensors)
    if chosen_TK is not None:
        assigned, gated = _at(chosen_TK, mass_TE)
        taken_TE = _distinct(chosen_TK, scores_TE)
    else:
        taken_TE = _taken(facts, tensors)
        assigned = taken_TE.float().sum(0)
        gates_TE = torch.where(taken_TE, mass_TE, float("-inf")).softmax(-1)
        gated = torch.where(taken_TE, gates_TE, 0.0).sum(0)
    lse_T = torch.logsumexp(logits_TE, -1)
    found = {
        "tokens": torch.ones_like(lse_T).sum(),
        "entropy": entropy_T.sum(),
        "load": assigned,
        "gate_mass": gated,
        "z": lse_T.square().sum(),
        "logit_absmax": logits_TE.abs().amax(),
        "nonfinite": (~torch.isfinite(logits_TE)).sum().float(),
    }
    if chosen_TK is not None:  # each by itself a whole number: float32 adds zeros exactly, however many tokens
        lost_T = chosen_TK.shape[-1] - taken_TE.sum(-1) - (chosen_TK == DROPPED).sum(-1)
        found |= {"lost": lost_T.float().sum(), "choices": torch.ones_like(chosen_TK, dtype=torch.float32).sum()}
    else:
        given_T = taken_TE.sum(-1)
        found |= {"unserved": (given_T == 0).sum().float(), "given_max": given_T.amax().float()}
    if facts.get("selection") != "tokens" and facts["top_k"] != experts:
        found |= _margins(scores_TE, taken_TE)
    if "unbiased" in tensors:
        unbiased_TE = _by_expert(tensors["unbiased"], axes.get("scores", -1), experts).float()
        found |= _without_bias(facts, tensors, scores_TE, unbiased_TE, taken_TE)
    if "input" in tensors:
        x = tensors["input"].float()
        positions = torch.ones_like(x[..., 0]).sum()
        found |= {
            "input_mean_square": x.square().mean() * positions,
            "input_absmax": x.abs().amax(),
            "input_positions": positions,
        }
    return found


def _times(p: Tensor, x: Tensor) -> Tensor:
    """``p * x``, and zero where p is: what has no share has no say, be x infinite."""
    return torch.where(p == 0, 0.0, p * x)


def _by_expert(x: Tensor, axis: int, experts: int, first: int = 0) -> Tensor:
    """``[T, E]`` of a tensor whose experts lie along ``axis`` from ``first`` on: others may be shared by all tokens."""
    return x.movedim(axis, -1)[..., first : first + experts].reshape(-1, experts)


def _indices(facts: Facts, tensors: Tensors) -> Tensor | None:
    """``[T, K]``: the experts of each token; None where their number varies."""
    if "indices" not in tensors or facts.get("selection") == "tokens":
        return None
    axis, dims = facts.get("axes", {}).get("chosen", -1), tensors["scores"].dim()
    every = [x for role, x in tensors.items() if role.startswith("indices")]
    dropped = facts.get("selection") == "argmax"
    along = [x.unsqueeze(axis) if dropped and x.dim() < dims else x for x in every]
    return torch.cat([x.movedim(axis, -1).reshape(-1, x.shape[axis]) for x in along], -1)


def _at(chosen_TK: Tensor, mass_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Assignments and share of the combine weights, by expert. What is no expert is nobody's."""
    inside_TK = (chosen_TK >= 0) & (chosen_TK < mass_TE.shape[-1])
    at_TK = torch.where(inside_TK, chosen_TK, 0)
    gates_TK = torch.where(inside_TK, mass_TE.gather(-1, at_TK), float("-inf")).softmax(-1)
    gates_TK = torch.where(inside_TK, gates_TK, 0.0)
    nobody_E, each = torch.zeros_like(mass_TE[0]), at_TK.reshape(-1)
    load = nobody_E.scatter_add(0, each, inside_TK.to(mass_TE.dtype).reshape(-1))
    return load, nobody_E.scatter_add(0, each, gates_TK.reshape(-1))


def _distinct(chosen_TK: Tensor, scores_TE: Tensor) -> Tensor:
    """``[T, E]``: which experts a token has. One column more takes what is no expert."""
    experts = scores_TE.shape[-1]
    at_TK = torch.where((chosen_TK >= 0) & (chosen_TK < experts), chosen_TK, experts)
    return torch.zeros_like(scores_TE[:, :1]).expand(-1, experts + 1).scatter(-1, at_TK, 1.0)[:, :experts] > 0


def _taken(facts: Facts, tensors: Tensors) -> Tensor:
    """``[T, E]``: whether a token goes to an expert, where tokens go to varying numbers of experts."""
    axes, experts = facts.get("axes", {}), facts["experts"]
    if "chosen" in tensors:
        taken_TE = (
            _by_expert(tensors["chosen"], axes.get("scores", -1), experts) > 0.5
        )  # a mask, or a hard Gumbel softmax
        return ~taken_TE if facts.get("inverted") else taken_TE
    scores = tensors["scores"]
    picked = torch.zeros_like(scores, dtype=torch.bool).scatter(axes["chosen"], tensors["indices"], True)
    return _by_expert(picked, axes["scores"], experts)


def _margins(scores_TE: Tensor, taken_TE: Tensor) -> dict[str, Tensor]:
    """By how much the last expert taken won against the first one left out."""
    worst_in = torch.where(taken_TE, scores_TE, float("inf")).amin(-1)
    best_out = torch.where(taken_TE, float("-inf"), scores_TE).amax(-1)
    margin_T = worst_in - best_out
    position = (margin_T.clamp(min=1e-30).log10() - SMALLEST) * BINS_A_DECADE
    bin_T = position.nan_to_num().floor().clamp(-1, BINS - 1).long() + 1
    known_T = torch.isfinite(margin_T).float()  # a mask may leave no expert to lose against
    counts = torch.zeros(BINS + 1, dtype=known_T.dtype, device=scores_TE.device).scatter_add(0, bin_T, known_T)
    margin = torch.where(known_T > 0, margin_T, 0.0).sum()
    return {"margin": margin, "margin_tokens": known_T.sum(), "margin_bins": counts}


def _without_bias(
    facts: Facts, tensors: Tensors, scores_TE: Tensor, unbiased_TE: Tensor, taken_TE: Tensor
) -> dict[str, Tensor]:
    """Whether the same experts would have been taken without the selection bias, and the bias itself, an expert each.

    The choice is repeated among the experts that it could take (where groups are chosen first, the others are masked), with ties as
    they fell. An expert masked with the very number that it has counts among them.
    """
    bias_E = tensors["bias"].float().reshape(-1)
    bias_E = -bias_E if facts.get("bias_subtracted") else bias_E
    found = {"bias": bias_E, "bias_calls": torch.ones_like(bias_E[:1])}
    k = facts["top_k"]
    if k is None or facts.get("selection") == "tokens":
        return found
    biased_TE, eps = unbiased_TE + bias_E, torch.finfo(tensors["scores"].dtype).eps
    open_TE = (scores_TE - biased_TE).abs() <= 2 * eps * (unbiased_TE.abs() + bias_E.abs())
    open_TE = open_TE | (open_TE.sum(-1, keepdim=True) < k)  # something else is done to the scores: all may be taken
    known_T = ~torch.isnan(unbiased_TE).any(-1)
    free_TE = torch.where(open_TE, unbiased_TE, float("-inf"))
    least_T1 = free_TE.topk(k, -1)[0].amin(-1, keepdim=True)
    above_TE = free_TE > least_T1
    tied_T = (taken_TE & (free_TE == least_T1)).sum(-1)
    shared_T = (taken_TE & above_TE).sum(-1) + torch.minimum(tied_T, k - above_TE.sum(-1))
    overlap_T = shared_T / (taken_TE.sum(-1) + k - shared_T)
    return {**found, "overlap": torch.where(known_T, overlap_T, 0.0).sum(), "overlap_tokens": known_T.float().sum()}


def backward(facts: Facts, tensors: Tensors, gradients: Tensors) -> Mapping[str, Tensor]:
    """Of the logits' gradient g: its size, and by how much a token's sums to something over the experts.

    What is rounded is the gradient of a probability less its mean, ``g_e = p_e (dp_e - D)``. Where one expert has all but a share
    1 - p of a token, g is that much smaller than what was rounded: each token is weighed by ``1 / (1 - p)``. Experts whose g is
    zero take no part in the softmax (it ran over the chosen ones) or have no share to speak of; but the surest may be rounded to
    zero itself.
    """
    axis, experts = facts.get("axes", {}).get("logits", -1), facts["experts"]
    grad = gradients["logits"]
    g_TE = _by_expert(bounded(grad.float()), axis, experts)
    logits_TE = _by_expert(tensors["logits"], axis, experts).float()
    takes_part_TE = (g_TE != 0) | (logits_TE == logits_TE.amax(-1, keepdim=True))
    surest_T = torch.where(takes_part_TE, logits_TE, float("-inf")).softmax(-1).amax(-1)
    left_T = (1 - torch.where(torch.isnan(surest_T), 0.0, surest_T)).clamp(min=2.0**-24)
    size_T = g_TE.square().sum(-1)
    return {
        "grad": size_T.sum(),
        "shift": g_TE.sum(-1).square().sum(),
        "shift_norm": (size_T / left_T.square()).sum() + underflow(grad),
        "grad_nonfinite": (~torch.isfinite(grad)).sum().float(),
    }


def _quantile(bins: Array, share: float) -> float:
    """The margin below which ``share`` of tokens lie, interpolated in its bin."""
    below = np.concatenate([[0.0], np.cumsum(bins)])
    return float(np.interp(share * below[-1], below, MARGIN_EDGES)) if below[-1] > 0 else np.nan


def finish(facts: Facts, q: Mapping[str, Array]) -> Mapping[str, Array]:
    """Merged sums -> metrics. 0/0 is NaN: not available."""
    found: dict[str, Array] = {}
    one = np.atleast_1d
    with np.errstate(divide="ignore", invalid="ignore"):
        if "tokens" in q:
            tokens, experts = float(q["tokens"][0]), facts["experts"]
            load = q["load"] / q["load"].sum()  # NaN where nothing was assigned, and so is all that follows from it
            mean = 1.0 / experts
            spread = -np.sum(np.where(load == 0, 0.0, load * np.log(np.where(load == 0, 1.0, load))))
            found |= {
                "router/entropy": q["entropy"] / tokens,
                "router/entropy_norm": q["entropy"] / tokens / np.log(experts),
                "router/load": load,
                "router/load_max_ratio": one(load.max() / mean),
                "router/max_violation": one(load.max() / mean - 1),
                "router/load_cv": one(load.std() / mean),
                "router/load_entropy": one(spread),
                "router/effective_experts": one(np.exp(spread)),
                "router/dead_experts": one(np.mean(np.where(np.isnan(load), np.nan, load < 0.1 * mean))),
                "router/gate_mass": q["gate_mass"] / q["gate_mass"].sum(),
                "router/z": q["z"] / tokens,
                "router/logit_absmax": q["logit_absmax"],
                "router/nonfinite": q["nonfinite"],
            }
            if "unserved" in q:
                found["router/unserved_tokens"] = q["unserved"] / tokens
                found["router/experts_per_token"] = one(q["load"].sum() / tokens)
                found["router/experts_per_token_max"] = q["given_max"]
            if "margin" in q:
                found["router/margin"] = q["margin"] / q["margin_tokens"]
                for name, share in (("p1", 0.01), ("p10", 0.10)):
                    found[f"router/margin_{name}"] = one(_quantile(q["margin_bins"], share))
            if "bias" in q:
                bias = q["bias"] / q["bias_calls"]
                found["router/bias_mean"], found["router/bias_spread"] = one(bias.mean()), one(bias.std())
            if "overlap" in q:
                found["router/bias_overlap"] = q["overlap"] / q["overlap_tokens"]
            if "input_positions" in q:
                found["router/input_rms"] = np.sqrt(q["input_mean_square"] / q["input_positions"])
                found["router/input_absmax"] = q["input_absmax"]
            if "choices" in q:
                found["law/token_count"] = q["lost"] / q["choices"]
        if "grad" in q:
            found["law/router_shift"] = np.sqrt(q["shift"] / told(q["shift_norm"]))
            found["router/grad_norm"] = np.sqrt(q["grad"])
            found["router/grad_nonfinite"] = q["grad_nonfinite"]
    return found


ROUTER = Probe(
    name="router",
    kind="router",
    forward=forward,
    finish=finish,
    backward=backward,
    maxima=frozenset({"logit_absmax", "input_absmax", "given_max"}),
)
