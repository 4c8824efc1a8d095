"""From samples to alarms: merge a step's samples, measure, store, judge. Runs between steps, never inside one."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from foreshock.cost import ACTIONS, AROUND, LOGGED, SAMPLING, SPECTRA, Costs
from foreshock.ended import MOST_UNDER_WAY, Ended, logged
from foreshock.errors import ConfigError
from foreshock.gradients import Gradients, with_gradient_norm
from foreshock.instances import Instance, Instances
from foreshock.kept import Store, Wanted
from foreshock.memory import MemoryStore, RecentStore
from foreshock.merging import Merging
from foreshock.pending import rounded
from foreshock.records import Alarm, Array, Coverage, Reading, Site
from foreshock.runtime import Merged, Sample, merged
from foreshock.shards import Local, Loose
from foreshock.transfer import Later, Transfers

# A step of 100 layers compiled by themselves and 200 microbatches; without optimizer steps samples would pile up.
MOST_SAMPLES = 20_000
PATIENCE = 30.0  # seconds that a question waits for another thread which works off a step
RECORDED = 15.0  # seconds after which a running job tells its ledger and its cost anew
UNWRITTEN = 64  # steps with logged numbers alone, before they are written down
Fail = Callable[[str, Exception], None]


class Collector:
    """Keeps the samples of the step under way and works them off when the step is over."""

    def __init__(
        self,
        instances: Instances,
        store: Store,
        *,
        families: Collection[str],
        derived: Sequence[Any],
        weights: Sequence[Any],
        each_step: Sequence[Any] = (),
        steps: Sequence[Any] = (),
        judge: Any,
        sinks: Sequence[Any],
        on_alarm: Callable[[Alarm], None],
        fail: Fail,
        costs: Costs | None = None,
        told: tuple[Callable[[], Coverage], Callable[[], dict[str, Any]]] = (Coverage, dict),
    ) -> None:
        self.instances, self.store = instances, store
        self.families = {*families, "run"}
        self.derived, self.weights, self.sinks = list(derived), [*weights, *steps], list(sinks)
        self.each_step, self.steps = list(each_step), list(steps)  # the latter read around an optimizer step alone
        self.judge, self.on_alarm, self.fail = judge, on_alarm, fail
        self.alarms: list[Alarm] = []
        self.costs = Costs() if costs is None else costs
        self._arriving = threading.Lock()  # forward passes may run in several threads; held for a moment only
        self.working = threading.RLock()
        self._unwritten, self._told, self._recorded = 0, told, -math.inf
        self._samples: list[Sample] = []
        self._ended: deque[Ended] = deque()
        self._transfers = Transfers()
        self._trained: set[Instance] = set()
        self._scalars: list[tuple[int, str, Any]] = []
        self.gradients = Gradients()
        self._weighed = -1
        self._wanted = Wanted(self.families)
        self._unjudged: dict[tuple[int, str, str | None], Reading] = {}  # of the weights, since the last judged step
        self.merging: Merging | None = None  # where the job has several ranks
        self._loose: dict[tuple[int, str, str | None], Array] = {}  # since the last flush, by step, metric and site
        self._hushed: list[Any] = []  # sinks, while another rank speaks
        self._resumed: int | None = None  # the step from which on a run that goes on is recorded
        self.aside = False  # whether nothing more is taken

    @property
    def trained(self) -> set[Instance]:
        """Sites that a sampled training step has gone through, the step under way included."""
        with self._arriving:
            samples = list(self._samples)
        return self._trained.union(*(s.instances for s in samples if s.is_training()))

    def sample(self, sample: Sample) -> None:
        """A sampled forward pass ran; its gradients are still to come."""
        self._arrive(self._samples, sample)

    def scalar(self, step: int, name: str, value: Any) -> None:
        """A number of the user's own, kept as it is until the step is over: a device tensor is not waited for."""
        self._arrive(self._scalars, (step, name, value.detach() if isinstance(value, torch.Tensor) else value))

    def _arrive(self, waiting: list[Any], what: Any) -> None:
        if self.aside:
            return
        with self._arriving:
            full = len(waiting) >= MOST_SAMPLES
            if full:
                waiting.clear()
            waiting.append(what)
        if full:
            told = f"{MOST_SAMPLES} samples or logged numbers and no optimizer step; they were dropped"
            self.fail("counting steps", RuntimeError(told))

    def before_optimizer(self, optimizer: Any) -> None:
        """``optimizer`` is about to make a sampled step."""
        with self.costs.of(SAMPLING), self.costs.of(AROUND):
            for monitor in self.steps:
                self._guarded(f"monitor {type(monitor).__name__}", monitor.before, optimizer, self._sites())

    def optimizer(self, step: int, optimizer: Any) -> None:
        """``optimizer`` made a sampled step: its learning rates and the norms of its gradients, still on the device."""
        with self.costs.of(SAMPLING), self.costs.of(AROUND):
            for monitor in self.steps:
                self._guarded(f"monitor {type(monitor).__name__}", monitor.after, step, optimizer, self._sites())
            self.gradients.read(step, optimizer)

    def weigh(self, step: int) -> None:
        """``step`` is over and its weights stand: ask the monitors that spread their work over the steps.

        What they say is stored at its own step, and judged with the next sampled one.
        """
        if step <= self._weighed or not self.each_step or self.aside:
            return
        self._weighed = step
        with self.costs.of(SPECTRA):
            self._weigh(step)

    def _weigh(self, step: int) -> None:
        sites = [instance.site for instance in self.instances]
        found: list[Reading] = []
        for monitor in self.each_step:
            found += self._asked(monitor, step, sites)
        readings = [reading for reading in found if self._wanted(reading.metric)]
        if self.merging is not None:
            self._loose |= {(step, reading.metric, reading.site): reading.values for reading in readings}
        elif readings:
            self.note(step, readings)

    def state_dict(self) -> dict[str, Any]:
        """What was weighed and not judged yet, and the alarms so far; no sample, and nothing that waits for other ranks."""
        unjudged = [[metric, site, r.values.tolist()] for (_, metric, site), r in self._unjudged.items()]
        return {"weighed": self._weighed, "unjudged": unjudged, "alarms": [a.to_json() for a in self.alarms]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._weighed = state["weighed"]
        self.alarms = [Alarm.from_json(alarm) for alarm in state["alarms"]]
        found = [Reading(metric, site, np.array(values)) for metric, site, values in state["unjudged"]]
        self._unjudged = {(self._weighed, reading.metric, reading.site): reading for reading in found}

    def rewind(self, step: int, recorded: int) -> None:
        """Training goes on at ``step``: what is under way is dropped, and what was recorded of the step ``recorded`` and later, if
        any: before that one all was recorded when the state was saved."""
        self.drop()
        self._resumed = recorded if step > 0 else None
        if self._resumed is not None:
            self.alarms = [alarm for alarm in self.alarms if alarm.step < recorded]
            self._guarded("writing to the store", self.store.rewind, recorded)

    def drop(self) -> None:
        """Let go of what is under way."""
        with self._arriving:
            self._samples.clear()
            self._scalars.clear()
        self._ended.clear()
        self.gradients.clear()
        self._loose.clear()

    def catch_up(self, step: int, weigh: Callable[[int], None], *, wait: bool, upto: int | None = None) -> None:
        """``weigh`` the step before ``step`` and `finish` up to it, or to ``upto``. Another thread that is at it is waited for only
        if asked to, as training must not be held up."""
        if self.working.acquire(timeout=PATIENCE if wait else 0):
            try:
                weigh(step - 1)
                self.finish(step if upto is None else upto, wait)
            finally:
                self.working.release()

    def finish(self, upto: int, wait: bool = True) -> None:
        """Work off every step before ``upto``, unless all ranks do it together; without ``wait`` those of which all has arrived."""
        if self.merging is not None or not (self._samples or self._scalars or self._ended):
            return
        with self._arriving:
            sampled, others = {s.step for s in self._samples}, {step for step, _, _ in self._scalars}
        for step in sorted(sampled | others):
            if step < upto:
                part = SAMPLING if step in sampled else LOGGED
                with self.costs.of(part):
                    found, samples = self._logged(step), self._samples_of(step)
                    beside = self._beside(step) if samples else []
                    self._ended.append(Ended(step, part, samples, found, beside))
                self._work_off(wait)
        self._work_off(wait)

    def _work_off(self, wait: bool) -> None:
        while self._ended and (wait or len(self._ended) > MOST_UNDER_WAY or self._ended[0].has_arrived()):
            ended = self._ended.popleft()
            if not ended.has_arrived():
                self.costs.settle()
            with self.costs.of(ended.part):
                self._finish_step(ended)

    def record(self, now: bool = True) -> None:
        """Write down what was worked off, with the ledger and facts about the run: ``now``, or if that is some time ago."""
        kept = not isinstance(self.store, MemoryStore)  # nobody reads one in memory: of ranks the first alone tells
        if now or (kept and time.monotonic() - self._recorded > RECORDED):
            (ledger, facts), self._recorded = self._told, time.monotonic()
            self._guarded("writing to the store", lambda: self.store.meta(held_to=self.judge.held_to, **facts()))
            self._guarded("writing to the store", lambda: self.store.coverage(ledger()))
        self.flush(now)

    def close(self) -> None:
        """Let go of sinks and store."""
        for sink in [*self.sinks, *self._hushed]:
            self._guarded(f"sink {type(sink).__name__}", sink.close)
        self._guarded("writing to the store", self.store.close)

    def flush(self, now: bool = True) -> None:
        """Have the store write down what it holds, and tell what became of it."""
        self._unwritten = 0
        self._charged("writing to the store", self.store.flush, now)
        for what, error in self._guarded("writing to the store", self.store.troubles) or ():
            self.fail(what, error)

    def local(self, step: int) -> Local:
        """What this rank measured up to ``step`` and has not told yet."""
        samples = self._samples_of(step)
        sums: Merged = {}
        if samples:
            self.costs.settle()
            sums = self._charged("merging samples", merged, samples) or {}
            beside = self._beside(step)
            self._loose |= {(step, r.metric, r.site): r.values for later in beside for r in later()}
        loose = self.loose(step)
        self._loose = {key: values for key, values in self._loose.items() if key[0] > step}
        return Local(step, sums, loose)

    def loose(self, step: int) -> dict[Loose, Array]:
        """What waits to be told of steps up to ``step``, but for samples."""
        for at in sorted({at for at, _, _ in self._scalars if at <= step}):
            self._loose |= {(at, r.metric, r.site): r.values for r in self._logged(at)()}
        return {(m, site, step - at): x for (at, m, site), x in self._loose.items() if at <= step}

    def note(self, step: int, readings: Sequence[Reading]) -> None:
        """Store what was read at a step that is not judged; of the weights it is judged with the next that is."""
        kept = [reading for reading in rounded(readings) if self._wanted(reading.metric)]
        self._unjudged |= {(step, r.metric, r.site): r for r in kept if r.site is not None}
        self._write(step, kept)
        for sink in self.sinks:
            self._guarded(f"sink {type(sink).__name__}", sink.readings, step, kept)

    def hush(self) -> None:
        """Another rank writes and speaks for this one."""
        self.store, self.sinks, self._hushed = RecentStore(), [], self.sinks

    def part(self, store: Store) -> None:
        """This rank speaks for itself and writes to ``store``: it has told the others nothing yet, and will not."""
        self._guarded("writing to the store", self.store.close)
        self.merging, self.store, self.sinks, self._hushed = None, store, [*self.sinks, *self._hushed], []
        if self._resumed is not None:
            self._guarded("writing to the store", store.rewind, self._resumed)
        self.keep()

    def keep(self) -> None:
        """Note what waits to be told to other ranks."""
        loose, self._loose = self._loose, {}
        for step in sorted({at for at, _, _ in loose}):
            self.note(step, [Reading(metric, site, x) for (at, metric, site), x in loose.items() if at == step])

    def conclude(
        self,
        step: int,
        readings: Sequence[Reading],
        sites: Mapping[str, Site],
        placed: Callable[[Alarm], Alarm] = lambda alarm: alarm,
    ) -> None:
        """Derive, store and judge a step's readings. ``placed(alarm)`` says of which rank it is."""
        readings = rounded(with_gradient_norm(readings))
        for law in self.derived:
            readings += self._asked(law, step, readings, sites)
        readings = [reading for reading in readings if self._wanted(reading.metric)]
        self._write(step, readings)
        self._judge(step, readings, sites, placed)
        self.record(now=False)

    def _finish_step(self, ended: Ended) -> None:
        readings = rounded(ended.logged())
        if ended.samples:
            readings += self._charged("merging samples", self._measure, ended) or []
            self.conclude(ended.step, readings, {site.id: site for site in self._sites()})
            return
        self._write(ended.step, readings)
        self._unwritten += 1
        if self._unwritten >= UNWRITTEN:
            self.flush(now=False)

    def _logged(self, step: int) -> Later[list[Reading]]:
        with self._arriving:
            scalars = [(name, value) for at, name, value in self._scalars if at == step]
            self._scalars[:] = [entry for entry in self._scalars if entry[0] != step]
        return logged(scalars, self._transfers, lambda name, x: self._guarded(f"reading the logged `{name}`", float, x))

    def _samples_of(self, step: int) -> list[Sample]:
        """The training samples of ``step``; all of its samples are let go."""
        with self._arriving:
            found = [s for s in self._samples if s.step == step and s.is_training()]
            self._samples[:] = [s for s in self._samples if s.step != step]
        self._trained.update(*(s.instances for s in found))
        return found

    def _measure(self, ended: Ended) -> list[Reading]:
        readings = [r for instance, sums in merged(ended.samples).items() for r in self.finished(instance, sums)]
        return [*readings, *(r for later in ended.beside for r in later())]

    def _beside(self, step: int) -> list[Later[list[Reading]]]:
        """What is read once a step, of the optimizer and of the weights as they are now."""
        ranks = None if self.merging is None else self.merging.world
        asked = [self._asked_later(monitor, step) for monitor in self.weights]
        return [self._begun("merging samples", self.gradients.readings_later, step, ranks), *asked]

    def _asked_later(self, monitor: Any, step: int) -> Later[list[Reading]]:
        if not hasattr(monitor, "update_later"):
            readings = self._asked(monitor, step, self._sites())
            return Later((), lambda: readings)
        later = self._begun(f"monitor {type(monitor).__name__}", monitor.update_later, step, self._sites())
        return Later(later.packets, lambda: rounded(later()))

    def _begun(self, what: str, begin: Callable[..., Later[list[Reading]]], *args: Any) -> Later[list[Reading]]:
        later: Later[list[Reading]] = self._charged(what, begin, *args) or Later((), list)
        return Later(later.packets, lambda: self._charged(what, later) or [])

    def _write(self, step: int, readings: Sequence[Reading]) -> None:
        self._charged("writing to the store", self.store.write, step, readings)

    def finished(self, instance: Instance, quantities: Mapping[tuple[str, str], Array]) -> list[Reading]:
        """What each probe of the instance makes of its quantities; laws that do not hold there are left out."""
        found: dict[str, Array] = {}
        for probe in instance.probes:
            own = {name: values for (of, name), values in quantities.items() if of == probe.name}
            what = f"probe `{probe.name}` at {instance.site.id}"
            made = self._guarded(what, instance.finish, probe, own) if own else None
            for name, values in (made or {}).items():
                if name in found:
                    told = f"another probe records {name} there already; give the metric a name of its own"
                    self.fail(what, ConfigError(told))
                else:
                    found[name] = values
        return [
            Reading(name, instance.site.id, values)
            for name, values in found.items()
            if not instance.laws.get(name.removesuffix("_num").removesuffix("_den"))
        ]

    def _sites(self) -> list[Site]:
        return [instance.site for instance in self.instances]

    def _judge(
        self,
        step: int,
        readings: Sequence[Reading],
        sites: Mapping[str, Site],
        placed: Callable[[Alarm], Alarm],
    ) -> None:
        due = {key: reading for key, reading in self._unjudged.items() if key[0] <= step}
        self._unjudged = {key: reading for key, reading in self._unjudged.items() if key not in due}
        heard = [*readings, *{(metric, site): reading for (_, metric, site), reading in due.items()}.values()]
        raised = [placed(alarm) for alarm in self._charged("judging", self.judge.update, step, heard, sites) or []]
        for sink in self.sinks:
            self._charged(f"sink {type(sink).__name__}", sink.readings, step, readings)
        for alarm in raised:
            self.alarms.append(alarm)
            self._charged("writing to the store", self.store.alarm, alarm)
            for sink in self.sinks:
                self._charged(f"sink {type(sink).__name__}", sink.alarm, alarm)
        with self.costs.of(ACTIONS):
            for alarm in raised:
                self.on_alarm(alarm)

    def _charged(self, part: str, work: Callable[..., Any], *args: Any) -> Any:
        with self.costs.of(part):
            return self._guarded(part, work, *args)

    def _asked(self, monitor: Any, *args: Any) -> list[Reading]:
        """What a monitor says, as the store keeps it; nothing if it fails or says what is no reading."""
        what = f"monitor {type(monitor).__name__}"
        found: list[Reading] | None = self._charged(what, lambda: rounded(monitor.update(*args) or ()))
        return found or []

    def _guarded(self, what: str, work: Callable[..., Any], *args: Any) -> Any:
        try:
            return work(*args)
        except Exception as error:
            self.fail(what, error)
            return None
