"""What watching costs a run, measured while it runs, by the part that takes it.

*The account.* Host seconds of each part, without those of parts that it calls; and of each root, the outermost part. Two roots can
be made rarer (`foreshock.pace`): `SAMPLING` and `SPECTRA`. What cannot (compiling, numbers that the user logs) is shown, no more.

*The graph* itself takes longer where it is instrumented: by what a sampled step takes beyond the plain ones just before it, host
time of foreshock taken off both. The median of such differences is told with its error, for steps that compile, save or evaluate
are far off. Where every step is sampled nothing is known of it.

On an accelerator the host does not see what the device does. Whoever wants to know (`waits`) has it wait for the device once a
step, before foreshock first reads numbers that it would wait for: what was queued till then is the training's. Every later wait of
that step is for foreshock's own work, and charged to it. The graph's own time shows as far as the training script itself waits for
its steps.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from foreshock import _torch
from foreshock.records import Read

SAMPLING, SPECTRA = "sampled steps", "weight spectra"
AROUND, REWRITING, LOGGED = "around the optimizer step", "matching and rewriting", "logged numbers"
ACTIONS, WAITING = "on_alarm", "waiting for the device"
NOT_OURS = (ACTIONS, WAITING)  # the user's own work, and the training's
PLAIN, DIFFERENCES = 16, 31  # plain steps that a sampled one is compared with, and comparisons kept
LEAST = 5  # fewer say nothing
NORMAL, OF_MEDIAN = 1.4826, 1.2533  # a deviation over its median absolute one; a median's error over a mean's


class Costs:
    """Seconds by part (``seconds``) and by root (``by_root``) since the start, and how long steps take without them.

    ``clock`` gives seconds; ``waits``: wait for the device before own work is timed.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, waits: bool = False) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.by_root: defaultdict[str, float] = defaultdict(float)
        self.began = clock()
        self.sampled = 0  # steps
        self._clock, self._waits = clock, waits
        self._open: list[str] = []
        self._since = self._stepped = self.began
        self._settled = False  # in the step under way
        self._own = 0.0  # of foreshock, at the last step
        self._plain: deque[float] = deque(maxlen=PLAIN)
        self._any: deque[float] = deque(maxlen=PLAIN)
        self._beyond: deque[float] = deque(maxlen=DIFFERENCES)

    @property
    def wall(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.began

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Charge ``part`` with what runs inside."""
        self._charge()
        self._open.append(part)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def settle(self) -> None:
        """Wait for what the training has queued on the device, if that is asked for and at most once a step: it is not foreshock's
        time, and what is queued from here on is."""
        if self._waits and not self._settled and torch.cuda.is_initialized() and not _torch.is_capturing():
            self._settled = True
            with self.of(WAITING):
                torch.cuda.synchronize()

    def settled(self, read: Read) -> Read:
        """``read``, once the device has settled."""

        def reading(parameter: torch.Tensor) -> torch.Tensor:
            self.settle()
            return read(parameter)

        return reading if self._waits else read

    def step(self, sampled: bool) -> None:
        """A step of the training is over."""
        now, own = self._clock(), sum(s for part, s in self.seconds.items() if part != WAITING)
        taken = now - self._stepped - (own - self._own)
        self._stepped, self._own, self._settled = now, own, False
        self.sampled += sampled
        self._any.append(taken)
        if not sampled:
            self._plain.append(taken)
        elif len(self._plain) >= LEAST:
            self._beyond.append(taken - statistics.median(self._plain))

    @property
    def plain_step(self) -> float | None:
        """Seconds of a step without foreshock, where any is known; else of a sampled one without foreshock's host time."""
        known = self._plain if len(self._plain) >= LEAST else self._any
        return statistics.median(known) if len(known) >= LEAST else None

    @property
    def graph(self) -> tuple[float, float] | None:
        """Seconds that a sampled step takes longer, and the error of that; None where it is not known."""
        if len(self._beyond) < LEAST:
            return None
        middle = statistics.median(self._beyond)
        spread = NORMAL * statistics.median(abs(x - middle) for x in self._beyond)
        return max(middle, 0.0), OF_MEDIAN * spread / float(len(self._beyond)) ** 0.5

    def told(self) -> dict[str, str]:
        """Every part in words, the dearest first."""
        wall = max(self.wall, 1e-9)
        parts = sorted(self.seconds.items(), key=lambda entry: -entry[1])
        told = {part: f"{s:.2f} s ({s / wall:.1%} of the wall clock)" for part, s in parts}
        if self.graph is None:
            graph = "not known: it takes plain steps to compare with" if self.sampled else "none was sampled"
        else:
            more, error = self.graph
            total = more * self.sampled
            graph = f"{1e3 * more:.2f} +- {1e3 * error:.2f} ms a sampled step, {total:.2f} s ({total / wall:.1%} of the wall clock)"
        return {**told, "the instrumented graphs": graph}

    def _charge(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
            if self._open[-1] not in NOT_OURS:
                self.by_root[self._open[0]] += now - self._since
        self._since = now
