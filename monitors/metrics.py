"""Every metric by name, defined once: its formula, unit, axis, how it merges, its cost, where it comes from, what a move means.

``foreshock metrics`` prints this table; ``make docs`` writes docs/metrics.md and the table in README.md from it.
NaN is "not available" in every metric; docs/metrics.md says when.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from foreshock.errors import ConfigError
from foreshock.monitors import second_tier

STATISTICS = ("norm", "stable_rank", "entropy", "effective_rank")
FAMILIES = {
    "law": "laws",
    "attention": "attention",
    "router": "router",
    "optim": "optim",
    "run": "run",
    **second_tier.KINDS,
}

SOURCES: Mapping[str, str] = {
    "[P]": "arXiv 2606.28116",
    "[F]": "arXiv 2510.04212",
    "[W]": "arXiv 2309.14322",
    "[Z]": "arXiv 2303.06296",
    "[S]": "arXiv 2202.08906",
    "[X]": "arXiv 2202.09368",
    "[B]": "arXiv 2408.15664",
    "[K]": "Kimi K2 report",
    "[A]": "the algebra of softmax, docs/laws.md",
    **second_tier.SOURCES,
}
AXES: Mapping[str, str] = {
    "scalar": "one number",
    "heads": "one number a query head",
    "kv_heads": "one number a key or value head",
    "experts": "one number an expert",
    "q,k,v,out": "four numbers, of q, k, v and out (three where the output has no tensor of its own)",
    **second_tier.AXES,
}
MERGES: Mapping[str, str] = {
    "sum": "added up",
    "max": "the largest",
    "mean": "a mean weighted by rows, tokens or positions",
    "ratio": "a ratio of sums, each added up",
    "none": "read once a step, from parameters, settings or the last samples",
}
COSTS: Mapping[str, str] = {
    "cheap": "a fused reduction over the tensors at the boundary, in the forward pass",
    "gradients": "the same over their gradients, in the backward pass",
    "rows": "a few sampled rows of the attention recomputed: R / S of its forward pass",
    "weights": "reads parameters, or all gradients, between two steps",
    "free": "made of other readings, or of numbers that are there anyway: no tensor is read",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``axis`` (one of `AXES`) is its shape: what its values run over. ``merge`` (`MERGES`) says how the samples of
    one step combine over microbatches and ranks, ``cost`` (`COSTS`) what measuring it takes."""

    name: str
    formula: str
    unit: str
    axis: str
    merge: str
    source: str
    meaning: str
    cost: str = "cheap"


def _rows(family: str, cost: str, *rows: tuple[str, str, str, str, str, str, str]) -> tuple[Metric, ...]:
    return tuple(Metric(f"{family}/{row[0]}", *row[1:], cost) for row in rows)


def _spectral() -> tuple[Metric, ...]:
    matrices = {
        "delta2": ("dWq Wk^T + Wq dWk^T", "the first-order change of the QK circuit; the earliest weight signal"),
        "delta3": ("dWq dWk^T", "the coupling of the query and key updates; later than delta2"),
        "dwq": ("Wq_t - Wq_base", "the query update itself; a later confirmation"),
        "dwk": ("Wk_t - Wk_base", "the key update itself; a later confirmation"),
    }
    statistics = {
        "norm": ("Frobenius norm of {}", "", "A rise above the run's own past is faster movement of {}."),
        "stable_rank": ("sum s^2 / max s^2 of {}", "", "A fall says one direction dominates {}."),
        "entropy": ("-sum p log p, p = s^2 / sum s^2, of {}", "nats", "A fall says few directions carry {}."),
        "effective_rank": ("exp of the spectral entropy of {}", "", "A fall against the run's own past narrows {}."),
    }
    spectra = [
        (f"{matrix}_{name}", formula.format(product), unit, "heads", "none", "[P]", meaning.format(sense))
        for matrix, (product, sense) in matrices.items()
        for name, (formula, unit, meaning) in statistics.items()
    ]
    told = "Near 1 a single entry changed: where its head jumped, a flipped bit, which no batch does."
    peaks = [
        (
            f"{matrix}_peak",
            f"max |x| / |x|, x = {matrices[matrix][0]}",
            "",
            "heads",
            "none",
            "measured, docs/log.md",
            told,
        )
        for matrix in ("dwq", "dwk")
    ]
    return _rows("attention", "weights", *spectra, *peaks)


