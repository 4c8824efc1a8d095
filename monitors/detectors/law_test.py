"""Residuals of the laws of a correct kernel against their floors; needs no healthy baseline.

Shapes: N values of a sheet, S series: one for each head of each law and site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from foreshock.monitors import policy
from foreshock.monitors.budget import Budget
from foreshock.monitors.detectors.bias import SUMS, BiasTest, SameSign
from foreshock.monitors.detectors.floors import Floors
from foreshock.monitors.detectors.sheet import Layout, Places, Sheet
from foreshock.monitors.finding import Finding, together
from foreshock.monitors.laws import EXPONENTIAL, GAINS, UNIT_ROUNDOFF, floor, growth
from foreshock.records import Array, Reading, Site

LOGITS = "attention/logit_max"
SHADOW_BIAS = "attention/shadow_bias"
HINTS = (*policy.FORWARD_LAWS, "law/euler")  # beyond their floors they name a fault before they are alarms of their own
BESIDE = (*GAINS.values(), LOGITS, SHADOW_BIAS, *SUMS)  # what a law's judgement looks at


class LawTest:
    """A finding for every law that is broken now, with the worst head, and for a rounding bias beyond chance.

    ``kernel_dtype`` says in which precision the kernels are meant to store P and O; without it, each site's own dtype is taken,
    and TF32's where float32 products may use it.
    """

    def __init__(self, kernel_dtype: str | None = None, budget: Budget | None = None) -> None:
        self.kernel_dtype = kernel_dtype
        self._sheet, self._places, self._floors = Sheet((*policy.LAWS, *BESIDE)), Places(), Floors()
        self._layout: Layout | None = None
        self._dtypes: dict[str, str] = {}  # by site, where laws can be judged
        self._held_to: object = None  # what the floors were looked up for
        self._bias, self._same_sign = BiasTest(budget or Budget()), SameSign()

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Finding]:
        layout, values = self._sheet.read(readings)
        held_to = (dict(sites), self.kernel_dtype or tf32())
        if layout is not self._layout or held_to != self._held_to:
            self._arrange(layout, sites)
            self._held_to = held_to
        findings = self._residuals(step, layout, values)
        return findings + self._bias.update(step, readings, self._dtypes, self._saturated(layout, values))

    def _arrange(self, layout: Layout, sites: Mapping[str, Site]) -> None:
        """Of every value of the sheet its floor (NaN: not judged), and where what it depends on stands."""
        self._layout = layout
        found = {site.id: judged_as(site, self.kernel_dtype, tf32()) for site in sites.values()}
        self._dtypes = {site: dtype for site, dtype in found.items() if dtype in UNIT_ROUNDOFF}
        keys = [(metric, site) for metric, site in layout.keys if metric in policy.LAWS and site in self._dtypes]
        self._laws = laws = layout.chosen(keys)
        self._columns = self._places.of(keys, laws.lengths_R)
        self._here = layout.places(keys, laws.lengths_R)
        self._gains = layout.places([(GAINS.get(metric, ""), site) for metric, site in keys], laws.lengths_R)
        self._logits = np.array([layout.row.get((LOGITS, site), len(layout.keys)) for _, site in keys], dtype=np.int64)
        floors = [floor(metric.removeprefix("law/"), self._dtypes[str(site)]) for metric, site in keys]
        self._floor = np.array(floors, dtype=float)[laws.owner_N]
        self._exponential = np.array([metric in EXPONENTIAL for metric, _ in keys], dtype=bool)[laws.owner_N]

    def _saturated(self, layout: Layout, values: Array) -> set[str | None]:
        """Sites whose probabilities are 0 or 1, where no kernel is to blame for what rounding leaves."""
        beyond = np.flatnonzero(layout.each(np.fmax, values) > policy.LAW_LOGITS)
        return {site for metric, site in (layout.keys[row] for row in beyond) if metric == LOGITS}

    def _limits(self, layout: Layout, values: Array) -> Array:
        """The floor of every residual as it grows where rounding reaches further (`laws.growth`); NaN where none is judged."""
        logits = np.append(layout.each(np.fmax, values), np.nan)[self._logits][self._laws.owner_N]
        gains = np.append(values, np.nan)[self._gains]
        return np.where(logits > policy.LAW_LOGITS, np.nan, self._floor * growth(gains, logits, self._exponential))

    def _residuals(self, step: int, layout: Layout, values: Array) -> list[Finding]:
        limits = self._limits(layout, values)
        excess = values[self._here] / limits
        x_S = np.full(self._places.size, np.nan)
        x_S[self._columns] = excess
        self._floors.update(step, x_S)
        excess = np.where(np.isfinite(excess), excess, 0.0)
        score = np.where(np.isfinite(x_S[self._columns]), self._floors.score[self._columns], 0.0)
        findings = []
        for row in np.unique(self._laws.owner_N[(score > 1) | (excess > 1)]):
            found = self._finding(step, int(row), limits, excess, score)
            if found is not None and found.metric == "law/shadow":
                found = replace(found, expected=found.expected + self._along(found, layout, values))
            findings += [] if found is None else [found]
            if found is not None and found.metric in policy.BACKWARD_LAWS and found.score >= 1:
                findings += self._one_sided(found, layout, values)
        return findings

    def _finding(self, step: int, row: int, limits: Array, excess: Array, score: Array) -> Finding | None:
        """The worst head of a law at a site, if it is out, or if it helps to name what is."""
        (law, site), span = self._laws.keys[row], self._laws.span(row)
        worst = int(score[span].argmax())
        confirmed = score[span][worst] > 1
        if not confirmed:
            worst = int(excess[span].argmax())
            if law not in HINTS or not excess[span][worst] > 1:
                return None
        at = span.start + worst
        (onset,), ((low, high),) = self._floors.began(self._columns[[at]])
        return Finding(
            step=step,
            onset=int(onset),
            site=site,
            metric=law,
            value=float(max(excess[at], self._floors.lasting[self._columns[at]]) * limits[at]),
            expected=f"at most {limits[at]:.2g} in {self._dtypes[str(site)]}",
            direction=+1,
            score=float(score[at]) if confirmed else float(1 - 1 / excess[at]),
            index=self._laws.index(row, worst),
            onset_interval=(int(low), int(high)),
            extent=together(excess[span] > 1),
        )

    def _along(self, shadow: Finding, layout: Layout, values: Array) -> str:
        """The signed part of what the shadow found, in words."""
        row = layout.row.get((SHADOW_BIAS, shadow.site))
        bias = np.nan if row is None else values[layout.span(row)][shadow.index or 0]
        return f"; along the output by {bias:+.2g} of it" if np.isfinite(bias) else ""

    def _one_sided(self, broken: Finding, layout: Layout, values: Array) -> list[Finding]:
        rows = [layout.row[metric, broken.site] for metric in SUMS if (metric, broken.site) in layout.row]
        if len(rows) < len(SUMS):
            return []
        num, den = (values[layout.span(row)] for row in rows)
        return self._same_sign.update(broken, num, den, self._dtypes[str(broken.site)])

    def state_dict(self) -> dict[str, Any]:
        return {
            "places": self._places.state_dict(),
            "floors": self._floors.state_dict(),
            "bias": self._bias.state_dict(),
            "same_sign": self._same_sign.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._layout = None
        self._places.load_state_dict(state["places"])
        self._floors.load_state_dict(state["floors"])
        self._bias.load_state_dict(state["bias"])
        self._same_sign.load_state_dict(state["same_sign"])


def judged_as(site: Site, kernel_dtype: str | None, products_in_tf32: bool) -> str:
    """The precision whose floors hold at ``site``; see `LawTest`."""
    if site.kind == "router":
        return site.dtype  # a softmax is no kernel with a precision of its own, and no product
    if kernel_dtype is not None:
        return kernel_dtype
    return "tf32" if site.dtype == "float32" and products_in_tf32 else site.dtype


def tf32() -> bool:
    """Whether float32 products may use TF32, by either of torch's two settings, which refuse to be mixed."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return str(torch.backends.cuda.matmul.fp32_precision) != "ieee"
