"""What is usually watched, restated from papers and code: rules on the loss, the gradient norm, the logits, the experts' load.

A rule looks at one series and says at which samples it would speak. Samples that speak in a row, or within `REST` steps of the last
that did, are one alarm: the rules are counted as kindly as foreshock, which speaks once until an alarm clears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Hits = npt.NDArray[np.bool_]
Series = tuple[npt.NDArray[np.int64], Values]

REST = 50


@dataclass(frozen=True)
class Peer:
    """A rule ``values [n] -> hits [n]`` on the series of that name ("loss", "grad_norm", "logit_max", "load_entropy")."""

    name: str
    series: str
    rule: Callable[[Values], Hits]
    source: str

    def alarms(self, recorded: Mapping[str, Series]) -> list[int]:
        """Steps of its alarms; none where the series was not recorded."""
        if self.series not in recorded:
            return []
        steps, values = recorded[self.series]
        alarms: list[int] = []
        last = -REST - 1
        for step in steps[self.rule(values)].tolist():
            if step - last > REST:
                alarms.append(step)
            last = step
        return alarms


def z_score(values: Values, sigma: float, window: int, direction: int = 1, least: int | None = None) -> Hits:
    """Further than ``sigma`` standard deviations above (or below) the mean of the ``window`` values before it.

    ``least`` of them must be there (default: half). Values that are not finite speak, and are left out of the mean.
    """
    finite = np.isfinite(values)
    padded = np.concatenate([np.full(window, np.nan), np.where(finite, values, np.nan)])
    before = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(values)]
    known = np.isfinite(before)
    count = known.sum(1)
    mean = np.where(known, before, 0.0).sum(1) / np.maximum(count, 1)
    squares = np.where(known, before - mean[:, None], 0.0) ** 2
    deviation = np.sqrt(squares.sum(1) / np.maximum(count - 1, 1))
    ready = count >= (window // 2 if least is None else least)
    far = direction * (np.where(finite, values, 0.0) - mean) > sigma * deviation
    return ~finite | (ready & far & (deviation > 0))


def spike(values: Values, factor: float, samples: int) -> Hits:
    """At least ``factor`` times the largest of the first ``samples`` values, or not finite."""
    top = np.max(values[:samples], initial=0.0)
    return ~np.isfinite(values) | ((np.arange(len(values)) >= samples) & (values >= factor * top))


def above(values: Values, limit: float) -> Hits:
    """Beyond ``limit``, or not finite."""
    return ~(values <= limit)


def turbulence(values: Values, fast: float, slow: float, ratio: float, settle: int) -> Hits:
    """The fast moving average is ``ratio`` times the slow one, once ``settle`` values have gone by; or not finite."""
    hits = ~np.isfinite(values)
    quick = steady = float(values[0]) if len(values) else 0.0
    for index, value in enumerate(values):
        if hits[index]:
            continue
        quick += fast * (value - quick)
        steady += slow * (value - steady)
        hits[index] = index >= settle and quick > ratio * steady
    return hits


def adaptive(values: Values, sigma: float, decay: float, settle: int) -> Hits:
    """Beyond ``sigma`` deviations of moving mean and variance, which take in a clipped value instead; or not finite."""
    hits = ~np.isfinite(values)
    first = values[:settle][np.isfinite(values[:settle])]
    mean, variance = (float(np.mean(first)), float(np.var(first))) if len(first) else (0.0, 0.0)
    for index in range(settle, len(values)):
        if hits[index]:
            continue
        limit = mean + sigma * variance**0.5
        hits[index] = values[index] > limit
        value = min(values[index], limit)
        variance = decay * variance + (1 - decay) * (value - mean) ** 2
        mean = decay * mean + (1 - decay) * value
    return hits


OLMO = "OLMo-core, StabilityMonitorCallback and SkipStepOptimizer: window 128, 6 standard deviations"
# fmt: off
PEERS: tuple[Peer, ...] = (
    Peer("loss 6 sigma", "loss", partial(z_score, sigma=6.0, window=128), OLMO),
    Peer("loss 5 sigma", "loss", partial(z_score, sigma=5.0, window=128), "the same at 5"),
    Peer("gradient norm 6 sigma", "grad_norm", partial(z_score, sigma=6.0, window=128), OLMO),
    Peer("gradient norm 5 sigma", "grad_norm", partial(z_score, sigma=5.0, window=128), "the same at 5"),
    Peer("gradient spike x10", "grad_norm", partial(spike, factor=10.0, samples=100),
         "Megatron-LM, rerun_state_machine.is_unexpectedly_large: ten times the maximum of the first 100"),
    Peer("gradient norm, moving z 2.5", "grad_norm", partial(adaptive, sigma=2.5, decay=0.97, settle=25),
         "ZClip, arXiv 2504.02507: z above 2.5 against moving mean and variance (0.97), 25 steps of warm-up"),
    Peer("attention logit > 100", "logit_max", partial(above, limit=100.0), "Kimi K2 report, QK-Clip: tau = 100"),
    Peer("load entropy -5 sigma", "load_entropy", partial(z_score, sigma=5.0, window=128, direction=-1, least=20),
         "the rolling rule, downwards, on the routers' load entropy: 128 samples, or as many as there are from 20 on"),
    Peer("loss turbulence", "loss", partial(turbulence, fast=0.1, slow=0.01, ratio=1.05, settle=200),
         "moving averages over about 10 and 100 steps, apart by more than 5 %"),
)
# fmt: on
