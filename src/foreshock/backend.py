"""The `torch.compile` backend: capture, find the sites, rewrite a copy, and hand back a callable that chooses a variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from foreshock import _torch
from foreshock.cost import REWRITING
from foreshock.instances import Held, Instance
from foreshock.passes import Plan, SitePlan, copy_graph, expand, instrument, untappable
from foreshock.patterns import Findings, GraphView, Match, find
from foreshock.patterns.boundary import without_gradients
from foreshock.patterns.exchanges import note_places
from foreshock.patterns.experts import with_experts
from foreshock.patterns.graph import module_of
from foreshock.patterns.stream import with_stream
from foreshock.records import Facts
from foreshock.runtime import Compiled, WatchedGraph

if TYPE_CHECKING:
    from foreshock.watch import Watch


_AROUND: Mapping[str, Callable[[Sequence[Match]], Sequence[Match]]] = {
    "residual": lambda matches: [with_stream(match) for match in matches],
    "experts": with_experts,
}
MOST_WEIGHT_SETS = 4096  # of one graph; where parameters are new objects each step they would pile up


class Backend:
    """What ``torch.compile(model, backend=watch.backend)`` calls with each captured graph."""

    __name__ = "foreshock"

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Compiled:
        """``options`` are `torch.compile`'s own ``mode`` and ``options``, passed on to the inner compiler."""
        inner = self._inner(**options)
        if self._watch.closed:
            return inner(gm, example_inputs)
        try:
            watched = self._watched(gm, list(example_inputs), inner)
        except Exception as error:
            self._watch.fail("instrumenting a captured graph; it runs unwatched", error)
            watched = None
        return watched if watched is not None else inner(gm, example_inputs)

    def __deepcopy__(self, memo: Any) -> Backend:
        """Lightning's Fabric copies what `torch.compile` was given; the watch is this one."""
        return self

    def _inner(self, mode: str | None = None, options: dict[str, Any] | None = None) -> Callable[..., Compiled]:
        name = self._watch.inner
        if name == "inductor":
            return _torch.compile_fx(options, mode)
        found = name if callable(name) else _torch.lookup_backend(name)
        extra = {key: value for key, value in (("mode", mode), ("options", options)) if value}
        return lambda gm, inputs: found(gm, inputs, **extra)

    def _watched(self, gm: GraphModule, inputs: list[Any], inner: Callable[..., Compiled]) -> WatchedGraph | None:
        watch = self._watch
        if any("foreshock" in node.meta for node in gm.graph.nodes):
            watch.note_unmatched("a graph that another watch has rewritten already was left as it is")
            return None
        with watch.costs.of(REWRITING):
            copied, _ = copy_graph(gm)
            expand(copied)
            note_places(copied, _torch.place_in_group)
            watch.sharding.learn(inputs)
            view = GraphView.of(copied.graph, inputs, watch.instances.name_of, _torch.root_module())
            watch.instances.learn_names((view.parameters[node], name) for node, name in view.names.items())
            findings = find(view, watch.patterns)
            _note(watch, findings)
            matches = _with_families(watch, findings.matches)
            watch.note_fallbacks()
            if watch.on_match is not None:
                for match in matches:
                    watch.on_match(view, match)
            training = torch.is_grad_enabled() and not any(x.is_meta for x in inputs if isinstance(x, torch.Tensor))
            sites = [site for site in (self._site(i, match) for i, match in enumerate(matches)) if site is not None]
            if not sites:
                return None
            for index, site in enumerate(sites):
                site.index = index
            fakes = [node.meta.get("example_value") for node in copied.graph.nodes if node.op == "placeholder"]
            fake_mode = _torch.fake_mode_of([fake for fake in fakes if isinstance(fake, torch.Tensor)])
            device = sites[0].match.roles[next(iter(sites[0].match.roles))].meta["example_value"].device
            plan = Plan(copied, view, sites, fake_mode, device, watch.settings.rows, watch.settings.strict, watch.fail)
            rewritten = instrument(plan) if training else None
        for what, error in plan.failures:
            watch.fail(what, error)
        plan.failures.clear()
        context = _torch.current_context()
        symbolic = any(not isinstance(size, int) for fake in fakes for size in _sizes(fake))
        stand_ins = [] if symbolic else _torch.to_fake(context, inputs)

        def compile_variant(module: GraphModule, extra: list[torch.Tensor]) -> Compiled:
            """While this call lasts, in place; afterwards on stand-ins, as if still inside the capture."""
            added = _torch.to_fake(context, extra)
            if inputs:
                return inner(module, [*inputs, *added])
            with _torch.resumed(context):
                return inner(module, [*stand_ins, *added])

        watched = WatchedGraph(
            plain=lambda: compile_variant(gm, []),
            instrumented=None if rewritten is None else lambda: compile_variant(rewritten.module, rewritten.examples),
            rewritten=rewritten,
            device=device,
            resolve=self._resolver(sites, copied),
            wants_sample=watch.begin_forward,
            deliver=watch.deliver,
            fail=watch.fail,
            note=watch.note_unmatched,
            step=lambda: watch.clock.step,
            rows=watch.rows,
        )
        now = rewritten is not None and watch.is_sampled(watch.clock.step)
        for sampled in (False, True) if symbolic and rewritten is not None else (now,):
            if sampled:
                self._try_instrumented(watched)
            else:
                watched.compile(False)
        inputs.clear()
        return watched

    def _try_instrumented(self, watched: WatchedGraph) -> None:
        try:
            watched.compile(True)
        except Exception as error:
            watched.give_up("compiling the instrumented graph; it goes on without probes", error)

    def _site(self, index: int, match: Match) -> SitePlan | None:
        probes = self._watch.probes_for(match.kind)
        if not probes:
            where = module_of(match.anchor) or match.anchor.name
            told = f"{where}: found by `{match.pattern}`, but no probe measures sites of kind `{match.kind}`"
            self._watch.note_unmatched(f"{told}; give one to Watch(probes=[...])")
            return None
        match = _without_taps(match, untappable(match.view, match)) if match.view is not None else match
        facts = _facts(match, self._watch.settings.rows)
        return SitePlan(index, module_of(match.anchor) or match.anchor.name, match, probes, facts)

    def _resolver(self, sites: list[SitePlan], module: GraphModule) -> Callable[[Sequence[Any]], list[Instance]]:
        """From a call's arguments to the instances it evaluates."""
        position = {node: i for i, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder")}
        where: list[dict[str, tuple[int, ...]]] = [
            {role: tuple(position[node] for node in nodes) for role, nodes in site.match.sources.items()}
            for site in sites
        ]
        every = tuple(i for roles in where for indices in roles.values() for i in indices)
        instances = self._watch.instances
        cache: dict[tuple[int, ...], list[Instance]] = {}

        def resolve(args: Sequence[Any]) -> list[Instance]:
            key = tuple([id(args[i]) for i in every])
            known = cache.get(key)
            if known is not None and all(instance.is_live() for instance in known):
                return known
            with instances.lock:
                return resolve_anew(args, key)

        def resolve_anew(args: Sequence[Any], key: tuple[int, ...]) -> list[Instance]:
            found: list[Instance] = []
            beside: dict[Any, list[set[str]]] = {}
            self._watch.sharding.learn(args)
            instances.parameter_ids.update(id(arg) for arg in args if isinstance(arg, torch.nn.Parameter))
            for site, roles in zip(sites, where, strict=True):
                held: Held = {role: tuple(args[i] for i in indices) for role, indices in roles.items()}
                found.append(instances.resolve(site.match, site.label, site.probes, site.facts, held, beside))
            if len(cache) >= MOST_WEIGHT_SETS:
                cache.clear()
            cache[key] = found
            return found

        return resolve


def _without_taps(match: Match, reason: str) -> Match:
    """``match`` as it is, or for a reason without gradients and so without laws."""
    if not reason:
        return match
    return replace(match, operands={}, tapped=None, laws=without_gradients(match.laws, reason)).with_note(reason)


def _sizes(fake: Any) -> tuple[Any, ...]:
    return tuple(fake.shape) if isinstance(fake, torch.Tensor) else () if isinstance(fake, int) else (fake,)


def _facts(match: Match, rows: int) -> Facts:
    """Plain values that probes depend on; part of every compile cache key."""
    facts = {**match.facts, "layout": match.layout}
    seen = match.facts.get("causal") is not None or "mask" in match.roles
    known = seen and match.facts.get("scale") is not None
    readable = "logits" in match.roles or (known and match.facts.get("recompute", True))
    return {**facts, "rows": rows if match.kind != "attention" or readable else 0}


def _with_families(watch: Watch, matches: Sequence[Match]) -> Sequence[Match]:
    """``matches`` with what the second tier's families look for around a site; a search that fails leaves them as they are."""
    for family, look in _AROUND.items():
        if family in watch.families:
            try:
                matches = look(matches)
            except Exception as error:
                watch.fail(f"looking around the sites for `{family}`", error)
    return matches


def _note(watch: Watch, findings: Findings) -> None:
    for miss in findings.misses:
        watch.note_unmatched(str(miss))
    for name, error in findings.errors:
        watch.fail(f"pattern `{name}`; it was skipped", error)
