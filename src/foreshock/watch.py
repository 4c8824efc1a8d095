"""A watch: one run being observed, from the backend that captures its graphs to the alarms it raises."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from foreshock import _torch
from foreshock.acting import Acting, OnAlarm, actions, names
from foreshock.backend import Backend
from foreshock.clock import StepClock
from foreshock.collector import Collector, Store
from foreshock.config import Settings, families, load_settings
from foreshock.fallbacks import Fallbacks
from foreshock.instances import Instance, Instances
from foreshock.masters import Masters
from foreshock.monitors import BiasLaw, ConsoleSink, Judge, RouterWeights, SharedRouterWeights, Spectra
from foreshock.monitors.step_monitor import FAMILIES as AROUND_STEPS
from foreshock.monitors.step_monitor import StepMonitor
from foreshock.monitors.tiers import probes as built_in
from foreshock.patterns import GraphView, Match, Pattern
from foreshock.reader import open_run
from foreshock.records import Alarm, Array, Coverage, Probe, Site, SiteStatus
from foreshock.runtime import Sample
from foreshock.sharding import Sharding
from foreshock.store import MemoryStore, RunStore, of_this_rank

_log = logging.getLogger("foreshock")
_EVERYTHING = 2**62
NEVER_TRAINED = "evaluated, never sampled in training: no gradient came back through it yet"


class Watch:
    """Watches every model compiled with ``watch.backend``.

    Args:
        run: folder to write to; None keeps everything in memory and writes nothing.
        every: sample one optimizer step in ``every`` (1: every forward pass). Unsampled steps run the plain graph.
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
        sinks: more receivers of readings and alarms.
        strict: raise whatever fails inside foreshock, which otherwise is reported once while training goes on.
        probes: `Probe`s for further kinds of site, or beside the built-in ones at attentions and routers; a probe replaces the one
            of its kind that has the same name ("attention", "router").

    Settings not given here come from ``foreshock.toml``, ``[tool.foreshock]`` and ``FORESHOCK_*``; see `foreshock.config`.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        *,
        every: int | None = None,
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
        rows: int | None = None,
        windows: Sequence[int] | None = None,
        probes: Sequence[Probe] = (),
        settings: Settings | None = None,
    ) -> None:
        monitors = [monitors] if isinstance(monitors, str) else list(monitors or ())
        named = tuple(m for m in monitors if isinstance(m, str))
        references = list(baseline) if isinstance(baseline, list | tuple) else [baseline]
        row = actions(on_alarm)
        given = {
            "run": None if run is None else os.fspath(run),
            "every": every,
            "inner": inner if isinstance(inner, str) else None,
            "monitors": named or None,
            "baseline": None
            if baseline is None
            else [os.fspath(x) if isinstance(x, os.PathLike) else x for x in references],
            "on_alarm": names(row),
            "debounce": debounce,
            "align": align,
            "steps_per_false_alarm": steps_per_false_alarm,
            "strict": strict,
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
        self.acting = Acting(row, self.settings, self._stop, self.fail)
        self._reported: dict[str, str] = {}
        self._unmatched: dict[str, None] = {}
        self._fallbacks = Fallbacks()
        self._finished = 0
        self._closed = False
        self._started = time.perf_counter()
        self.rewriting_seconds = 0.0
        store: Store = MemoryStore() if self.settings.run is None else RunStore(of_this_rank(self.settings.run))
        healthy = [open_run(path) for path in self.settings.baseline]
        own = [m for m in monitors if not isinstance(m, str)]
        self.masters = Masters()
        self.sharding = Sharding(self.instances, self.fail)
        read = self.sharding.reading(self.masters.read)
        stride = max(min(self.settings.windows), self.settings.every)
        steps = [StepMonitor(self.families)] if self.families & AROUND_STEPS else []
        self._state: dict[str, Any] = {
            "bias": BiasLaw(),
            "spectra": Spectra(self.settings.windows, stride, read, self.sharding.share),
            "router": RouterWeights(read, self.sharding.share),
            "shared_router": SharedRouterWeights(self.settings.every, read, self.sharding.share),
            "sharding": self.sharding,
        }
        each_step = {"spectra": self._state["spectra"], "router": self._state["shared_router"]}
        self.sharding.readers = [monitor for family, monitor in each_step.items() if family in self.families]
        self.collector = Collector(
            self.instances,
            store,
            families=self.families,
            derived=[self._state["bias"]],
            weights=[*([self._state["router"]] if "router" in self.families else []), *own],
            each_step=self.sharding.readers,
            steps=steps,
            judge=Judge(
                healthy,
                detectors=detectors or (),
                on_error=self.fail,
                steps_per_false_alarm=self.settings.steps_per_false_alarm,
                align=self.settings.align,
            ),
            sinks=[ConsoleSink(), *sinks],
            on_alarm=lambda alarm: self.acting.hear(alarm, self.clock.step),
            fail=self.fail,
        )
        self._hooks = [_torch.on_optimizer_step(self._after_optimizer_step)]
        self._hooks += [_torch.before_optimizer_step(self._before_optimizer_step)] if steps else []
        atexit.register(self.close)

    # -- what the user asks ------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps completed."""
        return self.clock.step

    @property
    def sites(self) -> list[Site]:
        """Every site that ran, one for each distinct weight set."""
        return [instance.site for instance in self.instances]

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
            tuple(self._reported.values()),
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
        store = self.collector.store
        try:
            store.meta(steps=self.step, cost=self.cost())
            store.coverage(self.coverage)
            store.flush()
        except Exception as error:
            self.fail("writing to the store", error)

    def cost(self) -> dict[str, str]:
        """What watching took on the host so far, beside the wall clock; the sampled steps' own extra work is not in it."""
        wall = time.perf_counter() - self._started
        own = {"matching and rewriting": self.rewriting_seconds, "measuring, judging, storing": self.collector.seconds}
        shares = {name: f"{seconds:.2f} s ({seconds / wall:.1%} of the wall clock)" for name, seconds in own.items()}
        sampled = sum(instance.sampled for instance in self.instances)
        evaluations = max(1, sum(instance.evaluations for instance in self.instances))
        return {**shares, "sampled evaluations": f"{sampled / evaluations:.1%}", "wall clock": f"{wall:.1f} s"}

    def close(self) -> None:
        """Flush and stop watching; compiled models go on with their plain graphs. May be called twice."""
        if self._closed:
            return
        self.acting.closing = True
        try:
            self._catch_up()
            self.sharding.weigh(self.clock.step - 1, self.collector.weigh, last=True)
            self.collector.finish(_EVERYTHING)
            self.flush()
            self.acting.settle()
        finally:
            self._closed = True
            for hook in self._hooks:
                hook.remove()
            atexit.unregister(self.close)
            for sink in self.collector.sinks:
                self._close(f"sink {type(sink).__name__}", sink)
            self._close("writing to the store", self.collector.store)

    def _close(self, what: str, target: Any) -> None:
        try:
            target.close()
        except Exception as error:
            self.fail(what, error)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on as if never stopped."""
        self._catch_up()
        monitors = {name: monitor.state_dict() for name, monitor in self._state.items()}
        return {
            "clock": self.clock.state_dict(),
            "monitors": monitors,
            "judge": self.collector.judge.state_dict(),
            "collector": self.collector.state_dict(),
            "acting": self.acting.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.clock.load_state_dict(state["clock"])
        self._finished = self.clock.step
        for name, monitor in self._state.items():
            monitor.load_state_dict(state["monitors"][name])
        self.collector.judge.load_state_dict(state["judge"])
        self.collector.load_state_dict(state["collector"])
        self.acting.load_state_dict(state["acting"])

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    # -- what the other rooms call -----------------------------------------------------------------------------------

    def probes_for(self, kind: str) -> tuple[Probe, ...]:
        return tuple(probe for (of, _), probe in self._probes.items() if of == kind)

    def is_sampled(self, step: int) -> bool:
        return step % self.settings.every == 0

    def begin_forward(self, instances: Collection[Instance]) -> bool:
        """A watched graph of ``instances`` is about to run in training: catch up with finished steps; whether this one is
        sampled."""
        if self._closed:
            return False
        if _torch.in_backward():
            return self.is_sampled(self.clock.forward_step)
        self.clock.forward()
        if self.clock.step != self._finished:
            self._catch_up()
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

    def fail(self, what: str, error: Exception) -> None:
        """Report a failure inside foreshock once, in the log and the ledger; raise it under ``strict``."""
        if self.settings.strict:
            raise error
        if what not in self._reported:
            self._reported[what] = f"{what}: {type(error).__name__}: {error}"
            _log.warning("%s (training goes on)", self._reported[what])

    def _stop(self) -> None:
        self.stop_requested = True

    def _statuses(self) -> tuple[SiteStatus, ...]:
        trained = self.collector.trained
        untrained = {i for i in self.instances if i.evaluations and i not in trained}
        around = self.families & AROUND_STEPS
        told = {i: (NEVER_TRAINED,) if i in untrained else self.masters.notes(i.site) for i in self.instances}
        told = {i: (*notes, *self.sharding.notes(i.site, around)) for i, notes in told.items()}
        return tuple(instance.status(more) for instance, more in told.items())

    def _catch_up(self) -> None:
        self._finished = self.clock.step
        self.sharding.weigh(self.clock.step - 1, self.collector.weigh)
        self.collector.finish(self.clock.step)

    def _before_optimizer_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        try:
            concerned = self.clock.concerns(optimizer, self.instances.parameter_ids)
            if concerned and self.is_sampled(self.clock.forward_step):
                self.collector.before_optimizer(optimizer)
        except Exception as error:
            self.fail("reading the optimizer", error)

    def _after_optimizer_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.masters.met(optimizer)
        if not self.clock.concerns(optimizer, self.instances.parameter_ids):
            return
        try:
            if self.is_sampled(self.clock.forward_step):
                self.collector.optimizer(self.clock.forward_step, optimizer)
        except Exception as error:
            self.fail("reading the optimizer", error)
        self.clock.tick(optimizer)
        self.acting.after_step(self.clock.step)


_default: Watch | None = None


def default_watch() -> Watch:
    """The process-wide watch behind ``backend="foreshock"``, made on first use and closed at exit."""
    global _default
    if _default is None or _default._closed:
        _default = Watch()
    return _default


def instrumented(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
    """A `torch.compile` backend over the default watch: ``torch.compile(model, backend=foreshock.instrumented)``.

    ``mode`` and ``options`` of `torch.compile` go to the inner compiler. Raises `ConfigError` for a bad configuration.
    """
    return default_watch().backend(gm, example_inputs, **options)
