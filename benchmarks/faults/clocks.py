"""When a fault has hurt: against the run's healthy twin, and against the other healthy seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from foreshock.demo.departure import MARGIN, WINDOW, departure

SIGMA, LASTING, LEAST = 5.0, 20, 3
RULES = (
    f"Damage is the first step from which the mean of (loss - loss of the healthy twin) over {WINDOW} steps stays above {MARGIN} "
    f"nats to the end. t5s is the first step from which the loss's mean over {WINDOW} steps stays {SIGMA:g} standard deviations "
    f"above that of the other healthy seeds for {LASTING} steps."
)

Values = npt.NDArray[np.float64]


def damage(losses: Sequence[float], twin: Sequence[float]) -> int | None:
    """The step of lasting damage, both series from step 0 on and equal until the fault; None where there is none."""
    length = min(len(losses), len(twin))
    return departure(losses[:length], twin[:length])


def smoothed(losses: Sequence[float]) -> Values:
    """Trailing mean over at most `WINDOW` steps, ``[n]``."""
    sums = np.concatenate([np.zeros(1), np.cumsum(losses)])
    last = np.arange(1, len(losses) + 1)
    first = np.maximum(last - WINDOW, 0)
    result: Values = (sums[last] - sums[first]) / (last - first)
    return result


def leaves_band(losses: Sequence[float], others: Sequence[Sequence[float]], at: int) -> int | None:
    """The step, from ``at`` on, at which the loss leaves the other healthy seeds; None if it does not, or there are too few."""
    if len(others) < LEAST:
        return None
    length = min(len(losses), *(len(other) for other in others))
    band = np.array([smoothed(other[:length]) for other in others])
    out = ~(smoothed(losses[:length]) <= band.mean(0) + SIGMA * band.std(0, ddof=1))
    out[:at] = False
    held = np.convolve(out, np.ones(LASTING), "valid") if length >= LASTING else np.zeros(0)
    found = np.flatnonzero(held == LASTING)
    return int(found[0]) if len(found) else None
