"""This process among the ranks of its job: when it tells them what it measured, and when it steps aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import distributed

from foreshock.agreement import is_shared, this_rank
from foreshock.clock import StepClock
from foreshock.collector import Collector
from foreshock.config import Settings
from foreshock.cost import SAMPLING
from foreshock.errors import ForeshockError
from foreshock.gradients import NORM, SHARDS, WHOLE
from foreshock.instances import Instance
from foreshock.meeting import Meeting
from foreshock.merging import Merging
from foreshock.records import Array, Probe, Reading
from foreshock.shards import Local, Whole
from foreshock.store import store_of_this_rank
from foreshock.untold import Untold

AT_EXIT = 10.0  # the same where a process ends without having closed its watch
ALONE = "meeting the other ranks; this one goes on watching for itself, in a folder of its own as with merge=False"
ASIDE = "merging what the ranks measured; this rank watches no more"
LATE = ": another is gone, or {:g} s late (merge_timeout)"


class Ranks:
    """Decides, the same on every rank, which steps are merged and when.

    ``wanted``: whether ranks are to be watched as one run. ``group``: the process group of them; None makes one. ``exchanged``: the
    step before which every sampled one was told, or is ``untold``.
    """

    def __init__(
        self,
        collector: Collector,
        clock: StepClock,
        probes: Callable[[str], tuple[Probe, ...]],
        is_sampled: Callable[[int], bool],
        weigh: Callable[[int], None],
        fail: Callable[[str, Exception], None],
        settings: Settings,
        group: Any,
    ) -> None:
        self._collector, self._clock, self._probes = collector, clock, probes
        self._is_sampled, self._weigh, self._fail = is_sampled, weigh, fail
        self.wanted, self._settings, self._group = settings.merge, settings, group
        self._meeting: Meeting | None = None  # until the ranks have met
        self.exchanged = 0
        self.untold = Untold(collector, probes, fail)
        self._resumed = False  # whether they told each other what a state held
        self.given_up: int | None = None  # the step at which this rank has stepped aside

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
                timeout=self._settings.merge_timeout,
            )
            collector.merging.apart = self.untold.apart
            self._meeting = Meeting(collector.merging.world)
            self.exchanged = self._clock.step
            self.untold.since = self.untold.since if self.untold.waits else self._clock.step
            if distributed.get_rank() > 0:
                collector.hush()
        if collector.merging is None and self.untold.waits:
            self._take_up_alone()
        return collector.merging is not None

    @property
    def is_meeting(self) -> bool:
        """Whether this rank is to watch with others, and has not met them yet: nothing is recorded till then."""
        return self._meeting is not None

    def state_dict(self) -> dict[str, Any]:
        """What this rank has not told, without waiting for another; to be asked before what a flush changes."""
        with self._collector.working:
            step, merges = self._clock.step, self._collector.merging is not None and self.given_up is None
            return self.untold.state_dict(step, self._over(step) if merges else ())

    def load_state_dict(self, state: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Go on from a watch's ``state``, in place of what is under way."""
        self.drop()
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
            self.untold.forget()
            self._fail("merging what ranks had measured when the state was saved", error)

    def _take_up(self, among: Merging | None) -> None:
        for whole, judge, member in self.untold.wholes(among):
            self._conclude(whole, member, judge)

    def exchange(self, settle: bool = False) -> None:
        """Once a step, by every rank before its optimizer's: a place that comes behind the same exchanges of the training on all,
        so that none waits here for one that waits there. ``settle``: no step is to come. Where a rank is gone, this one gives up.
        """
        step = self._clock.step
        if self.given_up is not None:
            return
        sampled, waits = self._over(step), self.untold.waits
        if settle and not (sampled or waits or self.untold.packed or self._has_met()):
            return
        again, self.exchanged = step == self.exchanged and not (settle or waits), step
        if not again:
            self._read(sampled, step)
        if not self._meet(step, settle) or again:
            return
        try:
            with self._collector.working, self._collector.costs.of(SAMPLING):
                self._tell(step - 1 if settle else None, (step - 1) in sampled)
        except Exception as error:
            self._step_aside(step)
            late = "" if isinstance(error, ForeshockError) else LATE.format(self._settings.merge_timeout)
            self._fail(ASIDE + late, error)

    def _step_aside(self, step: int) -> None:
        """Neither take nor keep anything more: what is left to do is to count steps."""
        self.given_up = step
        self.drop()
        self._collector.aside = True
        self._collector.drop()

    def hears_all(self) -> bool:
        """Whether this rank hears every alarm that others hear."""
        return self._collector.merging is not None and self.given_up is None

    def _read(self, sampled: Sequence[int], step: int) -> None:
        """Take what this rank measured in ``sampled`` steps; where that fails it has nothing to tell, and takes part."""
        try:
            self._weigh(step - 1)
        except Exception as error:
            self._fail("weighing what is merged", error)
        with self._collector.working, self._collector.costs.of(SAMPLING):
            for over in sampled:
                self.untold.pack(over, self._local(over))

    def _over(self, step: int) -> list[int]:
        """The sampled steps that are over at ``step``, and not read yet."""
        return [over for over in range(self.exchanged, step) if self._is_sampled(over)]

    def _local(self, step: int) -> Local:
        try:
            return self._collector.local(step)
        except Exception as error:
            self._fail("reading what is merged", error)
            return Local(step, {}, {})

    def hurry(self) -> None:
        """Give other ranks up sooner from now on."""
        if self._collector.merging is not None:
            self._collector.merging.timeout = AT_EXIT

    def drop(self) -> None:
        """Let go of what is under way: training goes on elsewhere."""
        self.untold.drop()
        if self._collector.merging is not None:
            self._collector.merging.drop()

    def _meet(self, step: int, last: bool) -> bool:
        """Whether there is a group to tell each other through by now. Where none can be made each rank goes on by itself."""
        merging = self._collector.merging
        assert merging is not None
        if self._meeting is None:
            return True
        try:
            if not self._meeting.begins(step, merging.timeout, last):
                return False
            merging.meet()
            self._meeting = None
            return True
        except Exception as error:
            self._go_alone(merging.world)
            self._fail(ALONE, error)
            return False

    def _go_alone(self, ranks: int) -> None:
        """Watch on as one process, and judge what was measured meanwhile."""
        self._meeting = None
        self.wanted, waiting = False, [self.untold.next() for _ in range(len(self.untold.packed))]
        self._collector.part(store_of_this_rank(self._settings.run, False))
        if self.untold.waits:
            self._take_up_alone()
        sites = {instance.site.id: instance.site for instance in self._collector.instances}
        for local in waiting:
            for step, readings in _unmerged(local, self._collector.finished, ranks):
                if step < local.step or not local.sums:
                    self._collector.note(step, readings)
                else:
                    self._collector.conclude(step, readings, sites)

    def _has_met(self) -> bool:
        """Whether the ranks have told each other anything yet."""
        return self._resumed or (self._collector.merging is not None and self._collector.merging.flushes > 0)

    def _tell(self, last: int | None, told: bool) -> None:
        """Hear what was merged since, and begin to merge what waits. After the ``last`` step of all, what was read beside it is
        merged too, unless it is ``told``, and all is heard."""
        merging = self._collector.merging
        assert merging is not None
        if self.untold.waits:
            self._take_up(merging)
            self._resumed = True
        self._hear(merging)
        while self.untold.packed:
            self._hear(merging)  # an action of an alarm may save what is left
            merging.launch(self.untold.next())
        if last is not None:
            self._hear(merging)
            if not told:
                merging.launch(self._local(last))
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


def _unmerged(
    local: Local, finished: Callable[[Instance, Mapping[tuple[str, str], Array]], list[Reading]], ranks: int
) -> list[tuple[int, list[Reading]]]:
    """What a rank would have told ``ranks`` of them, as readings of its own, by step."""
    found = {local.step: [reading for instance, sums in local.sums.items() for reading in finished(instance, sums)]}
    for (metric, site, age), values in sorted(local.loose.items(), key=lambda one: -one[0][2]):
        if metric == WHOLE:
            metric, values = NORM, np.sqrt(values.sum(keepdims=True))
        elif metric == SHARDS:
            values = values / ranks
        found.setdefault(local.step - age, []).append(Reading(metric, site, values))
    return sorted(found.items())
