"""From samples to alarms: merge a step's samples, measure, store, judge. Runs between steps, never inside one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from foreshock.config import FAMILIES
from foreshock.errors import ConfigError, ForeshockError
from foreshock.instances import Instance, Instances
from foreshock.monitors.metrics import family
from foreshock.records import Alarm, Array, Coverage, Probe, Reading, Site
from foreshock.runtime import Merged, Sample

# A step of 100 layers compiled by themselves and 200 microbatches; without optimizer steps samples would pile up.
MOST_SAMPLES = 20_000
PATIENCE = 30.0  # seconds that a question waits for another thread which works off a step
UNWRITTEN = 64  # steps with logged numbers alone, before they are written down
Fail = Callable[[str, Exception], None]


class Store(Protocol):
    """Where readings are kept: a run folder, or memory."""

    def write(self, step: int, readings: Sequence[Reading]) -> None: ...
    def alarm(self, alarm: Alarm) -> None: ...
    def coverage(self, coverage: Coverage) -> None: ...
    def meta(self, **values: Any) -> None: ...
    def flush(self, now: bool = True) -> None: ...
    def troubles(self) -> Sequence[tuple[str, Exception]]: ...
    def close(self) -> None: ...
    def series(self, metric: str, site: str | None = None) -> tuple[Array, Array]: ...
    def metrics(self) -> list[str]: ...


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
    ) -> None:
        self.instances, self.store = instances, store
        self.families = {*families, "run"}
        self.derived, self.weights, self.sinks = list(derived), [*weights, *steps], list(sinks)
        self.each_step = list(each_step)
        self.steps = list(steps)  # those that read what stands only around an optimizer step
        self.judge = judge
        self.on_alarm, self.fail = on_alarm, fail
        self.alarms: list[Alarm] = []
        self.seconds = 0.0
        self._arriving = threading.Lock()  # forward passes may run in several threads; held for a moment only
        self._working = threading.RLock()
        self._unwritten = 0
        self._samples: list[Sample] = []
        self._trained: set[Instance] = set()
        self._scalars: list[tuple[int, str, Any]] = []
        self._optimizer: dict[int, dict[str, list[Any]]] = {}
        self._weighed = -1
        self._verdicts: dict[str, bool] = {}  # by metric, whether its family is recorded
        self._unjudged: dict[tuple[str, str | None], Reading] = {}  # of the weights, since the last judged step

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
        for monitor in self.steps:
            self._guarded(f"monitor {type(monitor).__name__}", monitor.before, optimizer, self._sites())

    def optimizer(self, step: int, optimizer: Any) -> None:
        """``optimizer`` made a sampled step: its learning rates and the norms of its gradients, still on the device."""
        for monitor in self.steps:
            self._guarded(f"monitor {type(monitor).__name__}", monitor.after, step, optimizer, self._sites())
        self._optimizer = {at: found for at, found in self._optimizer.items() if at >= step}  # others met no sample
        found = self._optimizer.setdefault(step, {"lr": [], "norms": []})
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        dense = [g for g in gradients if g.layout is torch.strided and type(g) in (torch.Tensor, torch.nn.Parameter)]
        found["lr"] += [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if dense:
            found["norms"].append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dense))))

    def weigh(self, step: int) -> None:
        """``step`` is over and its weights stand: ask the monitors that spread their work over the steps.

        What they say is stored at its own step, and judged with the next sampled one.
        """
        if step <= self._weighed or not self.each_step:
            return
        start = time.perf_counter()
        self._weighed = step
        sites = [instance.site for instance in self.instances]
        found: list[Reading] = []
        for monitor in self.each_step:
            found += self._asked(monitor, step, sites)
        if readings := [reading for reading in found if self._wanted(reading.metric)]:
            self._unjudged |= {(reading.metric, reading.site): reading for reading in readings}
            self._guarded("writing to the store", self.store.write, step, readings)
            for sink in self.sinks:
                self._guarded(f"sink {type(sink).__name__}", sink.readings, step, readings)
        self.seconds += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """What was weighed and not judged yet."""
        unjudged = [[*key, reading.values.tolist()] for key, reading in self._unjudged.items()]
        return {"weighed": self._weighed, "unjudged": unjudged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._weighed = state["weighed"]
        found = [Reading(metric, site, np.array(values)) for metric, site, values in state["unjudged"]]
        self._unjudged = {(reading.metric, reading.site): reading for reading in found}

    def catch_up(self, step: int, *, wait: bool, upto: int | None = None) -> None:
        """`weigh` the step before ``step`` and `finish` up to it, or to ``upto``. Another thread that is at it is waited for only
        if asked to, as training must not be held up."""
        if self._working.acquire(timeout=PATIENCE if wait else 0):
            try:
                self.weigh(step - 1)
                self.finish(step if upto is None else upto)
            finally:
                self._working.release()

    def finish(self, upto: int) -> None:
        """Work off every step before ``upto``."""
        if not self._samples and not self._scalars:
            return
        start = time.perf_counter()
        try:
            with self._arriving:
                steps = sorted({s.step for s in self._samples} | {step for step, _, _ in self._scalars})
            for step in [step for step in steps if step < upto]:
                self._finish_step(step)
        finally:
            self.seconds += time.perf_counter() - start

    def flush(self, now: bool = True) -> None:
        """Have the store write down what it holds, and tell what became of it."""
        self._unwritten = 0
        self._guarded("writing to the store", self.store.flush, now)
        for what, error in self._guarded("writing to the store", self.store.troubles) or ():
            self.fail(what, error)

    def _finish_step(self, step: int) -> None:
        with self._arriving:
            samples = [s for s in self._samples if s.step == step]
            self._samples[:] = [s for s in self._samples if s.step != step]
            scalars = [(name, value) for at, name, value in self._scalars if at == step]
            self._scalars[:] = [entry for entry in self._scalars if entry[0] != step]
        readings = []
        for name, value in scalars:
            number = self._guarded(f"reading the logged `{name}`", float, value)
            readings += [] if number is None else rounded([Reading(f"run/{name}", None, np.array([number]))])
        training = [s for s in samples if s.is_training()]
        self._trained.update(*(s.instances for s in training))
        if training:
            readings += self._guarded("merging samples", self._measure, step, training) or []
        self._guarded("writing to the store", self.store.write, step, readings)
        if training:
            self._judge(step, readings)
        self._unwritten += 1
        if training or self._unwritten >= UNWRITTEN:
            self.flush(now=False)

    def _measure(self, step: int, samples: Sequence[Sample]) -> list[Reading]:
        readings = []
        merged: Merged = {}
        for sample in samples:
            sample.merge_into(merged)
        for instance, quantities in merged.items():
            readings += self._finished(instance, quantities)
        readings += self._optimizer_readings(step)
        sites = self._sites()
        for monitor in self.weights:
            readings += self._asked(monitor, step, sites)
        readings = rounded(readings)
        by_id = {site.id: site for site in sites}
        for law in self.derived:
            readings += self._asked(law, step, readings, by_id)
        return [reading for reading in readings if self._wanted(reading.metric)]

    def _finished(self, instance: Instance, quantities: Mapping[tuple[str, str], Array]) -> list[Reading]:
        """What each probe of the instance makes of its quantities; laws that do not hold there are left out."""
        found: dict[str, Array] = {}
        for probe in instance.probes:
            own = {name: values for (of, name), values in quantities.items() if of == probe.name}
            what = f"probe `{probe.name}` at {instance.site.id}"
            made = self._guarded(what, _finish, probe, instance, own) if own else None
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

    def _wanted(self, metric: str) -> bool:
        known = self._verdicts.get(metric)
        if known is not None:
            return known
        try:
            of = family(metric)
        except ForeshockError:
            return True  # a user's own metric belongs to no family
        self._verdicts[metric] = of in self.families or of not in FAMILIES  # the latter of a user's own kind of site
        return self._verdicts[metric]

    def _optimizer_readings(self, step: int) -> list[Reading]:
        found = self._optimizer.pop(step, None)
        for stale in [at for at in self._optimizer if at < step]:
            del self._optimizer[stale]
        if found is None:
            return []
        readings = [Reading("optim/lr", None, np.array([max(found["lr"])]))] if found["lr"] else []
        if found["norms"]:
            total = float(torch.linalg.vector_norm(torch.stack([norm.float() for norm in found["norms"]])))
            readings.append(Reading("optim/grad_norm", None, np.array([total])))
        return readings

    def _judge(self, step: int, readings: Sequence[Reading]) -> None:
        sites = {instance.site.id: instance.site for instance in self.instances}
        heard, self._unjudged = [*readings, *self._unjudged.values()], {}
        raised: list[Alarm] = self._guarded("judging", self.judge.update, step, heard, sites) or []
        for sink in self.sinks:
            self._guarded(f"sink {type(sink).__name__}", sink.readings, step, readings)
        for alarm in raised:
            self.alarms.append(alarm)
            self._guarded("writing to the store", self.store.alarm, alarm)
            for sink in self.sinks:
                self._guarded(f"sink {type(sink).__name__}", sink.alarm, alarm)
        for alarm in raised:
            self.on_alarm(alarm)

    def _asked(self, monitor: Any, *args: Any) -> list[Reading]:
        """What a monitor says, as the store keeps it; nothing if it fails or says what is no reading."""
        found: list[Reading] | None = self._guarded(
            f"monitor {type(monitor).__name__}", lambda: rounded(monitor.update(*args) or ())
        )
        return found or []

    def _guarded(self, what: str, work: Callable[..., Any], *args: Any) -> Any:
        try:
            return work(*args)
        except Exception as error:
            self.fail(what, error)
            return None


def _finish(probe: Probe, instance: Instance, own: Mapping[str, Array]) -> dict[str, Array]:
    made = probe.finish(instance.facts, own)
    return {name: np.asarray(values, np.float64).reshape(-1) for name, values in made.items()}


def rounded(readings: Sequence[Reading]) -> list[Reading]:
    """The readings as the store keeps them, to float32: whoever judges the stored run later sees what the judge saw."""
    with np.errstate(over="ignore"):
        return [Reading(r.metric, r.site, r.values.astype(np.float32).astype(np.float64)) for r in readings]
