"""Weights of one head or router that jump, or stand still, while all others go on as before.

A bit that flips in a weight or in its optimizer state moves one head by many times what it usually moves; a learning rate moves
all of them alike. So a head's step is compared with its own before it and with the median of all heads' at the same time. A rare
batch moves a head of a converged model as far, but in all of its entries: a jump counts where most of it is in one.

Shapes: N values of one step, over sites, queries and keys; M of their peaks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from foreshock.monitors.detectors.sheet import Layout, Places, Sheet
from foreshock.monitors.finding import Finding, together
from foreshock.monitors.rates import learning_rate
from foreshock.records import Array, Reading, Site

INCREMENTS = ("attention/dwq_norm", "attention/dwk_norm")
NORM = "router/row_norm_max"
JUMP = 4.0  # times the step before and the median of all heads: healthy heads reached 1.5, under a broken kernel 2.4 (docs/log.md)
PEAKS = {"attention/dwq_norm": "attention/dwq_peak", "attention/dwk_norm": "attention/dwk_peak"}
ALONE = 0.5  # of the norm of a jump, in one entry: 0.97 and more where one entry made it fourfold, 0.34 at most where a batch did
GROWN = 6.0  # times the norm one sample before: healthy routers reached 1.02, under a hundredfold learning rate 2.6
REACH = 3  # samples of the learning rate that an increment can reach back to
HEADS = 4  # fewer have no median to be compared with
MOVED, STILL = 5, 2  # samples in which weights moved before they can stop, and in which they must have stood still


class Moves:
    """One finding for the head of each site that jumped at this sample, and one for each site where heads stand still."""

    def __init__(self) -> None:
        self._increments, self._norms, self._peaks = Memory(INCREMENTS), Memory((NORM,)), Sheet(PEAKS.values())
        self._rates: deque[float] = deque([1.0], maxlen=REACH)

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Finding]:
        """Weights are read in turn, so that a step brings the readings of some sites only."""
        rate = learning_rate(readings)
        self._rates.append(self._rates[-1] if rate is None else rate)
        heads = self._increments
        heads.take(step, readings)
        limit = JUMP * max(heads.usual(), self._raised())
        spread = heads.beside(*self._peaks.read(readings), PEAKS) < ALONE  # not where it was not read
        jumped = np.where(spread, 0.0, heads.ratio / limit)
        found = heads.findings(step, jumped, "about {:.3g} as before, and its like elsewhere", +1)
        if self._rates[-1] > 0:
            found += heads.findings(
                step, np.where(heads.stopped(), 2.0, 0.0), "above zero, as before: the optimizer steps", -1
            )
        self._norms.take(step, readings)
        grown = np.where(self._norms.moved >= MOVED, self._norms.ratio, np.nan) / GROWN  # from zero any weight leaps
        return found + self._norms.findings(step, grown, "about {:.3g} as before", +1)

    def _raised(self) -> float:
        """By what the learning rate rose within a window of increments: a restarted schedule reaches some sites before others."""
        lowest = min(self._rates)
        return max(1.0, self._rates[-1] / lowest) if lowest > 0 else np.inf

    def state_dict(self) -> dict[str, Any]:
        return {
            "increments": self._increments.state_dict(),
            "norms": self._norms.state_dict(),
            "rates": list(self._rates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._increments.load_state_dict(state["increments"])
        self._norms.load_state_dict(state["norms"])
        self._rates = deque(state["rates"], maxlen=REACH)


class Memory:
    """What every head's series of ``metrics`` last was. After `take`, ``x``, ``before``, ``since`` and ``ratio`` are of the values
    that came, ``[N]``; the ratio to the value before is NaN where there was none above zero."""

    def __init__(self, metrics: Collection[str]) -> None:
        self._sheet, self._places = Sheet(metrics), Places()
        self._last = np.zeros(
            (5, 0)
        )  # of each column: value, its step, its ratio; samples it moved in; samples it stood still

    def take(self, step: int, readings: Sequence[Reading]) -> None:
        self._layout, self.x = self._sheet.read(readings)
        self._columns = self._places.of(self._layout.keys, self._layout.lengths_R)
        missing = self._places.size - self._last.shape[1]
        fresh = np.repeat([[np.nan], [-1], [np.nan], [0], [0]], missing, 1)
        self._last = np.concatenate([self._last, fresh], 1)
        self.before, self.since, _, self.moved, still = self._last[:, self._columns]
        with np.errstate(invalid="ignore", divide="ignore"):
            self.ratio = np.where(np.isfinite(self.x) & (self.before > 0), self.x / self.before, np.nan)
        steps = np.full(len(self.x), float(step))
        self._last[:, self._columns] = [
            self.x,
            steps,
            self.ratio,
            self.moved + (self.x > 0),
            np.where(self.x == 0, still + 1, 0),
        ]

    def beside(self, layout: Layout, values_M: Array, names: Mapping[str, str]) -> Array:
        """The values of other series at the same heads, ``[N]``; NaN where there are none. ``names`` says which goes with which."""
        keys = [(names[metric], site) for metric, site in self._layout.keys]
        return np.asarray(np.append(values_M, np.nan)[layout.places(keys, self._layout.lengths_R)])

    def usual(self) -> float:
        """The median ratio of all heads, of each the last one known; infinite where they are too few to tell."""
        known = self._last[2][self._last[2] > 0]
        return float(np.median(known)) if len(known) >= HEADS else np.inf

    def stopped(self) -> Array:
        """Which heads moved once and do not any more, while some other does."""
        _, _, _, moved, still = self._last[:, self._columns]
        return np.asarray((moved >= MOVED) & (still >= STILL) & bool((self._last[0] > 0).any()))

    def findings(self, step: int, score: Array, expected: str, direction: int) -> list[Finding]:
        """The worst head of every reading that has one at the limit."""
        found, score = [], np.nan_to_num(score)
        for row in np.flatnonzero(self._layout.each(np.maximum, score) >= 1):
            span = self._layout.span(int(row))
            worst = int(score[span].argmax())
            at = span.start + worst
            metric, site = self._layout.keys[row]
            found.append(
                Finding(
                    step=step,
                    onset=step,
                    onset_interval=(int(self.since[at]), step),
                    site=site,
                    metric=metric,
                    value=float(self.x[at]),
                    expected=expected.format(self.before[at]),
                    direction=direction,
                    score=float(score[at]),
                    index=self._layout.index(int(row), worst),
                    extent=together(score[span] >= 1),
                )
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"places": self._places.state_dict(), "last": self._last.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._places.load_state_dict(state["places"])
        self._last = np.array(state["last"], dtype=float).reshape(5, -1)
