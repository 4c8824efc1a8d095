"""Tests that need no history: hard limits, and the laws of a correct kernel."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from foreshock.monitors import policy
from foreshock.monitors.finding import Finding
from foreshock.monitors.laws import GAINS, MIN_SAMPLES, UNIT_ROUNDOFF, floor, growth
from foreshock.monitors.policy import FINITE, LIMITS, Limit
from foreshock.monitors.warmup import Warmup
from foreshock.records import Array, Reading, Site

_NOTHING = np.zeros(0)


class Limits:
    """Bounds on single readings, each with its own number of samples in a row."""

    def __init__(self, limits: Sequence[Limit] = LIMITS, warmup: int = 0) -> None:
        self.limits = {limit.metric: limit for limit in limits}
        self.warmup = Warmup(warmup)
        self._run: dict[tuple[str, str | None], tuple[int, int]] = {}  # samples in a row, and the step of the first

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Finding]:
        """A finding for every bound that is broken now and has been for long enough."""
        findings = []
        warming = self.warmup.update(step, readings)
        for reading in readings:
            limit = self.limits.get(reading.metric)
            if limit is not None and not (limit.settled and warming):
                worst = int(np.argmax(np.nan_to_num(reading.values, nan=-math.inf, posinf=math.inf)))
                broken, samples, steps = float(reading.values[worst]) > limit.above, limit.samples, limit.steps
                expected = f"at most {limit.above:g}"
            elif reading.metric in FINITE:
                worst = int(np.argmin(np.isfinite(reading.values)))
                broken, samples, steps = not np.isfinite(reading.values[worst]), FINITE[reading.metric], 0
                expected = "a finite value"
            else:
                continue
            key = (reading.metric, reading.site)
            if not broken:
                self._run.pop(key, None)
                continue
            count, onset = self._run.get(key, (0, step))
            self._run[key] = (count + 1, onset)
            if count + 1 >= samples and step - onset >= steps:
                value = float(reading.values[worst])
                index = worst if len(reading.values) > 1 else None
                score = value / limit.above if limit is not None and limit.above > 0 else math.inf
                findings.append(Finding(step, onset, reading.site, reading.metric, value, expected, +1, score, index))
        return findings

    def state_dict(self) -> dict[str, Any]:
        return {"run": [[*key, *value] for key, value in self._run.items()], "warmup": self.warmup.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._run = {(metric, site): (count, onset) for metric, site, count, onset in state["run"]}
        self.warmup.load_state_dict(state["warmup"])


class LawTest:
    """Residuals of the laws against their floors, and the pooled rounding bias against chance.

    ``kernel_dtype`` says in which precision the kernels are meant to store P and O; without it, each site's own dtype is taken,
    and TF32's where float32 products may use it.
    """

    def __init__(self, kernel_dtype: str | None = None) -> None:
        self.kernel_dtype = kernel_dtype
        self._recent: dict[tuple[str, str], deque[tuple[int, Array]]] = {}
        self._estimates: dict[str, dict[int, list[float]]] = {}  # of the bias, by step, while a law is broken

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Finding]:
        """A finding for every law that is broken now, with the worst head; needs no healthy baseline."""
        findings: list[Finding] = []
        by_key = {(reading.metric, reading.site): reading.values for reading in readings}
        for reading in readings:
            site = sites.get(reading.site or "")
            dtype = self._dtype(site)
            if site is None or dtype not in UNIT_ROUNDOFF:
                continue
            if (by_key.get(("attention/logit_max", site.id), _NOTHING) > policy.LAW_LOGITS).any():
                continue
            if reading.metric in policy.LAWS:
                found = self._residual(step, reading, site.id, dtype, by_key)
                findings += found
                if reading.metric in policy.BACKWARD_LAWS and found:
                    findings += self._same_sign(step, found[0].onset, site.id, dtype, by_key)
            elif reading.metric in ("law/bias", "law/bias_site"):
                t = by_key.get((f"{reading.metric}_t", site.id))
                if t is not None:
                    findings += _bias(step, reading, t, site.id, dtype)
        return findings

    def _dtype(self, site: Site | None) -> str:
        if site is not None and site.kind == "router":
            return site.dtype  # a softmax is no kernel with a precision of its own, and no product
        if self.kernel_dtype is not None or site is None:
            return self.kernel_dtype or ""
        return "tf32" if site.dtype == "float32" and _tf32() else site.dtype

    def _residual(
        self, step: int, reading: Reading, site: str, dtype: str, by_key: Mapping[tuple[str, str | None], Array]
    ) -> list[Finding]:
        law = reading.metric
        gain, logit_max = by_key.get((GAINS.get(law, ""), site)), by_key.get(("attention/logit_max", site))
        limits = floor(law.removeprefix("law/"), dtype) * growth(law, gain, logit_max)
        recent = self._recent.setdefault((law, site), deque(maxlen=policy.LAW_SAMPLES))
        if not np.isfinite(reading.values).any():
            return []
        limits = np.broadcast_to(limits, reading.values.shape)
        with np.errstate(invalid="ignore"):
            excess = reading.values / limits
        recent.append((step, excess))
        lasting = np.median([x for _, x in recent], 0) if len(recent) == policy.LAW_SAMPLES else excess * 0
        score = np.nan_to_num(np.fmax(excess / policy.LAW_GROSS, lasting))
        worst = int(score.argmax())
        confirmed = score[worst] > 1
        if not confirmed:
            worst = int(np.nan_to_num(excess).argmax())
            if law not in policy.FORWARD_LAWS or not excess[worst] > 1:
                return []
        onset = min(at for at, x in recent if x[worst] > 1)
        expected = f"at most {limits[worst]:.2g} in {dtype}"
        bias = by_key.get(("attention/shadow_bias", site))
        if law == "law/shadow" and bias is not None and np.isfinite(bias[worst]):
            expected += f"; along the output by {bias[worst]:+.2g} of it"
        # A forward beyond its floor tells a forward fault from a backward one even before it is an alarm of its own.
        strength = float(score[worst]) if confirmed else float(1 - 1 / excess[worst])
        index = worst if len(reading.values) > 1 else None
        extent = float((excess > 1).mean()) if (excess > 1).sum() > 1 else 0.0
        shown = reading.values[worst] if excess[worst] >= lasting[worst] else lasting[worst] * limits[worst]
        return [Finding(step, onset, site, law, float(shown), expected, +1, strength, index, extent)]

    def _same_sign(
        self, step: int, onset: int, site: str, dtype: str, by_key: Mapping[tuple[str, str | None], Array]
    ) -> list[Finding]:
        """Once a law is broken, few samples name a rounding bias: every head's estimate since then, four at least, has one sign
        and about one size."""
        num, den = by_key.get(("law/bias_num", site)), by_key.get(("law/bias_den", site))
        if num is None or den is None or not (den > 0).all() or not np.isfinite(num / den).all():
            return []
        seen = {at: values for at, values in self._estimates.get(site, {}).items() if at >= onset} | {
            step: (num / den).tolist()
        }
        self._estimates[site] = dict(list(seen.items())[-MIN_SAMPLES:])
        estimates = np.concatenate(list(self._estimates[site].values()))
        gross = policy.BIAS_GROSS * floor("bias", dtype)
        if len(estimates) < 4 or abs(np.sign(estimates).sum()) < len(estimates) or np.median(np.abs(estimates)) < gross:
            return []
        scatter = float(np.std(estimates, ddof=1)) / math.sqrt(len(estimates))
        if abs(float(estimates.mean())) < policy.BIAS_T * scatter:
            return []  # of one sign by chance: a rounding to one side moves all heads alike
        pooled = float(num.sum() / den.sum())
        if abs(pooled) > policy.BIAS_LARGEST:
            return []
        expected = f"within {gross:.2g} of zero, or of mixed sign over heads and samples"
        score = max(1.0, abs(pooled) / gross)
        sign = 1 if pooled > 0 else -1
        return [Finding(step, onset, site, "law/bias_site", pooled, expected, sign, score, extent=1.0)]

    def state_dict(self) -> dict[str, Any]:
        estimates = [[site, list(seen.items())] for site, seen in self._estimates.items()]
        return {
            "estimates": estimates,
            "recent": [[*key, [[s, v.tolist()] for s, v in rows]] for key, rows in self._recent.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._estimates = {site: dict(seen) for site, seen in state["estimates"]}
        self._recent = {
            (metric, site): deque(((s, np.array(v)) for s, v in rows), maxlen=policy.LAW_SAMPLES)
            for metric, site, rows in state["recent"]
        }


def _tf32() -> bool:
    """Whether float32 products may use TF32, by either of torch's two settings, which refuse to be mixed."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return str(torch.backends.cuda.matmul.fp32_precision) != "ieee"


def _bias(step: int, reading: Reading, t: Array, site: str, dtype: str) -> list[Finding]:
    """The pooled bias is large and sure, at its surest head."""
    limit = floor("bias", dtype)
    score = np.nan_to_num(np.minimum(np.abs(t) / policy.BIAS_T, np.abs(reading.values) / limit))
    score = np.where(np.abs(reading.values) > policy.BIAS_LARGEST, 0.0, score)
    worst = int(score.argmax())
    if score[worst] <= 1:
        return []
    value = float(reading.values[worst])
    expected = f"within {limit:.2g} of zero in {dtype}, or |t| below {policy.BIAS_T:g} (t = {t[worst]:.1f})"
    index = worst if len(reading.values) > 1 else None
    extent = float((score > 1).mean()) if (score > 1).sum() > 1 else 0.0
    sign = 1 if value > 0 else -1
    return [Finding(step, step, site, reading.metric, value, expected, sign, float(score[worst]), index, extent)]
