"""This process among the ranks of its job: when it tells them what it measured, and when it steps aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import distributed

from foreshock.agreement import is_shared, this_rank
from foreshock.clock import StepClock
from foreshock.collector import Collector, Store
from foreshock.cost import SAMPLING
from foreshock.merging import Merging
from foreshock.records import Probe
from foreshock.rejoin import Untold
from foreshock.shards import Whole

AT_EXIT = 10.0  # the same where a process ends without having closed its watch
ALONE = "making a gloo group of all ranks; each goes on watching for itself, in a folder of its own as with merge=False"
TIMEOUT = 600.0  # seconds after which a rank that does not answer is given up: it may still compile


class Ranks:
    """Decides, the same on every rank, which steps are merged and when.

    ``wanted``: whether ranks are to be watched as one run. ``group``: the process group of them; None makes one. ``alone()`` is the
    store of a rank that goes on by itself. ``exchanged``: the step before which every sampled one was told, or is due.
    """

    def __init__(
        self,
        collector: Collector,
        clock: StepClock,
        probes: Callable[[str], tuple[Probe, ...]],
        is_sampled: Callable[[int], bool],
        weigh: Callable[[int], None],
        fail: Callable[[str, Exception], None],
        wanted: bool,
        group: Any,
        alone: Callable[[], Store],
    ) -> None:
        self._collector, self._clock, self._probes = collector, clock, probes
        self._is_sampled, self._weigh, self._fail = is_sampled, weigh, fail
        self.wanted, self._group, self._alone = wanted, group, alone
        self.exchanged = 0
        self._due: list[int] = []  # sampled steps that are over and not told
        self.untold = Untold(collector, probes, fail)
        self._resumed = False  # whether they told each other what a state held
        self.given_up = False

    def are_one(self) -> bool:
        """Whether this process is a rank of a job that is watched as one; from the first step on at which it is known to be."""
        collector = self._collector
        if collector.merging is None and self.wanted and is_shared():
            collector.finish(self._clock.step)
            collector.merging = Merging(
                self._probes,
                collector.finished,
                fail=self._fail,
                prints=collector.gradients.prints,
                group=self._group,
                timeout=TIMEOUT,
            )
            collector.merging.apart = self.untold.apart
            self.exchanged = self._clock.step
            self.untold.since = self.untold.since if self.untold.waits else self._clock.step
            if distributed.get_rank() > 0:
                collector.hush()
        if collector.merging is None and self.untold.waits:
            self._take_up_alone()
        return collector.merging is not None

    def state_dict(self) -> dict[str, Any]:
        """What this rank has not told, without waiting for another; to be asked before what a flush changes."""
        with self._collector.working:
            step, merges = self._clock.step, self._collector.merging is not None and not self.given_up
            over = [*self._due, *filter(self._is_sampled, range(self.exchanged, step))] if merges else []
            return self.untold.state_dict(step, over)

    def load_state_dict(self, state: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Go on from a watch's ``state``, in place of what is under way."""
        if self._collector.merging is not None:
            self._collector.merging.drop()
        self._due.clear()
        self.exchanged = self._clock.step
        self.untold.load_state_dict(state, self._clock.step, self.wanted, note)

    def take_up(self) -> None:
        """What was loaded stands, and is merged: now, where this process goes on alone, else where the ranks meet first."""
        if self.untold.waits and (this_rank()[1] == 1 or not self.wanted):
            self._take_up_alone()

    def _take_up_alone(self) -> None:
        try:
            with self._collector.working, self._collector.costs.of(SAMPLING):
                self._take_up(None)
        except Exception as error:
            self.untold.drop()
            self._fail("merging what ranks had measured when the state was saved", error)

    def _take_up(self, among: Merging | None) -> None:
        for whole, judge, member in self.untold.wholes(among):
            self._conclude(whole, member, judge)

    def exchange(self, settle: bool = False) -> None:
        """Once a step, by every rank before its optimizer's: a place that comes behind the same exchanges of the training on all,
        so that none waits here for one that waits there. ``settle``: no step is to come. Where a rank is gone, this one gives up.
        """
        step = self._clock.step
        waits = self.untold.waits
        if self.given_up or (step == self.exchanged and not settle and not waits):
            return
        self._due += filter(self._is_sampled, range(self.exchanged, step))
        self.exchanged = step
        if settle and not self._due and not waits and not self._has_met():
            return
        self._weigh(step - 1)
        if not self._meet():
            return
        try:
            with self._collector.working, self._collector.costs.of(SAMPLING):
                self._tell(step - 1 if settle else None)
        except Exception as error:
            self.given_up = True
            self._fail("merging what the ranks measured; this rank watches no more", error)

    def hurry(self) -> None:
        """Give other ranks up sooner from now on."""
        if self._collector.merging is not None:
            self._collector.merging.timeout = AT_EXIT

    def _meet(self) -> bool:
        """Whether there is a group to tell each other through. Where none can be made each rank goes on by itself."""
        merging = self._collector.merging
        assert merging is not None
        try:
            merging.meet()
            return True
        except Exception as error:
            self.wanted = False
            self.untold.part(merging, self._clock.step)
            self._collector.part(self._alone())
            if self.untold.waits:
                self._take_up_alone()
            self._fail(ALONE, error)
            return False

    def _has_met(self) -> bool:
        """Whether the ranks have told each other anything yet."""
        return self._resumed or (self._collector.merging is not None and self._collector.merging.flushes > 0)

    def _tell(self, last: int | None) -> None:
        """Hear what was merged since, and begin to merge the steps that are due. After the ``last`` of all, what was read beside
        them is merged too, and all is heard."""
        merging = self._collector.merging
        assert merging is not None
        if self.untold.waits:
            self._take_up(merging)
            self._resumed = True
        self._hear(merging)
        sampled = False
        while self._due:
            self._hear(merging)  # an action of an alarm may save what is due
            sampled = self._due[0] == last
            merging.launch(self.untold.local(self._due.pop(0)))
        if last is not None:
            self._hear(merging)
            if not sampled:
                merging.launch(self._collector.local(last))
                self._hear(merging, judge=False)

    def _hear(self, merging: Merging, judge: bool = True) -> None:
        """Wait for the flush under way, if there is one, and judge what all ranks measured."""
        if not merging.in_flight:
            return
        with self._collector.costs.of("merging ranks"):
            whole = merging.receive()
        self.untold.since = whole.step + 1
        self._conclude(whole, merging, judge)

    def _conclude(self, whole: Whole, merging: Merging, judge: bool) -> None:
        for step, readings in whole.readings:
            if step < whole.step or not judge:
                self._collector.note(step, readings)
            else:
                placed = partial(merging.placed, ranks=whole.ranks)
                self._collector.conclude(step, readings, whole.sites, placed)
