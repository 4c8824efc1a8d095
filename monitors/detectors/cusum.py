"""Two-sided CUSUM over many series at once, with the onset of each excursion and an interval for it (Page, 1954).

``M = max(0, M + clip(z) - slack)`` rises only while the series stays away from what is expected; the clip makes one wild
sample worth no more than a few bad ones, so an alarm always needs persistence. ``exp(M)`` is an e-detector: see
`foreshock.monitors.budget` for the limit that follows from it.

The excursion began at the sample k that makes the sum of pushes from k to now largest. Every k whose sum is within `SET` of
the largest is as good a candidate: a likelihood-ratio set. It holds the true beginning of a step change at least nine times in
ten. A ramp is dated late, when it has become visible: a slow one is held less often (tests/monitors/detectors/test_onset.py).

Shapes: S series, R samples kept, N columns asked for; the first of two sides is up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.monitors.detectors.contract import Baseline
from foreshock.monitors.detectors.ring import Ring, spans, widen
from foreshock.records import Array

CLIP = 4.0  # one sample counts for at most 4 sigma: a healthy router moved its load between experts for three samples
SLACK = 1.5  # in sigma: exp(clip(z) - 1.5) has a mean of at most 1 up to 1.73 times the spread estimated (budget.py)
KEPT = 64  # samples back to which an onset is sought
SET = 2.5  # log-likelihood below the largest at which a beginning is still likely
LIMIT = 12.0  # a single series at the default budget


class Cusum:
    """The sum alarms while it is above ``limit`` and itself stops at twice that.

    ``baseline`` says what is expected (None: samples are standardized already). ``sides``, bool ``[2, S]``, are those that are
    judged (None: both); whoever owns the columns sets it, and ``limit`` with it.
    """

    def __init__(
        self, baseline: Baseline | None = None, limit: float = LIMIT, *, clip: float = CLIP, slack: float = SLACK
    ) -> None:
        self.baseline, self.limit, self.clip, self.slack = baseline, limit, clip, slack
        self.sides: Array | None = None
        self.sums = np.zeros((2, 0))
        self.expected = self.spread = np.empty(0)  # at the last sample
        self._recent = Ring(KEPT)  # of z

    def update(self, step: int, x_S: Array) -> None:
        """Take one sample of each series, in its own unit."""
        x_S = np.where(np.isfinite(x_S), x_S, np.nan)
        z = self._centred(self._standardized(step, x_S))
        self.sums = widen(self.sums, len(x_S), 0.0)
        push = np.clip(np.stack([z, -z]), -self.clip, self.clip) - self.slack
        moved = np.clip(self.sums + push, 0, 2 * self.limit)
        self.sums = np.where(np.isfinite(z), moved if self.sides is None else moved * self.sides, self.sums)
        self._recent.write(step, np.clip(z, -self.clip, self.clip))
        if self.baseline is not None:
            self.baseline.learn(step, x_S, np.all(self.sums < self.limit / 2, axis=0))

    def _standardized(self, step: int, x_S: Array) -> Array:
        if self.baseline is None:
            self.expected, self.spread = np.zeros(len(x_S)), np.ones(len(x_S))
            return x_S
        self.expected, self.spread = self.baseline.expect(step, len(x_S))
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (x_S - self.expected) / self.spread
        return np.where(np.isnan(z), np.nan, z)

    def _centred(self, z_S: Array) -> Array:
        return z_S

    @property
    def score(self) -> Array:
        return np.asarray(self.sums.max(0) / self.limit)

    @property
    def direction(self) -> Array:
        return np.where(self.sums[0] >= self.sums[1], 1, -1)

    @property
    def onset(self) -> Array:
        return self.began()[0]

    @property
    def onset_interval(self) -> Array:
        return self.began()[1]

    def began(self, columns: Array | None = None) -> tuple[Array, Array]:
        """Onset ``[N]`` and its interval ``[N, 2]`` of some columns (None: all), as said above."""
        chosen = np.arange(self.sums.shape[1]) if columns is None else columns
        steps, z = self._recent.ordered(chosen)
        known = np.isfinite(z)
        push = np.where(known, self.direction[chosen] * z - self.slack, 0.0)
        total = np.where(known, np.cumsum(push[::-1], axis=0)[::-1], -np.inf)
        likely = total >= total.max(0, initial=-np.inf) - SET
        best, last = total.argmax(0), len(total) - 1 - likely[::-1].argmax(0)
        return steps[best, np.arange(len(chosen))], spans(steps, likely.argmax(0), last)

    def state_dict(self) -> dict[str, Any]:
        baseline = {} if self.baseline is None else self.baseline.state_dict()
        recent, expected = self._recent.state_dict(), self.expected.tolist()
        return {"sums": self.sums.tolist(), "recent": recent, "expected": expected, "baseline": baseline}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = np.array(state["sums"], dtype=float).reshape(2, -1)
        self.expected = np.array(state["expected"], dtype=float)
        self._recent.load_state_dict(state["recent"])
        if self.baseline is not None:
            self.baseline.load_state_dict(state["baseline"])
