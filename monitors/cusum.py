"""Two-sided CUSUM over many standardized series at once, with the onset of each excursion (Page, 1954).

``S = max(0, S + clip(z) - slack)`` rises only while the series stays away from what is expected; the clip makes one wild
sample worth no more than a few bad ones, so an alarm always needs persistence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.records import Array

CLIP = 4.0  # one sample counts for at most 4 sigma: a healthy router moved its load between experts for three samples
SLACK = 1.5  # in sigma: forecast errors of neighbouring samples share the fit, so half a sigma (the textbook's) would wander


class Cusum:
    """``sums`` is ``[2, S]``: up and down. A series alarms while its sum is above ``limit``; the sum itself stops at twice that."""

    def __init__(self) -> None:
        self.sums = np.zeros((2, 0))
        self.onset = np.zeros((2, 0), dtype=np.int64)

    def update(self, step: int, z: Array, limit: float) -> Array:
        """Take one standardized sample ``[S]`` (NaN: missing, nothing changes); returns the sums ``[2, S]``."""
        missing = len(z) - self.sums.shape[1]
        self.sums = np.pad(self.sums, ((0, 0), (0, missing)))
        self.onset = np.pad(self.onset, ((0, 0), (0, missing)), constant_values=step)
        push = np.clip(np.stack([z, -z]), -CLIP, CLIP) - SLACK
        moved = np.clip(self.sums + push, 0, 2 * limit)
        fresh = (self.sums == 0) & (moved > 0)
        self.onset = np.where(fresh, step, self.onset)
        self.sums = np.where(np.isfinite(z), moved, self.sums)
        return self.sums

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.tolist(), "onset": self.onset.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = np.array(state["sums"], dtype=float).reshape(2, -1)
        self.onset = np.array(state["onset"], dtype=np.int64).reshape(2, -1)