# fmt: off
METRICS: tuple[Metric, ...] = (
    *_rows("law", "gradients",
        ("key_shift", "|sum_j dK_j| / sqrt(sum |dK_j|^2)", "", "kv_heads", "ratio", "[A]",
         "Above its floor the attention backward is wrong: D, O or P carries a bias. No learning rate or data can do this."),
        ("value_mass", "|sum_j dV_j - sum_i dO_i| / sqrt(|sum_j dV_j|^2 + |sum_i dO_i|^2)", "", "kv_heads", "ratio", "[A]",
         "Above its floor P in the backward is not the P of the forward, or blocks were dropped."),
        ("euler", "|sum_i <q,dQ> - sum_j <k,dK>| / sqrt(sum_i <q,dQ>^2 + sum_j <k,dK>^2)", "", "kv_heads", "ratio", "[A]",
         "Above its floor q or k was altered inside the kernel, or dQ and dK come from different logits."),
        ("key_gain", "sqrt(scale^2 sum_i |dO_i * O_i|^2 |q_i|^2) / sqrt(sum |dK_j|^2)", "", "kv_heads", "ratio", "[A]",
         "How much of dK the rounding of O can be, in units of u: the floor of key_shift grows with it."),
        ("euler_gain", "sqrt(sum |q * dQ|^2 + |k * dK|^2) over the denominator of euler", "", "kv_heads", "ratio", "[A]",
         "How far the rounding of dQ and dK reaches, in units of u: the floor of euler grows with it."),
        ("router_shift", "rms_t(sum_e dlogit_te) / rms_t(|dlogit_t| / (1 - p_t)), p_t the surest expert's share", "", "scalar",
         "ratio", "[A]", "Above its floor the router's backward is wrong: a softmax does not feel a shift of all its logits."),
        ("bias_num", "-<sum_j dK_j, u>, u = scale sum_i D_i q_i", "grad^2", "kv_heads", "sum", "[A], [F]",
         "Numerator of the rounding-bias estimate; read law/bias."),
        ("bias_den", "<u, u>", "grad^2", "kv_heads", "sum", "[A], [F]",
         "Denominator of the rounding-bias estimate; read law/bias."),
    ),
    *_rows("law", "free",
        ("bias", "sum num / sum den over the last samples", "relative", "kv_heads", "ratio", "[A], [F]",
         "The stored attention output is (1 + c) of the true one: a one-sided rounding, with its sign and size."),
        ("bias_t", "law/bias over its jackknife standard error", "", "kv_heads", "none", "[A], [F]",
         "How sure law/bias is: judged by Student's t of law/bias_samples; unbiased rounding stays below 4 at 20 samples."),
        ("bias_samples", "samples that law/bias pools", "count", "scalar", "none", "[A]",
         "Of few samples, law/bias_t must be far larger to mean anything."),
        ("bias_site", "law/bias pooled over the heads", "relative", "scalar", "ratio", "[A], [F]",
         "The bias of the whole site; finds what a single head is too noisy for."),
        ("bias_site_t", "law/bias_site over its jackknife standard error", "", "scalar", "none", "[A], [F]",
         "How sure law/bias_site is."),
    ),
    *_rows("law", "rows",
        ("shadow", "rms(kernel - fp32 shadow) / rms(shadow) on sampled rows", "", "heads", "ratio", "[A], [F]",
         "Above its floor the forward is wrong: scale, mask, heads, dropped keys, or a coarse rounding; sign in shadow_bias."),
    ),
    *_rows("law", "cheap",
        ("hull", "max(O - max_j V_j, min_j V_j - O, 0) / max_j |V_j|, over rows and channels", "", "heads", "max", "[A]",
         "Above its floor an output is no average of the values: probabilities do not sum to one, or it was corrupted."),
        ("token_count", "choices that are no expert, or one that the token has already, over T k", "", "scalar", "ratio",
         "[A]", "Above zero the choice of experts is corrupt: tokens are lost, or sent to one expert twice."),
    ),
    *_rows("attention", "rows",
        ("logit_max", "max over sampled rows of scale * q.k as the kernel sees it", "", "heads", "max", "[W], [K]",
         "Growth towards 100 saturates the softmax: learning rate too large, or missing QK-norm or clipping."),
        ("entropy", "mean row entropy of softmax", "nats", "heads", "mean", "[Z]",
         "A fall to zero is entropy collapse; a rise to log(keys) is a head that stopped selecting."),
        ("entropy_se", "standard error of entropy: sqrt(s^2 / n) over the n sampled rows", "nats", "heads", "ratio", "[Z]",
         "How well entropy is known, rows taken as independent; microbatches are strata: what they differ by is no error."),
        ("entropy_norm", "mean row entropy / log(visible keys)", "", "heads", "mean", "[Z]",
         "As entropy, free of the row length."),
        ("sink", "mean probability on the first visible key", "", "heads", "mean", "[P]", "A rise parks the head on a sink."),
        ("sink_se", "standard error of sink: sqrt(s^2 / n) over the n sampled rows", "", "heads", "ratio", "[P]",
         "How well sink is known, rows taken as independent; microbatches are strata: what they differ by is no error."),
        ("lse", "mean row logsumexp", "", "heads", "mean", "[W]", "Drifts with the logits; a jump is a changed scale or mask."),
        ("lse_se", "standard error of lse: sqrt(s^2 / n) over the n sampled rows", "", "heads", "ratio", "[W]",
         "How well lse is known, rows taken as independent; microbatches are strata: what they differ by is no error."),
        ("lse_max", "max row logsumexp", "", "heads", "max", "[W]", "As logit_max, for whole rows."),
        ("shadow_bias", "signed mean of (kernel - fp32 shadow) along the shadow", "relative", "heads", "mean", "[F]",
         "One sign that stays is a biased forward rounding or a wrong scale."),
        ("shadow_rms", "rms(kernel - fp32 shadow) / rms(shadow)", "relative", "heads", "ratio", "[F]",
         "The kernel's forward error; far above the dtype's roundoff the forward is wrong."),
    ),
    *_rows("attention", "cheap",
        *((f"{t}_rms", f"rms of {t}", "", "heads" if t in ("q", "out") else "kv_heads", "mean", "[W]",
           f"The size of {t} at the kernel's boundary.") for t in ("q", "k", "v", "out")),
        *((f"{t}_absmax", f"max |{t}|", "", "heads" if t in ("q", "out") else "kv_heads", "max", "[W]",
           f"Outliers of {t}; near the dtype's maximum, overflow is next.") for t in ("q", "k", "v", "out")),
        ("nonfinite", "count of NaN and infinity", "count", "q,k,v,out", "sum", "[W]", "Any value above zero is a fault now."),
        ("near_overflow", "share of entries beyond half of the dtype's maximum", "", "q,k,v,out", "mean", "[W]",
         "Above zero the next doubling overflows; in float16, where 65504 is the maximum, it comes first."),
    ),
    *_rows("attention", "gradients",
        *((f"grad_{t}_norm", f"norm of the gradient of {t}", "", "heads" if t in ("q", "out") else "kv_heads", "ratio", "[W]",
           f"A rise of the gradient at {t} alone points at this site.") for t in ("q", "k", "v", "out")),
        ("grad_absmax", "max |gradient|", "", "q,k,v,out", "max", "[W]", "Outliers of the gradients."),
        ("grad_nonfinite", "count of NaN and infinity in the gradients", "count", "q,k,v,out", "sum", "[W]",
         "Any value above zero is a fault now."),
        ("grad_delta", "mean of rowsum(dO * O)", "", "heads", "mean", "[F]", "The D term that a biased O corrupts."),
        ("grad_delta_sign", "share of rows with a positive rowsum(dO * O) less that with a negative one", "", "heads", "mean",
         "[F]", "One sign everywhere lets a rounding bias add up."),
    ),
    *_spectral(),
    *_rows("router", "cheap",
        ("entropy", "mean token entropy of the routing distribution", "nats", "scalar", "mean", "[P]",
         "A fall is collapse onto few experts."),
        ("entropy_norm", "entropy / log E", "", "scalar", "mean", "[P]", "As entropy, free of the number of experts."),
        ("margin", "k-th minus (k+1)-th selection score, mean", "", "scalar", "mean", "[P]",
         "A rise is a router that hardens."),
        ("margin_p1", "1st percentile of the margin, from bins a factor 1.47 wide", "", "scalar", "sum", "[P]",
         "Near zero, near-ties flip between kernels and ranks."),
        ("margin_p10", "10th percentile of the margin, likewise", "", "scalar", "sum", "[P]", "As margin_p1."),
        ("load", "share of assignments an expert gets", "", "experts", "sum", "[B]",
         "One expert's share growing is imbalance."),
        ("load_max_ratio", "max load / mean load", "", "scalar", "ratio", "[B]",
         "A rise is imbalance: the busiest expert sets the step time."),
        ("max_violation", "max load / mean load - 1", "", "scalar", "ratio", "[B]",
         "As load_max_ratio; a balanced router is near 0."),
        ("load_cv", "standard deviation / mean of load", "", "scalar", "ratio", "[B]", "Imbalance over all experts."),
        ("load_entropy", "entropy of load", "nats", "scalar", "ratio", "[B]", "A fall is imbalance over all experts."),
        ("dead_experts", "share of experts with load below 0.1 / E", "", "scalar", "ratio", "[B]", "Experts that no longer learn."),
        ("effective_experts", "exp(load_entropy)", "", "scalar", "ratio", "[B]", "How many experts are in use."),
        ("unserved_tokens", "share of tokens that no expert takes", "", "scalar", "mean", "[X]",
         "Where experts choose tokens, or a threshold decides: a rise leaves more tokens to the residual stream alone."),
        ("experts_per_token", "mean number of experts a token gets", "", "scalar", "mean", "[X]",
         "Where it varies: the compute spent; a drift is a threshold that no longer fits the scores."),
        ("experts_per_token_max", "largest number of experts a token gets", "", "scalar", "max", "[X]",
         "Growth towards E is a few tokens that every expert wants."),
        ("gate_mass", "share of combine weight an expert gets", "", "experts", "sum", "[S]",
         "As load, by weight and not by count."),
        ("logit_absmax", "max |router logit|", "", "scalar", "max", "[S]", "Growth saturates the router."),
        ("z", "mean squared logsumexp of the logits", "", "scalar", "mean", "[S]", "What router z-loss holds down."),
        ("bias_overlap", "|A n B| / |A u B| of the experts taken (A) and those that scores without the bias take (B)", "", "scalar",
         "mean", "[B]", "A fall: the balancing bias decides instead of the router."),
        ("bias_mean", "mean of the selection bias over experts", "", "scalar", "mean", "[B]",
         "Moves no choice by itself; a steady drift is an update that does not sum to zero."),
        ("bias_spread", "standard deviation of the selection bias over experts", "", "scalar", "mean", "[B]",
         "Growth without end: balancing works against a router that pulls the other way."),
        ("input_rms", "rms of the router's input", "", "scalar", "mean", "[S]",
         "Its growth reaches the logits without the weights moving."),
        ("input_absmax", "max |router input|", "", "scalar", "max", "[S]", "Outliers of the router's input."),
        ("nonfinite", "count of NaN and infinity", "count", "scalar", "sum", "[S]", "Any value above zero is a fault now."),
    ),
    *_rows("router", "gradients",
        ("grad_norm", "norm of the router logits' gradient", "", "scalar", "ratio", "[S]", "A rise is a router pulled hard."),
        ("grad_nonfinite", "count of NaN and infinity in the gradients", "count", "scalar", "sum", "[S]",
         "Any value above zero is a fault now."),
    ),
    *_rows("router", "weights",
        ("similarity", "mean pairwise cosine of the experts' rows", "", "scalar", "none", "[P]",
         "A rise says the experts' directions merge."),
        ("conditioning", "max_i |w_i - mean| / |mean|", "", "scalar", "none", "[P]",
         "A fall says a common direction takes over."),
        ("effective_rank", "exp of the spectral entropy of the router weight", "", "scalar", "none", "[P]",
         "A fall is a router that uses few directions."),
        *((f"row_norm_{s}", f"{s} norm of an expert's row", "", "scalar", "none", "[P]",
             "Uneven rows favour some experts.") for s in ("min", "max", "mean")),
    ),
    *_rows("optim", "free",
        ("lr", "learning rate", "", "scalar", "none", "the optimizer",
         "What the schedule says; evidence for a learning-rate fault."),
    ),
    *_rows("optim", "weights",
        ("grad_norm", "norm of the gradient before the step", "", "scalar", "ratio", "[W]", "Late and unspecific; confirms."),
        ("update_ratio", "|dW| / |W| a step", "", "scalar", "none", "[W]",
         "About 1e-3 is usual; a rise is a learning rate too large."),
    ),
    *_rows("run", "free",
        ("loss", "the training loss, when logged", "", "scalar", "mean", "the training loop", "The last thing to move."),
    ),
    *(entry for kind, rows in second_tier.ROWS.items() for entry in _rows(kind, second_tier.COSTS[kind], *rows)),
)
# fmt: on

