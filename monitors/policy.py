"""Which metric is judged, in which direction, and what size of change matters.

Few series are judged, so that the false-alarm rate of the whole run stays controlled; the others are there to be read.
Sources: [P] arXiv 2606.28116; [W] arXiv 2309.14322; [Z] arXiv 2303.06296; [B] arXiv 2408.15664; [K] Kimi K2 report;
[A] the algebra, docs/laws.md;
[M] measured on the library's own small runs, docs/log.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trend:
    """A series judged for drift: ``fold`` over heads or experts, on a ``log`` or ``linear`` scale.

    ``effect`` is the smallest lasting change that matters, in units of that scale; smaller ones never alarm, however
    certain. ``directions``: which of +1 and -1 are judged. ``follows_rate``: in health in proportion to the learning rate, as long
    as that stays below the highest that the run was healthy with: a schedule moves it, a rate beyond its peak stays visible.
    """

    metric: str
    fold: str  # "mean" | "max" | "min"
    scale: str  # "log" | "linear"
    effect: float
    directions: tuple[int, ...]
    source: str
    follows_rate: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound that needs no history: ``samples`` readings in a row above ``above``, over ``steps`` at least, are a finding."""

    metric: str
    above: float
    samples: int
    source: str
    settled: bool = False  # only once the warm-up is over
    steps: int = 0


# fmt: off
TRENDS: tuple[Trend, ...] = (
    Trend("attention/delta2_norm", "mean", "log", math.log(1.5), (+1,), "[P]: the earliest; [M]: leads learning-rate ramps",
          follows_rate=True),
    Trend("attention/delta2_norm", "max", "log", math.log(1.8), (+1,), "[P]: a single head; noisier than the mean",
          follows_rate=True),
    Trend("attention/delta2_effective_rank@50", "mean", "log", math.log(1.6), (-1,), "[P]: narrowing; [M]: unspecific"),
    Trend("attention/grad_out_norm", "mean", "log", math.log(8), (+1,), "the scale of gradients before clipping: large changes"),
    Trend("attention/logit_max", "max", "log", math.log(1.7), (+1,), "[W]: logit growth; the maximum of few sampled rows is noisy"),
    Trend("attention/entropy_norm", "mean", "linear", 0.15, (+1, -1), "[Z]: collapse, and its opposite"),
    Trend("attention/entropy_norm", "min", "linear", 0.2, (-1,), "[Z]: the head that collapses first"),
    Trend("router/entropy_norm", "mean", "linear", 0.06, (+1, -1), "[P]: collapse; healthy values stay near their trend"),
    Trend("router/load", "max", "log", math.log(1.35), (+1,), "[B]: MaxVio + 1 over E: a logarithm exists, and an expert is named"),
    Trend("router/effective_experts", "mean", "log", math.log(1.12), (-1,), "[B]: how many are in use; less noisy than load"),
    Trend("router/similarity", "mean", "linear", 0.06, (+1,), "[P]: experts' directions merge"),
    Trend("router/conditioning", "mean", "log", math.log(1.4), (+1, -1), "[P]: a common direction, or an expert that leaves"),
    Trend("router/logit_absmax", "mean", "log", math.log(1.7), (+1,), "[W]: saturation of the router"),
    Trend("optim/update_ratio", "mean", "log", math.log(1.5), (+1,), "[W]: tells a rate from weights that grow", follows_rate=True),
    Trend("optim/grad_norm", "mean", "log", math.log(2.5), (+1,), "[W]: late and unspecific, so a large change only"),
    Trend("run/loss", "mean", "log", math.log(1.15), (+1,), "the data-fault signature: the loss moves, the mechanisms do not"),
)

LIMITS: tuple[Limit, ...] = (
    Limit("attention/nonfinite", 0, 1, "NaN or infinity at the kernel's boundary is a fault at once"),
    Limit("law/token_count", 0, 1, "[A]: every token has its k experts; counted in whole numbers"),
    Limit("router/nonfinite", 0, 1, "the same at a router"),
    Limit("router/grad_nonfinite", 0, 3, "as for attention/grad_nonfinite"),
    Limit("attention/grad_nonfinite", 0, 3, "a loss scaler overflows single steps on purpose, not three in a row"),
    Limit("attention/logit_max", 100, 2, "[K]: clipping threshold; one sample may be an outlier token", settled=True),
    Limit("router/dead_experts", 0, 5, "[B]: below a tenth of its share; a healthy young router starves one for 50 steps [M]",
          settled=True, steps=100),
)

# Scalars whose own value must be finite: samples in a row, and why not one.
FINITE: dict[str, int] = {
    "run/loss": 1,
    "optim/grad_norm": 3,  # as for attention/grad_nonfinite
    "router/z": 1,
    "attention/lse": 1,
}

BACKWARD_LAWS = ("law/key_shift", "law/value_mass", "law/euler")
FORWARD_LAWS = ("law/hull", "law/shadow")
LAWS = (*BACKWARD_LAWS, *FORWARD_LAWS, "law/router_shift")
LAW_GROSS = 4.0        # one sample at 4 floors is enough: no healthy sample came within half of one [M]
LAW_SAMPLES = 3        # else the median of three must exceed the floor, so two of three have
BIAS_GROSS = 8.0       # bias floors: beside a broken law, a few estimates this large and of one sign need no t [M]
LAW_LOGITS = 1000.0    # beyond, probabilities are 0 or 1 and dK is rounding alone: no kernel is to blame
BIAS_LARGEST = 0.5     # of the output; a one-sided rounding to a single mantissa bit stays below
SAME_SIGN_T = 6.0      # beside a broken law, so sure a mean of estimates of one sign names a bias; alarms nobody [M]

WARMUP_SAMPLES = 5     # samples skipped after the learning rate has stopped rising: the curves bend most there
SPACING = 10           # steps between samples that enter a trend, however often the run is sampled: trends need time, not samples
# fmt: on
