"""Whether a kernel rounds to one side: the pooled bias against chance, and, beside a broken law, estimates of one sign.

Shapes: N values of a sheet, S series, W samples kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from foreshock.monitors import policy
from foreshock.monitors.budget import Budget
from foreshock.monitors.detectors.ring import Ring, spans
from foreshock.monitors.detectors.sheet import Layout, Places, Sheet
from foreshock.monitors.finding import Finding, together
from foreshock.monitors.laws import MIN_SAMPLES, floor
from foreshock.records import Array, Reading

POOLED = ("law/bias", "law/bias_site")
COUNT = "law/bias_samples"
SUMS = ("law/bias_num", "law/bias_den")
KEPT = 64  # samples back to which an onset is sought: three windows of the pooled bias
LIKELY = 2.0  # log-likelihood below the largest at which a split is still likely


class BiasTest:
    """The pooled bias is beyond its floor and surer than chance allows, at its surest head.

    ``t`` is held to Student's law with one degree of freedom less than ``law/bias_samples`` (without it: the fewest pooled).
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._sheet = Sheet((*POOLED, *(f"{metric}_t" for metric in POOLED), COUNT, *SUMS))
        self._places, self._layout = Places(), Layout(())
        self._recent = {metric: Ring(KEPT) for metric in SUMS}
        self._last: int | None = None
        self._arrange(self._layout)

    def update(
        self, step: int, readings: Sequence[Reading], dtypes: Mapping[str, str], saturated: Collection[str | None]
    ) -> list[Finding]:
        """A finding for every site of ``dtypes`` that is not ``saturated`` and whose kernel is biased."""
        layout, values = self._sheet.read(readings)
        if layout is not self._layout:
            self._arrange(layout)
        spacing = 1 if self._last is None else max(step - self._last, 1)
        self._last = step
        self._remember(step, values)
        c, t = values[self._c], np.abs(np.append(values, np.nan)[self._t])
        limit_t = self._limit(spacing, np.append(values, MIN_SAMPLES)[self._n])
        findings = []
        for row in np.unique(self._pooled.owner_N[(t > limit_t) & (np.abs(c) <= policy.BIAS_LARGEST)]):
            (metric, site), span = self._pooled.keys[row], self._pooled.span(int(row))
            if site not in dtypes or site in saturated:
                continue
            limit_c = floor("bias", dtypes[site])
            score = np.nan_to_num(np.minimum(t[span] / limit_t[span], np.abs(c[span]) / limit_c))
            score = np.where(np.abs(c[span]) > policy.BIAS_LARGEST, 0.0, score)
            worst = int(score.argmax())
            if score[worst] <= 1:
                continue
            value, index = float(c[span][worst]), self._pooled.index(int(row), worst)
            sure = math.copysign(t[span][worst], value)
            expected = f"within {limit_c:.2g} of zero in {dtypes[site]}, or |t| below {limit_t[span][worst]:.1f} (t = {sure:.1f})"
            side, extent = 1 if value > 0 else -1, together(score > 1)
            onset, interval = self._began(site, worst if metric == "law/bias" else None, step)
            findings.append(
                Finding(step, onset, site, metric, value, expected, side, float(score[worst]), index, interval, extent)
            )
        return findings

    def _arrange(self, layout: Layout) -> None:
        """Where each pooled value, its t and its number of samples stand; and the columns of the sums behind them."""
        self._layout = layout
        self._pooled = layout.chosen([key for key in layout.keys if key[0] in POOLED])
        keys, lengths = self._pooled.keys, self._pooled.lengths_R
        self._c = layout.places(keys, lengths)
        self._t = layout.places([(f"{metric}_t", site) for metric, site in keys], lengths)
        self._n = layout.places([(COUNT, site) for _, site in keys], lengths)
        self._sums = layout.chosen(
            [key for key in layout.keys if key[0] == SUMS[0] and (SUMS[1], key[1]) in layout.row]
        )
        self._columns = self._places.of([(site,) for _, site in self._sums.keys], self._sums.lengths_R)

    def _limit(self, spacing: int, samples_N: Array) -> Array:
        """What each |t| may reach: the same for as many samples."""
        kinds, which = np.unique(samples_N, return_inverse=True)
        degrees = [max(int(samples), 2) - 1 for samples in kinds]
        limits = [self.budget.student_t("bias", spacing, len(samples_N), number) for number in degrees]
        return np.array(limits, dtype=float)[which]

    def _remember(self, step: int, values: Array) -> None:
        sums = np.full((len(SUMS), self._places.size), np.nan)
        for x_S, metric in zip(sums, SUMS, strict=True):
            keys = [(metric, site) for _, site in self._sums.keys]
            x_S[self._columns] = values[self._layout.places(keys, self._sums.lengths_R)]
        sums = np.where(np.isfinite(sums).all(0) & (sums[1] > 0), sums, np.nan)
        for x_S, ring in zip(sums, self._recent.values(), strict=True):
            ring.write(step, x_S)

    def _began(self, site: str, head: int | None, step: int) -> tuple[int, tuple[int, int]]:
        """Where the bias of a head (None: of the site) began."""
        at = next((row for row, key in enumerate(self._sums.keys) if key[1] == site), None)
        if at is None:
            return step, (step, step)
        columns = self._columns[self._sums.span(at)]
        columns = columns if head is None else columns[[min(head, len(columns) - 1)]]
        (steps, num), (_, den) = (self._recent[metric].ordered(columns) for metric in SUMS)
        return split(steps[:, 0], num.sum(1), den.sum(1)) if np.isfinite(num[-1]).all() else (step, (step, step))

    def state_dict(self) -> dict[str, Any]:
        recent = {metric: ring.state_dict() for metric, ring in self._recent.items()}
        return {"places": self._places.state_dict(), "recent": recent, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._places.load_state_dict(state["places"])
        self._last = state["last"]
        for metric, ring in self._recent.items():
            ring.load_state_dict(state["recent"][metric])
        self._layout = Layout(())
        self._arrange(self._layout)


def split(steps_W: Array, num_W: Array, den_W: Array) -> tuple[int, tuple[int, int]]:
    """Where a bias of zero most likely became one of c, and the steps between which it likely did.

    Of a sum ``num = c * den + noise`` whose noise has a variance in proportion to ``den``, the residual of "0 before k, c from
    k on" is ``sum num^2 / den - (sum_k num)^2 / sum_k den``, and the log-likelihood ``-n/2`` times its logarithm. NaN: not filled.
    """
    known = np.isfinite(num_W) & np.isfinite(den_W)
    steps, num, den = steps_W[known], num_W[known], den_W[known]
    whole = np.square(num / np.sqrt(den)).sum()
    explained = np.square(np.cumsum(num[::-1])[::-1]) / np.cumsum(den[::-1])[::-1]
    likelihood = -len(num) / 2 * np.log(np.maximum(whole - explained, 1e-12 * whole))
    likely = np.flatnonzero(likelihood >= likelihood.max() - LIKELY)
    ((low, high),) = spans(steps[:, None], likely[:1], likely[-1:])
    return int(steps[likelihood.argmax()]), (int(low), int(high))


class SameSign:
    """Once a law is broken, few samples name a rounding bias: every head's estimate since then, four at least, has one sign and
    about one size."""

    def __init__(self) -> None:
        self._estimates: dict[str, dict[int, list[float]]] = {}  # by site and step, while a law is broken

    def update(self, broken: Finding, num: Array, den: Array, dtype: str) -> list[Finding]:
        """What the sums at a site say, heads ``[G]``, beside the law that is ``broken`` there."""
        if not (den > 0).all() or not np.isfinite(num / den).all():
            return []
        site = str(broken.site)
        seen = {at: values for at, values in self._estimates.get(site, {}).items() if at >= broken.onset}
        seen[broken.step] = (num / den).tolist()
        self._estimates[site] = dict(list(seen.items())[-MIN_SAMPLES:])
        estimates = np.concatenate(list(self._estimates[site].values()))
        gross = policy.BIAS_GROSS * floor("bias", dtype)
        if len(estimates) < 4 or abs(np.sign(estimates).sum()) < len(estimates) or np.median(np.abs(estimates)) < gross:
            return []
        scatter = float(np.std(estimates, ddof=1)) / math.sqrt(len(estimates))
        if abs(float(estimates.mean())) < policy.SAME_SIGN_T * scatter:
            return []  # of one sign by chance: a rounding to one side moves all heads alike
        pooled = float(num.sum() / den.sum())
        if abs(pooled) > policy.BIAS_LARGEST:
            return []
        expected = f"within {gross:.2g} of zero, or of mixed sign over heads and samples"
        score, side = max(1.0, abs(pooled) / gross), 1 if pooled > 0 else -1
        interval = broken.onset_interval
        return [
            Finding(
                broken.step, broken.onset, site, "law/bias_site", pooled, expected, side, score, None, interval, 1.0
            )
        ]

    def state_dict(self) -> list[Any]:
        return [[site, list(seen.items())] for site, seen in self._estimates.items()]

    def load_state_dict(self, state: Sequence[Any]) -> None:
        self._estimates = {site: {int(at): values for at, values in seen} for site, seen in state}
