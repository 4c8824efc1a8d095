"""The state that the passes share: the copied graph, its sites, and the layout of what will come out of it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from foreshock.passes.taps import Statistics, register_statistics
from foreshock.patterns import GraphView, Match
from foreshock.records import Facts, Probe
from foreshock.stages import TwoStages


@dataclass(frozen=True, slots=True)
class Quantity:
    """A stretch of a packed vector: ``size`` numbers that ``probe`` reads at ``site``, merged over microbatches by ``merge``."""

    site: int
    name: str
    size: int
    merge: str
    probe: str


@dataclass(eq=False)
class SitePlan:
    """A match in the copied graph with the probes of its kind."""

    index: int
    label: str
    match: Match
    probes: tuple[Probe, ...]
    facts: Facts


@dataclass(eq=False)
class Frame:
    """One graph while it is rewritten, the outermost or a body: what its sites will pack, and the pieces of slot they need."""

    view: GraphView
    rows: Node
    forward: list[Quantity] = field(default_factory=list)
    backward: list[Quantity] = field(default_factory=list)
    packed: list[Node] = field(default_factory=list)
    pieces: list[Node] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        return self.view.graph

    @property
    def slot_size(self) -> int:
        return sum(quantity.size for quantity in self.backward)

    @property
    def packed_size(self) -> int:
        return sum(quantity.size for quantity in self.forward)


@dataclass(eq=False)
class Plan:
    """One capture being rewritten. ``view`` is of the copied graph."""

    module: GraphModule
    view: GraphView
    sites: list[SitePlan]
    fake_mode: Any
    device: torch.device
    rows: int
    strict: bool
    report: Callable[[str, Exception], None] | None = None  # for failures that show only once the graph runs
    bodies: dict[Graph, tuple[GraphView, Frame]] = field(default_factory=dict)  # rewritten for their first call
    failures: list[tuple[str, Exception]] = field(default_factory=list)
    _sizes: dict[Any, dict[str, int]] = field(default_factory=dict)

    @functools.cached_property
    def _by_view(self) -> Mapping[int, list[SitePlan]]:
        found: dict[int, list[SitePlan]] = {}
        for site in self.sites:
            found.setdefault(id(site.match.view), []).append(site)
        return found

    def sites_in(self, view: GraphView) -> list[SitePlan]:
        """The sites that stand in the graph of ``view`` itself."""
        return self._by_view.get(id(view), [])

    def prepare(
        self, site: SitePlan, part: str, roles: Sequence[str], nodes: Mapping[str, Node], rows: Node | None
    ) -> tuple[dict[str, Any], list[Quantity]]:
        """Make the ``part`` ("forward" or "backward") of the site's probes available to the op that will call it: the op's spec,
        and what its vector will hold. A probe that fails is left out.

        It is given the tensors of ``nodes``, and ``rows`` or, without, gradients of the same.
        """
        spec: dict[str, Any] = {"layout": {}, **site.facts, "roles": list(roles)}
        statistics: dict[str, int] = {}
        found: list[Quantity] = []
        for probe in site.probes:
            function: Statistics | None = getattr(probe, part)
            if function is None:
                continue
            of = "" if part == "forward" else "gradient statistics of "
            try:
                sizes = self._sizes_of(site, probe, function, json.dumps(spec), nodes, rows)
            except Exception as error:
                self.fail(f"{of}probe `{probe.name}` at {site.label}", error)
                continue
            if not sizes:
                continue  # it has nothing to say of such a site
            stages = (function.first, function.rest) if isinstance(function, TwoStages) else (function,)
            told = ":".join(f"{getattr(stage, '__qualname__', '')}:{version(stage)}" for stage in stages)
            name = f"{probe.kind}/{probe.name}/{part}:{told}"
            what = f"{of or 'running '}probe `{probe.name}`"
            register_statistics(name, function, self.report and functools.partial(self.report, what))
            statistics[name] = sum(sizes.values())
            found += [
                Quantity(site.index, quantity, size, "max" if quantity in probe.maxima else "sum", probe.name)
                for quantity, size in sizes.items()
            ]
        return {**spec, "statistics": statistics}, found

    def _sizes_of(
        self,
        site: SitePlan,
        probe: Probe,
        function: Statistics,
        spec: str,
        nodes: Mapping[str, Node],
        rows: Node | None,
    ) -> dict[str, int]:
        """Run statistics on fake tensors: the sizes of the results, and an early failure. Like sites are run once."""
        fakes = {role: node.meta["example_value"] for role, node in nodes.items()}
        lies = tuple((role, str(x.shape), str(x.stride()), x.dtype) for role, x in fakes.items())
        key = (id(probe), function, spec, lies)
        if key not in self._sizes:
            with self.fake_mode, torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                detached = {role: x.detach() for role, x in fakes.items()}
                results = function(site.facts, detached, detached if rows is None else rows.meta["example_value"])
                self._sizes[key] = {name: int(result.numel()) for name, result in results.items()}
        return self._sizes[key]

    def fake(self, size: int) -> torch.Tensor:
        """An fp32 vector as the capture would have seen it."""
        with self.fake_mode:
            return torch.empty(size, dtype=torch.float32, device=self.device)

    def fail(self, what: str, error: Exception) -> None:
        """Record a failure and go on; under ``strict`` it is raised."""
        if self.strict:
            raise error
        self.failures.append((what, error.with_traceback(None)))  # frames would keep the first batch alive


def past_placeholders(node: Node) -> Node:
    """``node``, or the first behind it that is no placeholder: those stay together."""
    while node.op == "placeholder":
        node = node.next
    return node


def add(graph: Graph, target: Any, args: tuple[Any, ...], value: Any, written_by: str, site: str = "") -> Node:
    """A call where ``graph`` inserts now, with its fake ``value`` and the mark of who wrote it."""
    node = graph.call_function(target, args)
    node.meta["example_value"] = value
    node.meta["foreshock"] = {"pass": written_by, "site": site}
    return node


@contextmanager
def before(graph: Graph, node: Node) -> Iterator[None]:
    """Insert in front of ``node``; if the block raises, nothing of it stays."""
    start = node.prev
    try:
        with graph.inserting_before(node):
            yield
    except BaseException:
        while node.prev is not start:
            graph.erase_node(node.prev)
        raise


@functools.cache
def version(function: Callable[..., Any]) -> str:
    """Changes when the source of ``function``'s module does, or of one that it takes functions from, so that no cache serves what
    was compiled with an older one."""
    try:
        module = sys.modules[function.__module__]
        taken = {value.__module__ for value in vars(module).values() if inspect.isfunction(value)} - {module.__name__}
        text = "".join(inspect.getsource(sys.modules[name]) for name in (module.__name__, *sorted(taken)))
    except (OSError, TypeError, KeyError):
        text = repr(getattr(function, "__code__", function))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
