"""How often a run is watched: as often as was asked for, or rarer where a budget says so.

The budget is a share of a plain step's time. What sampling costs a step, and what the weight spectra do, is each the median of a
few stretches of whole periods: what is done now and then is in every stretch, and a disk that stalls once is in one. Of the graphs'
own time (`foreshock.cost`) what is sure counts; while every step is sampled it is not known, so every second one is until it is.
The first stretch, where things are done for the first time, moves no median.

With a budget a run is not reproducible: which steps are sampled depends on the clock.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping

from foreshock.cost import SAMPLING, SPECTRA, Costs

STRETCH, STRETCHES = 20, 5  # steps of a stretch at least, and how many make a median
MOST = 64  # times the period that was asked for: beyond, a run is hardly watched
CALM = 0.5  # of the budget: what the run would cost at most with a shorter period before it is taken


def fitted(
    shares: Mapping[str, float], periods: Mapping[str, int], least: Mapping[str, int], budget: float
) -> dict[str, int]:
    """The periods, in steps, with which ``shares`` of a step's time, each as 1 / period, fit ``budget`` together.

    The dearest part is made half as frequent until they do, at most `MOST` times its ``least`` period. If they fit with room to
    spare, the dearest that was made rarer comes twice as often again. Spectra never come more often than samples, for it is with
    these that they are judged.
    """
    shares, periods = dict(shares), dict(periods)
    total = sum(shares.values())
    if total <= budget:
        floor = {**least, SPECTRA: max(least.get(SPECTRA, 1), periods[SAMPLING])}
        raised = [name for name in shares if periods[name] >= 2 * floor[name] and total + shares[name] <= CALM * budget]
        if raised:
            periods[max(raised, key=shares.__getitem__)] //= 2
    while sum(shares.values()) > budget:
        rarer = [name for name in shares if 2 * periods[name] <= MOST * least[name]]
        if not rarer:
            break
        dearest = max(rarer, key=shares.__getitem__)
        pulled = dearest == SAMPLING and SPECTRA in periods and periods[SPECTRA] < 2 * periods[SAMPLING]
        for name in (SAMPLING, SPECTRA) if pulled else (dearest,):
            periods[name] *= 2
            shares[name] /= 2
    return periods


class Stretches:
    """Seconds a step of what comes once in ``period`` steps."""

    def __init__(self, period: int) -> None:
        self.length = period * -(-STRETCH // period)
        self._seconds, self._steps = 0.0, 0
        self._means: deque[float] = deque(maxlen=STRETCHES)

    def add(self, seconds: float) -> bool:
        """One step more; whether a stretch is over, and enough of them are."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        if self._steps < self.length:
            return False
        self._means.append(self._seconds / self._steps)
        self._seconds, self._steps = 0.0, 0
        return self.is_known

    @property
    def is_known(self) -> bool:
        return len(self._means) == STRETCHES

    @property
    def middle(self) -> float:
        return statistics.median(self._means)


class Pace:
    """The periods in force: ``every`` of samples and ``stride`` of the spectra, in steps.

    ``budget``: None leaves them as they are. ``say`` is told in words what was changed and why, or why it was not; ``may_act``:
    whether this process may change them by itself.
    """

    def __init__(
        self,
        least: Mapping[str, int],
        budget: float | None,
        costs: Costs,
        say: Callable[[str], None],
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        self.least, self.budget, self.costs = dict(least), budget, costs
        self.periods = dict(least)
        self._say, self._may_act = say, may_act
        self._step: int | None = None  # under way
        self._said = False  # that nothing is to be done
        self._spent = dict.fromkeys(least, 0.0)  # at the last step
        self._stretches = {name: Stretches(period) for name, period in least.items()}

    def is_sampled(self, step: int) -> bool:
        return step % self.periods[SAMPLING] == 0

    def begin(self, step: int) -> bool:
        """A forward pass of ``step`` is about to run; whether the periods were changed for it, at its first pass alone."""
        before, self._step = self._step, step
        if step == before:
            return False
        self.costs.step(before is not None and self.is_sampled(before))
        over = False
        for name, stretches in self._stretches.items():
            spent, self._spent[name] = self._spent[name], self.costs.by_root[name]
            over = stretches.add(self._spent[name] - spent) or over
        return over and self.budget is not None and self._fit(self.budget, step)

    def shares(self) -> dict[str, float] | None:
        """What each part takes of a plain step's time; None where it is not known yet."""
        plain = self.costs.plain_step
        if not plain or not all(stretches.is_known for stretches in self._stretches.values()):
            return None
        sure = max(0.0, self.costs.graph[0] - self.costs.graph[1]) if self.costs.graph else 0.0
        shares = {name: stretches.middle / plain for name, stretches in self._stretches.items()}
        return shares | {SAMPLING: shares[SAMPLING] + sure / plain / self.periods[SAMPLING]}

    def told(self) -> dict[str, str]:
        """The periods in force, and what is known of the shares, in words."""
        shares = self.shares() or {}
        parts = {
            f"{name} now": f"{period} steps apart" + (f", {shares[name]:.2%} of a plain step's time" if shares else "")
            for name, period in self.periods.items()
        }
        held = {} if self.budget is None else {"budget": f"{self.budget:.2%} of a plain step's time"}
        return parts | held

    def _fit(self, budget: float, step: int) -> bool:
        shares = self.shares()
        if shares is None:
            return False
        periods = fitted(shares, self.periods, self.least, budget)
        total = sum(shares.values())
        parts = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
        told = f"at step {step} watching took {total:.2%} of a plain step's time ({parts}), the budget is {budget:.2%}"
        if periods[SAMPLING] == 1 and self.costs.graph is None:
            periods |= {name: max(2, period) for name, period in periods.items()}
            told += "; what the graphs take beside it shows against plain steps alone"
        changed = [name for name, period in periods.items() if period != self.periods[name]]
        if changed and self._may_act():
            self.periods = periods
            self._stretches |= {name: Stretches(periods[name]) for name in changed}
            now = [f"{name} are {periods[name]} steps apart ({least} asked for)" for name, least in self.least.items()]
            self._say(f"{told}; now {', '.join(now)}")
            self._said = False
            return True
        if total > budget and not self._said:
            why = "ranks of a job must sample the same steps" if changed else f"{MOST} times what was asked for is most"
            self._say(f"{told}; steps are left as far apart as they are: {why}")
            self._said = True
        return False

    def state_dict(self) -> dict[str, int]:
        """How many times as far apart as was asked for, by part."""
        return {name: period // self.least[name] for name, period in self.periods.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with the periods that were in force, where there is a budget."""
        if self.budget is not None:
            self.periods = {name: least * state.get(name, 1) for name, least in self.least.items()}
            if self.periods.get(SPECTRA, math.inf) < self.periods[SAMPLING]:  # of a run with other settings
                self.periods[SPECTRA] = self.least[SPECTRA] * state[SAMPLING]
            self._stretches = {name: Stretches(period) for name, period in self.periods.items()}