_BY_NAME = {entry.name: entry for entry in METRICS}
_SPECTRA = tuple(f"attention/{matrix}_" for matrix in ("delta2", "delta3", "dwq", "dwk"))


def register_metrics(*metrics: Metric) -> None:
    """Make the metrics of an own kind of site known (``norm/rms``), so that reports show them with what they mean.

    Once more under the same name replaces. Raises ConfigError for a name without a kind, or one of the built-in metrics.
    """
    for entry in metrics:
        if entry in METRICS or _BY_NAME.get(entry.name) in METRICS:
            raise ConfigError(f"registering the metric {entry.name!r}: it is built in; choose another name")
        if not all(entry.name.partition("/")) or "@" in entry.name:
            raise ConfigError(f"registering the metric {entry.name!r}: give a kind and a name, as in 'norm/rms'")
        if entry.cost not in COSTS:
            raise ConfigError(
                f"registering the metric {entry.name!r}: cost is {entry.cost!r}; give one of {', '.join(COSTS)}"
            )
        _BY_NAME[entry.name] = entry


def metric(name: str) -> Metric:
    """The entry of ``name``; a window suffix (``@50``) is ignored. Raises ConfigError with the closest names."""
    entry = _BY_NAME.get(name.partition("@")[0])
    if entry is None:
        close = ", ".join(difflib.get_close_matches(name, _BY_NAME, n=3)) or "see foreshock.monitors.METRICS"
        raise ConfigError(f"looking up the metric {name!r}: there is none; did you mean {close}?")
    return entry


def family(name: str) -> str:
    """Which group a metric is shown in: laws, attention, spectra, router, optim, run or one of the second tier; an own metric in
    that of its kind."""
    entry = metric(name)
    kind = entry.name.partition("/")[0]
    return "spectra" if entry.name.startswith(_SPECTRA) else FAMILIES.get(kind, kind)
