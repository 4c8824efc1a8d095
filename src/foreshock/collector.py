"""From samples to alarms: merge a step's samples, measure, store, judge. Runs between steps, never inside one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from foreshock.config import FAMILIES
from foreshock.cost import ACTIONS, AROUND, LOGGED, SAMPLING, SPECTRA, Costs
from foreshock.errors import ConfigError, ForeshockError
from foreshock.instances import Instance, Instances
from foreshock.merging import Merging
from foreshock.monitors.metrics import family
from foreshock.records import Alarm, Array, Coverage, Reading, Site
from foreshock.runtime import Merged, Sample
from foreshock.shards import Local, Loose, squares

# A step of 100 layers compiled by themselves and 200 microbatches; without optimizer steps samples would pile up.
MOST_SAMPLES = 20_000
GRADIENT_NORM = "optim/grad_norm"
SHARDS = "optim/grad_square_of_shards"  # on its way to that norm
Fail = Callable[[str, Exception], None]


class Store(Protocol):
    """Where readings are kept: a run folder, or memory."""

    def write(self, step: int, readings: Sequence[Reading]) -> None: ...
    def rewind(self, step: int) -> None: ...
    def alarm(self, alarm: Alarm) -> None: ...
    def coverage(self, coverage: Coverage) -> None: ...
    def meta(self, **values: Any) -> None: ...
    def flush(self) -> None: ...
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
        costs: Costs | None = None,
    ) -> None:
        self.instances, self.store = instances, store
        self.families = {*families, "run"}
        self.derived, self.weights, self.sinks = list(derived), [*weights, *steps], list(sinks)
        self.each_step = list(each_step)
        self.steps = list(steps)  # those that read what stands only around an optimizer step
        self.judge = judge
        self.on_alarm, self.fail = on_alarm, fail
        self.alarms: list[Alarm] = []
        self.costs = Costs() if costs is None else costs
        self._samples: list[Sample] = []
        self._trained: set[Instance] = set()
        self._scalars: list[tuple[int, str, Any]] = []
        self._optimizer: dict[int, dict[str, list[Any]]] = {}
        self._weighed = -1
        self._verdicts: dict[str, bool] = {}  # by metric, whether its family is recorded
        self._unjudged: dict[tuple[str, str | None], Reading] = {}  # of the weights, since the last judged step
        self.merging: Merging | None = None  # where the job has several ranks
        self._loose: dict[tuple[int, str, str | None], Array] = {}  # since the last flush, by step, metric and site
        self._ranks: Mapping[tuple[str, str | None], Array] = {}  # where a law was broken worst

    @property
    def trained(self) -> set[Instance]:
        """Sites that a sampled training step has gone through, the step under way included."""
        return self._trained.union(*(s.instances for s in self._samples if s.is_training()))

    def sample(self, sample: Sample) -> None:
        """A sampled forward pass ran; its gradients are still to come."""
        if len(self._samples) >= MOST_SAMPLES:
            self._samples.clear()
            self.fail(
                "counting steps", RuntimeError(f"{MOST_SAMPLES} samples and no optimizer step; they were dropped")
            )
        self._samples.append(sample)

    def scalar(self, step: int, name: str, value: Any) -> None:
        """A number of the user's own, kept as it is until the step is over: a device tensor is not waited for."""
        self._scalars.append((step, name, value.detach() if isinstance(value, torch.Tensor) else value))

    def before_optimizer(self, optimizer: Any) -> None:
        """``optimizer`` is about to make a sampled step."""
        with self.costs.of(SAMPLING), self.costs.of(AROUND):
            for monitor in self.steps:
                self._guarded(f"monitor {type(monitor).__name__}", monitor.before, optimizer, self._sites())

    def optimizer(self, step: int, optimizer: Any) -> None:
        """``optimizer`` made a sampled step: its learning rates and the norms of its gradients, still on the device."""
        with self.costs.of(SAMPLING), self.costs.of(AROUND):
            self._read_optimizer(step, optimizer)

    def _read_optimizer(self, step: int, optimizer: Any) -> None:
        for monitor in self.steps:
            self._guarded(f"monitor {type(monitor).__name__}", monitor.after, step, optimizer, self._sites())
        found = self._optimizer.setdefault(step, {"lr": [], "norms": [], "squares": []})
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        dense = [g for g in gradients if g.layout is torch.strided and type(g) in (torch.Tensor, torch.nn.Parameter)]
        found["lr"] += [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if dense:
            found["norms"].append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dense))))
        found["squares"] += squares(gradients)

    def weigh(self, step: int) -> None:
        """``step`` is over and its weights stand: ask the monitors that spread their work over the steps.

        What they say is stored at its own step, and judged with the next sampled one.
        """
        if step <= self._weighed or not self.each_step:
            return
        self._weighed = step
        with self.costs.of(SPECTRA):
            self._weigh(step)

    def _weigh(self, step: int) -> None:
        sites = [instance.site for instance in self.instances]
        found: list[Reading] = []
        for monitor in self.each_step:
            found += rounded(self._guarded(f"monitor {type(monitor).__name__}", monitor.update, step, sites) or [])
        readings = [reading for reading in found if self._wanted(reading.metric)]
        if self.merging is not None:
            self._loose |= {(step, reading.metric, reading.site): reading.values for reading in readings}
        elif readings:
            self._unjudged |= {(reading.metric, reading.site): reading for reading in readings}
            self._guarded("writing to the store", self.store.write, step, readings)
            for sink in self.sinks:
                self._guarded(f"sink {type(sink).__name__}", sink.readings, step, readings)

    def state_dict(self) -> dict[str, Any]:
        """What was weighed and not judged yet, and the alarms so far; no sample of the step under way."""
        unjudged = [[*key, reading.values.tolist()] for key, reading in self._unjudged.items()]
        return {"weighed": self._weighed, "unjudged": unjudged, "alarms": [a.to_json() for a in self.alarms]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._weighed = state["weighed"]
        self.alarms = [Alarm.from_json(alarm) for alarm in state["alarms"]]
        found = [Reading(metric, site, np.array(values)) for metric, site, values in state["unjudged"]]
        self._unjudged = {(reading.metric, reading.site): reading for reading in found}

    def rewind(self, step: int) -> None:
        """Training goes on at ``step``: what is under way is dropped, and what was recorded of that step and later, if any."""
        self._samples, self._scalars = [], []
        self._optimizer.clear()
        if step > 0:
            self.alarms = [alarm for alarm in self.alarms if alarm.step < step]
            self._guarded("writing to the store", self.store.rewind, step)

    def flush(self) -> None:
        """Write down what was worked off."""
        self._guarded("writing to the store", self.store.flush)

    def finish(self, upto: int) -> None:
        """Work off every step before ``upto``, unless all ranks do it together."""
        if self.merging is not None or not (self._samples or self._scalars):
            return
        sampled = {s.step for s in self._samples}
        for step in sorted(sampled | {step for step, _, _ in self._scalars}):
            if step < upto:
                with self.costs.of(SAMPLING if step in sampled else LOGGED):
                    self._finish_step(step)

    def exchange(self, sampled: Sequence[int], last: int | None = None) -> None:
        """Every rank, at one place of its training: hear what was merged since, and begin to merge ``sampled`` steps.

        ``last``: no step comes after this one; what was read beside the sampled ones is merged too, and all is heard. Raises what
        the group raises when a rank is gone.
        """
        assert self.merging is not None
        with self.costs.of(SAMPLING):
            self.receive()
            for step in sampled:
                self.receive()
                self.merging.launch(self._local(step))
            if last is not None:
                self.receive()
                if last not in sampled:
                    self.merging.launch(self._local(last))
                    self.receive(judge=False)

    def receive(self, judge: bool = True) -> None:
        """Wait for the flush under way, if there is one, and judge what all ranks measured."""
        if self.merging is None or not self.merging.in_flight:
            return
        with self.costs.of("merging ranks"):
            whole = self.merging.receive()
        self._ranks = whole.ranks
        for step, readings in whole.readings:
            kept = [reading for reading in rounded(readings) if self._wanted(reading.metric)]
            if step < whole.step or not judge:
                self._unjudged |= {(r.metric, r.site): r for r in kept if r.site is not None}
                self._write(step, kept)
            else:
                self._conclude(step, rounded(self._with_gradient_norm(readings)), whole.sites)

    def _local(self, step: int) -> Local:
        """What this rank measured up to ``step`` and has not told yet."""
        samples = self._samples_of(step)
        logged = [entry for entry in self._scalars if entry[0] <= step]
        self._scalars = [entry for entry in self._scalars if entry[0] > step]
        for at, name, value in logged:
            number = self._guarded(f"reading the logged `{name}`", float, value)
            if number is not None:
                self._loose[at, f"run/{name}", None] = np.array([number])
        sums: Merged = {}
        if samples:
            self.costs.settle()
            sums = self._charged("merging samples", _merged, samples) or {}
            beside = self._charged("merging samples", self._beside, step) or []
            self._loose |= {(step, r.metric, r.site): r.values for r in rounded(beside)}
        loose: dict[Loose, Array] = {(m, site, step - at): x for (at, m, site), x in self._loose.items() if at <= step}
        self._loose = {key: values for key, values in self._loose.items() if key[0] > step}
        return Local(step, sums, loose)

    def _finish_step(self, step: int) -> None:
        scalars = [(name, value) for at, name, value in self._scalars if at == step]
        self._scalars = [entry for entry in self._scalars if entry[0] != step]
        readings = []
        for name, value in scalars:
            number = self._guarded(f"reading the logged `{name}`", float, value)
            readings += [] if number is None else rounded([Reading(f"run/{name}", None, np.array([number]))])
        training = self._samples_of(step)
        if training:
            self.costs.settle()
            readings += rounded(self._charged("merging samples", self._measure, step, training) or [])
            self._conclude(step, readings, {site.id: site for site in self._sites()})
        else:
            self._write(step, readings)

    def _samples_of(self, step: int) -> list[Sample]:
        """The training samples of ``step``; all of its samples are let go."""
        found = [s for s in self._samples if s.step == step and s.is_training()]
        self._samples = [s for s in self._samples if s.step != step]
        self._trained.update(*(s.instances for s in found))
        return found

    def _measure(self, step: int, samples: Sequence[Sample]) -> list[Reading]:
        readings = [r for instance, sums in _merged(samples).items() for r in self.finished(instance, sums)]
        return self._with_gradient_norm([*readings, *self._beside(step)])

    def _beside(self, step: int) -> list[Reading]:
        """What is read once a step, of the optimizer and of the weights."""
        readings = self._optimizer_readings(step)
        for monitor in self.weights:
            name = type(monitor).__name__
            readings += self._charged(f"monitor {name}", monitor.update, step, self._sites()) or []
        return readings

    def _conclude(self, step: int, readings: list[Reading], sites: Mapping[str, Site]) -> None:
        """Derive, store and judge a step's readings."""
        for law in self.derived:
            name = type(law).__name__
            readings += rounded(self._charged(f"monitor {name}", law.update, step, readings, sites) or [])
        readings = [reading for reading in readings if self._wanted(reading.metric)]
        self._write(step, readings)
        self._judge(step, readings, sites)
        self._charged("writing to the store", self.store.flush)

    def _write(self, step: int, readings: Sequence[Reading]) -> None:
        self._charged("writing to the store", self.store.write, step, readings)

    def finished(self, instance: Instance, quantities: Mapping[tuple[str, str], Array]) -> list[Reading]:
        """What each probe of the instance makes of its quantities; laws that do not hold there are left out."""
        found: dict[str, Array] = {}
        for probe in instance.probes:
            own = {name: values for (of, name), values in quantities.items() if of == probe.name}
            what = f"probe `{probe.name}` at {instance.site.id}"
            made = self._guarded(what, probe.finish, instance.facts, own) if own else None
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
            readings.append(Reading(GRADIENT_NORM, None, np.array([total])))
        if found["squares"] or self.merging is not None:
            ranks = 1 if self.merging is None else self.merging.world  # what is told of all ranks is their mean
            readings.append(Reading(SHARDS, None, np.array([ranks * sum(map(float, found["squares"]))])))
        return readings

    @staticmethod
    def _with_gradient_norm(readings: Sequence[Reading]) -> list[Reading]:
        """The norm of gradients that each rank has whole, and of those that it has a part of, as one."""
        square = sum(float(r.values[0]) for r in readings if r.metric == SHARDS)
        norm = sum(float(r.values[0]) for r in readings if r.metric == GRADIENT_NORM)
        rest = [r for r in readings if r.metric not in (SHARDS, GRADIENT_NORM)]
        if len(rest) == len(readings):
            return rest
        return [*rest, Reading(GRADIENT_NORM, None, np.array([np.hypot(norm, square**0.5)]))]

    def _judge(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> None:
        heard, self._unjudged = [*readings, *self._unjudged.values()], {}
        raised: list[Alarm] = self._charged("judging", self.judge.update, step, heard, sites) or []
        raised = [self._placed(alarm) for alarm in raised]
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

    def _placed(self, alarm: Alarm) -> Alarm:
        """The alarm with the rank on which its number was the worst, where that is known."""
        ranks = self._ranks.get((alarm.metric, alarm.site))
        if self.merging is None or ranks is None:
            return alarm
        part = next((x for x in (alarm.head, alarm.expert) if x is not None), 0)
        rank = int(ranks[min(part, len(ranks) - 1)])
        if rank < 0:
            return alarm
        where = f"worst on {self.merging.named(rank)}"
        return replace(
            alarm, ranks=(rank,), evidence=(*alarm.evidence, where), message=f"{alarm.message} {where.capitalize()}."
        )

    def _guarded(self, what: str, work: Callable[..., Any], *args: Any) -> Any:
        try:
            return work(*args)
        except Exception as error:
            self.fail(what, error)
            return None


def _merged(samples: Sequence[Sample]) -> Merged:
    found: Merged = {}
    for sample in samples:
        sample.merge_into(found)
    return found


def rounded(readings: Sequence[Reading]) -> list[Reading]:
    """The readings as the store keeps them, to float32: whoever judges the stored run later sees what the judge saw."""
    with np.errstate(over="ignore"):
        return [Reading(r.metric, r.site, r.values.astype(np.float32).astype(np.float64)) for r in readings]
