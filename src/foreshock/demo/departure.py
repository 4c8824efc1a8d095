"""When a broken run's loss leaves that of its healthy twin: the clock that a warning has to beat."""

from collections.abc import Sequence

import numpy as np

WINDOW, MARGIN = 50, 0.02
RULE = (
    "All numbers are steps. The loss departs at the first step from which the mean of (loss - healthy loss) over the last "
    f"{WINDOW} steps stays above {MARGIN} nats to the end. The healthy twin has the same seed and batches; a real training "
    "has no such twin."
)


def departure(
    losses: Sequence[float], healthy: Sequence[float], window: int = WINDOW, margin: float = MARGIN
) -> int | None:
    """The step from which the trailing mean of ``losses - healthy`` stays above ``margin``, or None.

    A loss that is no longer a number counts as above.
    """
    gap = np.subtract(losses, healthy)
    sums = np.concatenate([np.zeros(1), np.cumsum(gap)])
    last = np.arange(1, len(gap) + 1)
    first = np.maximum(last - window, 0)
    calm = np.flatnonzero((sums[last] - sums[first]) / (last - first) <= margin)
    step = int(calm[-1]) + 1 if len(calm) else 0
    return step if step < len(gap) else None
