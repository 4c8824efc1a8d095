"""This process among the ranks of its job: when it tells them what it measured, and when it steps aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import distributed

from foreshock.agreement import is_shared
from foreshock.clock import StepClock
from foreshock.collector import Collector
from foreshock.cost import SAMPLING
from foreshock.kept import Store
from foreshock.merging import Merging
from foreshock.records import Probe

AT_EXIT = 10.0  # the same where a process ends without having closed its watch
ALONE = "making a gloo group of all ranks; each goes on watching for itself, in a folder of its own as with merge=False"
TIMEOUT = 600.0  # seconds after which a rank that does not answer is given up: it may still compile


class Ranks:
    """Decides, the same on every rank, which steps are merged and when.

    ``wanted``: whether ranks are to be watched as one run. ``group``: the process group of them; None makes one. ``alone()`` is the
    store of a rank that goes on by itself. ``exchanged``: the step before which everything was told.
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
            self.exchanged = self._clock.step
            if distributed.get_rank() > 0:
                collector.hush()
        return collector.merging is not None

    def exchange(self, settle: bool = False) -> None:
        """Once a step, by every rank before its optimizer's: a place that comes behind the same exchanges of the training on all,
        so that none waits here for one that waits there. ``settle``: no step is to come. Where a rank is gone, this one gives up.
        """
        step = self._clock.step
        if self.given_up or (step == self.exchanged and not settle):
            return
        sampled = [over for over in range(self.exchanged, step) if self._is_sampled(over)]
        self.exchanged = step
        if settle and not sampled and not self._has_met():
            return
        self._weigh(step - 1)
        if not self._meet():
            return
        try:
            with self._collector.working, self._collector.costs.of(SAMPLING):
                self._tell(sampled, step - 1 if settle else None)
        except Exception as error:
            self.given_up = True
            self._fail("merging what the ranks measured; this rank watches no more", error)

    def hurry(self) -> None:
        """Give other ranks up sooner from now on."""
        if self._collector.merging is not None:
            self._collector.merging.timeout = AT_EXIT

    def drop(self) -> None:
        """Let go of what is under way: training goes on elsewhere."""
        if self._collector.merging is not None:
            self._collector.merging.drop()

    def _meet(self) -> bool:
        """Whether there is a group to tell each other through. Where none can be made each rank goes on by itself."""
        assert self._collector.merging is not None
        try:
            self._collector.merging.meet()
            return True
        except Exception as error:
            self.wanted = False
            self._collector.part(self._alone())
            self._fail(ALONE, error)
            return False

    def _has_met(self) -> bool:
        """Whether the ranks have told each other anything yet."""
        return self._collector.merging is not None and self._collector.merging.flushes > 0

    def _tell(self, sampled: Sequence[int], last: int | None) -> None:
        """Hear what was merged since, and begin to merge ``sampled`` steps. After the ``last`` of all, what was read beside them is
        merged too, and all is heard."""
        merging = self._collector.merging
        assert merging is not None
        self._hear(merging)
        for step in sampled:
            self._hear(merging)
            merging.launch(self._collector.local(step))
        if last is not None:
            self._hear(merging)
            if last not in sampled:
                merging.launch(self._collector.local(last))
                self._hear(merging, judge=False)

    def _hear(self, merging: Merging, judge: bool = True) -> None:
        """Wait for the flush under way, if there is one, and judge what all ranks measured."""
        if not merging.in_flight:
            return
        with self._collector.costs.of("merging ranks"):
            whole = merging.receive()
        for step, readings in whole.readings:
            if step < whole.step or not judge:
                self._collector.note(step, readings)
            else:
                self._collector.conclude(step, readings, whole.sites, whole.ranks)
