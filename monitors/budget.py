"""How many false alarms a whole run may raise, set in one place: one in 100,000 healthy steps over all series and tests.

*The sequential tests.* An e-detector is a process ``M_t = max(M_{t-1}, 1) * L_t`` whose factors have ``E[L_t | past] <= 1`` in
health (Shin, Ramdas and Rinaldo, arXiv 2203.03532, section 2). As ``max(M, 1) <= M + 1``, ``E[M_t - t]`` never rises, so that
``E[M_T] <= E[T]`` for every stopping time T. At the first time T that M reaches c, ``c <= E[M_T] <= E[T]``: the average run length
to a false alarm is at least c, whatever the law of the samples and however they depend on each other.

The sum of pushes ``clip(z) - slack`` of `foreshock.monitors.detectors.cusum` is the logarithm of such a process, floored at zero,
with ``L = exp(clip(z) - slack)`` and slack 1.5. The condition is ``E[exp(clip(z)) | past] <= e^1.5``. A Gaussian z of standard
deviation s has ``E[exp(z)] = exp(s^2 / 2)``, so it holds up to s = sqrt(3) = 1.73: the spread may be estimated as 0.58 of the true
one. It fails where the mean of z given the past is not near zero for long: a forecast that is off by more than a spread, or a
run that differs from its references by more than theirs. `benchmarks/false_alarms.py` measures what that costs.

The mean of the e-detectors of S series is one again, without independence, and is at least c once one of them reaches
``S * c``. So each series' sum is held to ``log(samples per alarm) + log(S)``, where S counts the sides that are judged; samples per
alarm are the steps per alarm over the steps between samples, over the share of the budget.

*The t-tests*, of the rounding bias and of slopes, are asked anew at every sample, of every series: by the union bound each may be
wrong with the probability 1 / (samples per alarm * tests a sample). Their windows overlap, so neighbouring answers are nearly the
same; the bound needs no independence and only overstates the rate. That the jackknife t of n samples follows Student's law with
n - 1 degrees of freedom holds for samples alike in size; few samples need a far larger t.

Laws against their floors, hard limits and non-finite values have no chance of error to spend: their limits are no quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from foreshock.errors import ConfigError

try:
    from scipy.special import stdtrit
except ImportError:  # benchmarks/gpu.sh runs without it
    stdtrit = None

STEPS_PER_FALSE_ALARM = 100_000
# Twice the share costs a CUSUM 0.7 of a limit near 13. Without references their share is not spent.
SHARES: Mapping[str, float] = MappingProxyType({"trend": 0.5, "references": 0.25, "bias": 0.15, "extrapolation": 0.1})


@dataclass(frozen=True, slots=True)
class Budget:
    """At most one false alarm in ``steps`` healthy steps. Raises ConfigError for fewer than one."""

    steps: int = STEPS_PER_FALSE_ALARM

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(
                f"setting the false-alarm budget: steps per false alarm must be at least 1, got {self.steps}"
            )

    def samples(self, share: str, spacing: int) -> float:
        """Healthy samples, ``spacing`` steps apart, in which the tests of this share may be wrong once."""
        return max(self.steps / spacing / SHARES[share], 1.0)

    def log_limit(self, share: str, spacing: int, series: int) -> float:
        """What the logarithm of each of ``series`` e-detectors may reach."""
        return math.log(self.samples(share, spacing)) + math.log(max(series, 1))

    def student_t(self, share: str, spacing: int, tests: int, degrees: int) -> float:
        """What ``|t|`` with ``degrees`` degrees of freedom may reach when ``tests`` of them are asked a sample."""
        return _student_t(1 / self.samples(share, spacing) / max(tests, 1), degrees)


@lru_cache(maxsize=1024)
def _student_t(chance: float, degrees: int) -> float:
    """``|t|`` is beyond it with this chance, on either side."""
    if stdtrit is None:
        raise ImportError("holding a series to Student's t: scipy is not installed; pip install scipy")
    return float(-stdtrit(degrees, chance / 2))  # what scipy.stats.t.isf is, without half a second of imports
