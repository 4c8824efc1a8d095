"""A watch: one run being observed, from the backend that captures its graphs to the alarms it raises."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from foreshock import _torch, resume
from foreshock.acting import Acting, OnAlarm, actions, names
from foreshock.agreement import is_shared
from foreshock.around import AroundSteps
from foreshock.backend import Backend
from foreshock.clock import StepClock
from foreshock.collector import Collector
from foreshock.config import Settings, families, load_settings
from foreshock.cost import SAMPLING, SPECTRA, Costs
from foreshock.fallbacks import Fallbacks
from foreshock.instances import Instance, Instances
from foreshock.kept import Store
from foreshock.masters import Masters
from foreshock.monitors import BiasLaw, Judge, RouterWeights, SharedRouterWeights, Spectra, receivers
from foreshock.monitors.step_monitor import FAMILIES as AROUND_STEPS
from foreshock.monitors.step_monitor import StepMonitor
from foreshock.monitors.tiers import probes as built_in
from foreshock.pace import Pace
from foreshock.patterns import GraphView, Match, Pattern
from foreshock.ranks import Ranks
from foreshock.reader import open_run
from foreshock.records import Alarm, Array, Coverage, Probe, Site, SiteStatus
from foreshock.reports import Reports
from foreshock.rows import Rows
from foreshock.runtime import Sample
from foreshock.sharding import Sharding
from foreshock.store import store_of_this_rank

_EVERYTHING = 2**62
NEVER_TRAINED = "evaluated, never sampled in training: no gradient came back through it yet"


class Watch:
    """Watches every model compiled with ``watch.backend``.

    Args:
        run: folder to write to; None keeps everything in memory and writes nothing.
        every: sample one optimizer step in ``every`` (1: every forward pass). Unsampled steps run the plain graph.
        budget: share of a step's time that watching may take (0.005): sampling gets rarer until it fits (docs/cost.md).
        inner: the compiler behind foreshock: a Dynamo backend's name, or the callable itself.
        patterns: more `Pattern`s, for this watch alone.
        monitors: metric families to record (docs/families.md), by name or "default" and "all", and objects with
            ``update(step, sites) -> list[Reading]``; None is the first tier, "default".
        detectors: more objects with ``update(step, readings, sites) -> list[Finding]``, beside the built-in ones.
        baseline: run folders of healthy references.
        align: compare with them at the same "step", or at the same count of ``watch.log(tokens=...)``: "tokens".
        steps_per_false_alarm: healthy steps in which all tests together may raise one alarm (100,000); fewer find faults sooner.
        on_alarm: "warn", "raise" (`AlarmRaised`), "stop" (sets ``stop_requested``), a callable taking the `Alarm`, or a row of
            these; in a distributed job "raise" and "stop" happen on all ranks at one step (docs/acting.md).
        debounce: steps in which further alarms of a mechanism, at other sites, do not act again.
        sinks: more receivers of readings and alarms, beside those of the settings; objects, or names (docs/sinks.md).
        strict: raise whatever fails inside foreshock, which otherwise is reported once while training goes on.
        merge: in a job of several ranks, what they measure is merged into one run, which rank 0 writes (True; docs/ranks.md); it
            takes a watch on every rank. False: each rank watches for itself, into ``RUN/rank3``.
        merge_timeout: seconds for which a rank waits for the others before it steps aside and trains on unwatched (60).
        group: the process group of these ranks; None makes one on gloo.
        probes: `Probe`s for further kinds of site, or beside the built-in ones at attentions and routers; a probe replaces the one
            of its kind that has the same name ("attention", "router").

    Settings not given here come from ``foreshock.toml``, ``[tool.foreshock]`` and ``FORESHOCK_*``; see `foreshock.config`.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        *,
        every: int | None = None,
        budget: float | None = None,
        inner: str | Callable[..., Any] | None = None,
        patterns: Sequence[Pattern] | None = None,
        monitors: str | Sequence[Any] | None = None,
        detectors: Sequence[Any] | None = None,
        baseline: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        align: str | None = None,
        steps_per_false_alarm: int | None = None,
        on_alarm: OnAlarm | None = None,
        debounce: int | None = None,
        sinks: Sequence[Any] = (),
        strict: bool | None = None,
        merge: bool | None = None,
        merge_timeout: float | None = None,
        group: Any = None,
        rows: int | None = None,
        windows: Sequence[int] | None = None,
        probes: Sequence[Probe] = (),
        settings: Settings | None = None,
    ) -> None:
        monitors = [monitors] if isinstance(monitors, str) else list(monitors or ())
        named = tuple(m for m in monitors if isinstance(m, str))
        listed = baseline if isinstance(baseline, list | tuple) else [baseline]
        references = [os.fspath(x) if isinstance(x, os.PathLike) else x for x in listed]
        row = actions(on_alarm)
        given = {
            "run": None if run is None else os.fspath(run),
            "every": every,
            "budget": budget,
            "inner": inner if isinstance(inner, str) else None,
            "monitors": named or None,
            "baseline": None if baseline is None else references,
            "on_alarm": names(row),
            "debounce": debounce,
            "align": align,
            "steps_per_false_alarm": steps_per_false_alarm,
            "strict": strict,
            "merge": merge,
            "merge_timeout": merge_timeout,
            "rows": rows,
            "windows": None if windows is None else tuple(windows),
        }
        base = load_settings() if settings is None else settings
        self.settings = base.replace(**{key: value for key, value in given.items() if value is not None})
        self.inner: str | Callable[..., Any] = inner if callable(inner) else self.settings.inner
        self.patterns = tuple(patterns or ())
        self.backend = Backend(self)
        self.instances = Instances()
        self.clock = StepClock()
        self.stop_requested = False
        self.on_match: Callable[[GraphView, Match], None] | None = None  # called with every match of a capture
        self.families = families(self.settings.monitors)
        self._probes = {(probe.kind, probe.name): probe for probe in (*built_in(self.families), *probes)}
        self._reports = Reports(self.settings.strict)
        self.fail = self._reports.fail
        self.acting = Acting(row, self.settings, self._stop, self.fail)
        self._unmatched: dict[str, None] = {}
        self._fallbacks = Fallbacks()
        self._finished = 0
        self._closed = False
        self._process = os.getpid()
        self.costs = Costs(waits=self.settings.budget is not None)
        where = self.settings.run
        store: Store = store_of_this_rank(where, self.settings.merge)
        healthy = [open_run(path) for path in self.settings.baseline]
        own = [m for m in monitors if not isinstance(m, str)]
        self.masters = Masters()
        least = {SAMPLING: self.settings.every}
        if "spectra" in self.families:
            least[SPECTRA] = max(min(self.settings.windows), self.settings.every)
        tell, alone = partial(self._reports.note, about="budget"), lambda: not is_shared()
        self.pace = Pace(least, self.settings.budget, self.costs, tell, alone)
        steps = [StepMonitor(self.families)] if self.families & AROUND_STEPS else []
        self.rows = Rows()
        self.sharding = Sharding(self.instances, self.fail)
        read, share = self.costs.settled(self.sharding.reading(self.masters.read)), self.sharding.share
        bias, router = BiasLaw(), RouterWeights(read, share)
        self._spectra = Spectra(self.settings.windows, least.get(SPECTRA), read, share)
        each_step = {"spectra": self._spectra, "router": SharedRouterWeights(self.settings.every, read, share)}
        self.sharding.readers = [monitor for family, monitor in each_step.items() if family in self.families]
        self.collector = Collector(
            self.instances,
            store,
            families=self.families,
            derived=[bias],
            weights=[*([router] if "router" in self.families else []), *own],
            each_step=self.sharding.readers,
            steps=steps,
            judge=Judge(
                healthy,
                detectors=detectors or (),
                on_error=self.fail,
                steps_per_false_alarm=self.settings.steps_per_false_alarm,
                align=self.settings.align,
            ),
            sinks=receivers(self.settings.sinks, sinks),
            on_alarm=lambda alarm: self.acting.hear(alarm, self.clock.step),
            fail=self.fail,
            costs=self.costs,
            told=(lambda: self.coverage, lambda: {"steps": self.step, "cost": self.cost()}),
        )
        self.ranks = Ranks(
            self.collector,
            self.clock,
            self.probes_for,
            self.is_sampled,
            self._weigh,
            self.fail,
            self.settings,
            group,
        )
        built = {"bias law": bias, "spectra": self._spectra, "judge": self.collector.judge, "actions": self.acting}
        built |= {"collector": self.collector, "pace": self.pace, "apart": self.ranks.untold.apart}
        built |= {"sharded weights": self.sharding, "shared router weights": each_step["router"]}
        self._parts = built | resume.stateful([*steps, *own])
        self._around = AroundSteps(self)
        atexit.register(self._at_exit)

    # -- what the user asks ------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps completed."""
        return self.clock.step

    @property
    def sites(self) -> list[Site]:
        """Every site that ran, one for each distinct weight set."""
        merging = self.collector.merging
        return [i.site if merging is None else merging.called(i.site) for i in self.instances]

    @property
    def alarms(self) -> list[Alarm]:
        """Every alarm so far."""
        self._catch_up()
        return list(self.collector.alarms)

    @property
    def coverage(self) -> Coverage:
        """What is watched and what is not, with the reason."""
        if not self._closed:
            self.note_fallbacks()
        return Coverage(
            self._statuses(),
            tuple(self._unmatched),
            tuple(self._fallbacks.graph_breaks),
            self._fallbacks.eager,
            self._reports.lines,
        )

    def metrics(self) -> list[str]:
        """Names of all metrics recorded so far."""
        self._catch_up()
        return self.collector.store.metrics()

    def series(self, metric: str, site: str | None = None) -> tuple[Array, Array]:
        """``(steps [n], values [n] or [n, heads])`` of one metric; ``site`` is a `Site.id` and may be left out if unique."""
        self._catch_up()
        return self.collector.store.series(metric, site)

    def bind(self, model: torch.nn.Module) -> Watch:
        """Use ``model``'s own parameter names, also for layers that share one compiled graph. Returns the watch."""
        self.instances.learn_names(((p, name) for name, p in model.named_parameters()), bound=True)
        self.sharding.bind(model)
        return self

    def log(self, **scalars: Any) -> None:
        """Record numbers of the step under way (``loss=loss``); a tensor is not waited for."""
        for name, value in scalars.items():
            self.collector.scalar(self.clock.forward_step, name, value)

    def flush(self) -> None:
        """Work off everything that is complete and write it down."""
        self._catch_up()
        self.collector.record()

    def cost(self) -> dict[str, str]:
        """What watching took so far, part by part, and what that is of a step now; all in words."""
        sampled = sum(instance.sampled for instance in self.instances)
        evaluations = max(1, sum(instance.evaluations for instance in self.instances))
        return {
            **self.costs.told(),
            **self.pace.told(),
            "sampled evaluations": f"{sampled / evaluations:.1%}",
            "wall clock": f"{self.costs.wall:.1f} s",
        }

    def close(self) -> None:
        """Flush and stop watching; compiled models go on with their plain graphs. May be called twice."""
        self._end(settle=True)

    def _end(self, settle: bool) -> None:
        """``settle``: the other ranks come to their end as well, and what is left is merged with theirs."""
        if self.closed or self.acting.closing:
            return
        self.acting.closing = True
        try:
            self._weigh(self.clock.step - 1, last=True)
            if self.ranks.are_one():
                if settle:
                    self.ranks.exchange(settle=True)
            else:
                self.collector.catch_up(self.clock.step, self._weigh, wait=True, upto=_EVERYTHING)
            self.flush()
            self.acting.settle()
        finally:
            self._closed = True
            self._around.remove()
            atexit.unregister(self._at_exit)
            self.collector.close()

    def _at_exit(self) -> None:
        self.ranks.hurry()
        self.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._end(settle=kind is None)  # after an error the other ranks wait elsewhere, and not for this one

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on as if never stopped: for `torch.save`, and for
        `torch.distributed.checkpoint`, which takes the watch itself. Plain values and tensors on the host; docs/resume.md.

        Call it where the model is saved: after the optimizer step, and after the step's `log`. All that was recorded so far is
        written to the run first. In the middle of a step (some microbatches in, the optimizer still to come) its samples and
        logged numbers are not in the state, as its gradients are in no checkpoint: the resumed run makes the step from the start.
        """
        self._catch_up()
        if not self.ranks.is_meeting:  # who writes is not known before
            self.collector.flush()
        untold = self.ranks.state_dict()  # monitors of the weights are asked for it, and saved below
        return resume.save(self.clock, self._parts, self.fail, self.ranks.wanted, untold)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, before the model is compiled or after; best before the first step.

        What the run has recorded of later steps is discarded, for they come again. Raises nothing, but under ``strict`` for a
        state that is none; what does not fit begins anew, with a line in the ledger.
        """
        if not resume.restore_clock(state, self.clock, self.fail):
            return
        self._finished = self.clock.step
        self.ranks.load_state_dict(state, self._reports.note)
        self.collector.rewind(self.clock.step, self.ranks.untold.since)
        resume.restore(state, self._parts, self._reports.note, self.fail, self.ranks.wanted)
        self._spectra.stride = self.pace.periods.get(SPECTRA, self._spectra.stride)
        self.ranks.take_up()

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this process was forked from the one that watches."""
        return self._closed or os.getpid() != self._process

    # -- what the other rooms call -----------------------------------------------------------------------------------

    def probes_for(self, kind: str) -> tuple[Probe, ...]:
        return tuple(probe for (of, _), probe in self._probes.items() if of == kind)

    def is_sampled(self, step: int) -> bool:
        aside = self.ranks.given_up  # at a step that may be under way, and is sampled to its end
        return (aside is None or step <= aside) and self.pace.is_sampled(step)

    def begin_forward(self, instances: Collection[Instance]) -> bool:
        """A watched graph of ``instances`` is about to run in training: catch up with finished steps; whether this one is
        sampled."""
        if self.closed:
            return False
        if _torch.in_backward():
            return self.is_sampled(self.clock.forward_step)
        self.clock.forward()
        if self.ranks.given_up is not None:
            return self.is_sampled(self.clock.step)
        if self.pace.begin(self.clock.step) and SPECTRA in self.pace.periods:
            self._spectra.spread(self.pace.periods[SPECTRA])
        if self.clock.step != self._finished and self.ranks.are_one():
            self._finished = self.clock.step
            self._weigh(self.clock.step - 1)
        elif self.clock.step != self._finished:
            try:
                self._catch_up(wait=False)
            except Exception as error:
                self.fail("working off a step", error)
            self.acting.settle()
        self.sharding.called(instances)
        return self.is_sampled(self.clock.step)

    def deliver(self, sample: Sample) -> None:
        self.collector.sample(sample)

    def note_unmatched(self, reason: str) -> None:
        self._unmatched.setdefault(reason)

    def note_fallbacks(self) -> None:
        """Take in which code Dynamo has left to eager by now."""
        try:
            self._fallbacks.read()
        except Exception as error:
            self.fail("reading what Dynamo left to eager", error)

    def _stop(self) -> None:
        self.stop_requested = True

    def _statuses(self) -> tuple[SiteStatus, ...]:
        trained = self.collector.trained
        untrained = {i for i in self.instances if i.evaluations and i not in trained}
        around = self.families & AROUND_STEPS
        told = {i: (NEVER_TRAINED,) if i in untrained else self.masters.notes(i.site) for i in self.instances}
        told = {i: (*notes, *self.sharding.notes(i.site, around)) for i, notes in told.items()}
        own = tuple(instance.status(more) for instance, more in told.items())
        return own if self.collector.merging is None else self.collector.merging.statuses(own)

    def _catch_up(self, wait: bool = True) -> None:
        if not self.closed:
            self._finished = self.clock.step
            self.collector.catch_up(self.clock.step, self._weigh, wait=wait)

    def _weigh(self, step: int, last: bool = False) -> None:
        self.sharding.weigh(step, self.collector.weigh, last=last)
