"""How large a law's residual may be in a correct kernel, and the rounding-bias estimate.

A law's residual is set by the unit roundoff ``u`` of the dtype in which the kernel stores P, O and dK: 2^-8 for bfloat16,
2^-11 for float16, 2^-24 for float32. What is float64 is measured in float32, and held to that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foreshock.errors import ConfigError
from foreshock.records import Array, Reading, Site

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tf32": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-24}

# In units of u, per law and dtype: how often the residual may exceed one rounding; see `floor`.
MARGIN: dict[str, dict[str, float]] = {
    "key_shift": {"bfloat16": 16, "float16": 32, "tf32": 32, "float32": 1024},
    "value_mass": {"bfloat16": 16, "float16": 32, "tf32": 32, "float32": 1024},
    "euler": {"bfloat16": 16, "float16": 32, "tf32": 32, "float32": 1024},
    "hull": {"bfloat16": 4, "float16": 4, "tf32": 8, "float32": 128},
    "shadow": {"bfloat16": 16, "float16": 16, "tf32": 32, "float32": 1024},
    "router_shift": {"bfloat16": 8, "float16": 16, "tf32": 16, "float32": 256},
    "bias": {"bfloat16": 0.25, "float16": 0.5, "tf32": 0.5, "float32": 64},
}
GAINS = {"law/key_shift": "law/key_gain", "law/euler": "law/euler_gain"}
EXPONENTIAL = ("law/value_mass", "law/shadow")  # an error of a logit becomes a relative error of P
MIN_SAMPLES = 8  # with fewer, Student's t asks for more certainty than a real bias gives: 17 with 8, 40 with 5, at one in a million


def floor(law: str, dtype: str) -> float:
    """The residual above which ``law`` is broken, for tensors of ``dtype`` (a torch dtype's name, or tf32).

    *Shift, mass and Euler.* Each stored dK_j carries a relative error of at most u, independent and of mean zero over j, so
    their sum is off by about ``u / sqrt(3) * sqrt(sum |dK_j|^2)``; the rounding of O enters D and adds as much again. The
    relative residual is thus 1u to 2u whatever the sizes: measured up to 2.8u in bfloat16 and 3u in float16 at 1 to 4096 keys,
    17u in float32 (sums in tiles are not stored roundings). The limits are 16u, 32u and, as float32 kernels differ most in how
    they add, 1024u = 6e-5. Products in TF32 round each factor to 2^-11 and are held to float16's limits. A one-sided rounding
    at three mantissa bits gives 20u to 40u of bfloat16, at one bit 100u. Where a gradient is itself what rounding leaves (one
    key has all of a row's mass), `growth` raises the limit.

    *Hull.* A bound and no estimate: O is a mean of values with weights that sum to one but for the rounding of P, u at most, and
    is stored with another u: 2u of the channel's largest value. Float32 kernels add up to S weights with an error of
    ``sqrt(S) u`` in random order: measured 2u at 512 keys; 128u allows for 16,000. The limit is 4u (TF32, which rounds the
    values too: 8u).

    *Shadow.* Rows recomputed in fp32 differ from the kernel's by the rounding of O and of P, at most u each: measured 0.4u to
    1.2u (float32: 12u, at logits of 100 30u). The limit is 16u.

    *Router shift.* Each stored gradient of a logit carries at most u, so a token's sum is off by ``u / sqrt(3)`` of its norm,
    whatever the number of experts: measured up to 0.8u in bfloat16 and float16 and 3u in float32, at 2 to 64 experts, flat and
    saturated. The limits are 8u, 16u and 256u.

    *Bias.* A one-sided rounding of the last stored bit has mean ``u / (2 ln 2) = 0.72u`` over log-uniform mantissas; a
    correct kernel's pooled estimate scatters by 0.03u (bfloat16, 20 samples) and 0.2u (float16, long sequences). The limits
    are 0.25u and 0.5u. float32 results are not limited by their storage: 64u = 4e-6, a thousandth of a bfloat16 bias.

    ``law/token_count`` counts whole numbers and has no floor.
    """
    if law not in MARGIN:
        raise ConfigError(f"looking up the floor of the law {law!r}: there is none; the laws are {', '.join(MARGIN)}")
    if dtype not in UNIT_ROUNDOFF:
        raise ConfigError(f"looking up the floor of {law}: dtype {dtype!r} is not one of {', '.join(UNIT_ROUNDOFF)}")
    return MARGIN[law].get(dtype, MARGIN[law]["float32"]) * UNIT_ROUNDOFF[dtype]


def growth(gain: Array, logit_max: Array, exponential: Array) -> Array:
    """By what a floor grows where rounding reaches further than into the last bit: 1 and more. Arrays of one shape.

    ``gain`` is what independent roundings of O, q, k, dQ and dK can make of the law's sum, in units of u of its denominator (the
    metrics of `GAINS`; NaN for other laws): of order 1 as long as rows spread over several keys, beyond 1000 where the softmax is
    saturated, so that dK is rounding alone. A healthy kernel stays below 5 times that; a quarter of it leaves the floor of 16u
    three times that distance. ``logit_max`` (NaN: not read) counts for the laws in `EXPONENTIAL`, of which the mask
    ``exponential`` is true: in float32 and TF32 a logit is off by about u of itself, and P by e to that power; beyond logits of
    100 their floors grow with them.
    """
    return np.where(exponential, np.fmax(1.0, logit_max / 100), np.fmax(1.0, gain / 4))


class BiasLaw:
    """Pools ``law/bias_num`` and ``law/bias_den`` over the last ``window`` samples of a site into ``c_hat`` and its t.

    ``c_hat`` estimates a relative bias of the stored attention output from q, O, dO and dK alone. A window of 20 finds the
    truncation bias of plain bfloat16 with t beyond 10 while unbiased rounding stays below 4.
    """

    def __init__(self, window: int = 20) -> None:
        self.window = window
        self._sums: dict[str, deque[tuple[Array, Array]]] = {}

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Reading]:
        """Derived readings of each site sampled at this step: nothing until 8 samples are in."""
        num = {r.site: r.values for r in readings if r.metric == "law/bias_num" and r.site is not None}
        den = {r.site: r.values for r in readings if r.metric == "law/bias_den" and r.site is not None}
        derived = []
        for site in num.keys() & den.keys():
            if not (np.isfinite(num[site]).all() and np.isfinite(den[site]).all()):
                continue  # non-finite sums are an event of their own and must not blind the window
            samples = self._sums.setdefault(site, deque(maxlen=self.window))
            samples.append((num[site], den[site]))
            if len(samples) < MIN_SAMPLES:
                continue
            num_NG, den_NG = (np.stack([sample[part] for sample in samples]) for part in (0, 1))
            head, head_t = pooled_ratio(num_NG, den_NG)
            whole, whole_t = pooled_ratio(num_NG.sum(1, keepdims=True), den_NG.sum(1, keepdims=True))
            derived += [
                Reading("law/bias", site, head),
                Reading("law/bias_samples", site, np.array([float(len(samples))])),
                Reading("law/bias_t", site, head_t),
                Reading("law/bias_site", site, whole),
                Reading("law/bias_site_t", site, whole_t),
            ]
        return sorted(derived, key=lambda reading: (reading.site or "", reading.metric))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {site: [(n.tolist(), d.tolist()) for n, d in rows] for site, rows in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {
            site: deque(((np.array(n), np.array(d)) for n, d in rows), maxlen=self.window)
            for site, rows in state["sums"].items()
        }


def pooled_ratio(num_NG: Array, den_NG: Array) -> tuple[Array, Array]:
    """``sum num / sum den`` over samples and its t from the jackknife, each ``[G]``; NaN where the denominators vanish.

    The jackknife and not the residuals' spread: a single sample that carries nearly all of the denominator (a gradient
    spike) has no residual, yet leaving it out moves the ratio, so it cannot pass for certainty.
    """
    samples = len(num_NG)
    num, den = num_NG.sum(0), den_NG.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = num / den
        without = (num - num_NG) / (den - den_NG)
        error = np.sqrt((samples - 1) / samples * np.square(without - without.mean(0)).sum(0))
        return ratio, np.where(error > 0, ratio / np.where(error > 0, error, 1), np.where(ratio == 0, 0.0, np.nan))
