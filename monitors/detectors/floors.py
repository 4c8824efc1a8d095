"""Residuals of laws in units of their floors: one sample far beyond, or most of a few samples beyond. Shapes: S series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.monitors import policy
from foreshock.monitors.detectors.ring import Ring, spans, widen
from foreshock.records import Array


class Floors:
    """The score is the last sample over ``gross``, or the median of the last ``samples``, whichever is larger."""

    def __init__(self, gross: float = policy.LAW_GROSS, samples: int = policy.LAW_SAMPLES) -> None:
        self.gross = gross
        self.score = np.zeros(0)
        self.lasting = np.zeros(0)  # the median of the last samples, in floors; 0 until they are in
        self._recent = Ring(samples + 1)  # one more than are judged, to know the sample before the first beyond

    def update(self, step: int, x_S: Array) -> None:
        """Take one residual of each series, in floors."""
        self.score, self.lasting = (widen(x, len(x_S), 0.0) for x in (self.score, self.lasting))
        known = np.isfinite(x_S)
        self._recent.write(step, x_S)
        lasting = np.nan_to_num(np.median(self._recent.ordered()[1][1:], axis=0), nan=0.0)
        self.lasting = np.where(known, lasting, self.lasting)
        self.score = np.where(known, np.fmax(x_S / self.gross, lasting), self.score)

    @property
    def direction(self) -> Array:
        return np.ones(len(self.score), dtype=int)

    @property
    def onset(self) -> Array:
        return self.began()[0]

    @property
    def onset_interval(self) -> Array:
        return self.began()[1]

    def began(self, columns: Array | None = None) -> tuple[Array, Array]:
        """The first sample beyond the floor among those judged ``[N]``, and the interval from the one before it ``[N, 2]``."""
        steps, values = self._recent.ordered(columns)
        beyond = np.nan_to_num(values[1:], nan=0.0) > 1
        first = np.where(beyond.any(0), beyond.argmax(0), len(beyond) - 1) + 1
        return steps[first, np.arange(steps.shape[1])], spans(steps, first, first)

    @property
    def expected(self) -> Array:
        return np.ones(len(self.score))

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score.tolist(), "lasting": self.lasting.tolist(), "recent": self._recent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.score, self.lasting = (np.array(state[name], dtype=float) for name in ("score", "lasting"))
        self._recent.load_state_dict(state["recent"])
