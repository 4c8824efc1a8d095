"""One pass over a graph's nodes: anchors are looked up by op name, so matching is linear in the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from foreshock.errors import PatternError
from foreshock.patterns.attention import SDPA
from foreshock.patterns.decisions import decisions
from foreshock.patterns.flex import FLEX
from foreshock.patterns.graph import FUNCTION, GraphView, body_of
from foreshock.patterns.kernels import PUBLIC, described_by_schema
from foreshock.patterns.lift import lift
from foreshock.patterns.ops import op, schema, tensor
from foreshock.patterns.overlooked import overlooked
from foreshock.patterns.pattern import Match, Miss, Pattern
from foreshock.patterns.router import ROUTER
from foreshock.patterns.router_laws import with_router_laws
from foreshock.patterns.sharded import is_sharded
from foreshock.patterns.written import WRITTEN

BUILTIN: tuple[Pattern, ...] = (SDPA, WRITTEN, FLEX, *PUBLIC, ROUTER)
_registered: list[Pattern] = []


def register(pattern: Pattern) -> Pattern:
    """Look for ``pattern`` in every graph captured from now on; it goes before the built-in ones. Returns it."""
    if not isinstance(pattern, Pattern):
        raise PatternError(
            f"registering a pattern: received {type(pattern).__name__}; give a foreshock.patterns.Pattern"
        )
    _registered[:] = [pattern, *(known for known in _registered if known.name != pattern.name)]
    return pattern


@dataclass(frozen=True)
class Findings:
    """Matches in graph order, near-misses, and errors of patterns that failed."""

    matches: tuple[Match, ...]
    misses: tuple[Miss, ...]
    errors: tuple[tuple[str, Exception], ...]


def find(view: GraphView, extra: Iterable[Pattern] = ()) -> Findings:
    """Every site of the graph and of the bodies it calls. A pattern that raises is reported in ``errors`` and skipped."""
    table: dict[str, list[Pattern]] = {}
    for pattern in (*extra, *_registered, *BUILTIN):
        for anchor in pattern.anchors:
            table.setdefault(anchor, []).append(pattern)
    matches: list[Match] = []
    misses: list[Miss] = []
    errors: list[tuple[str, Exception]] = []
    for region in view.walk():
        found = [_outside(region, result) for result in _in_one(region, table, errors)]
        matches += [result for result in found if isinstance(result, Match)]
        misses += [miss for miss in found if isinstance(miss, Miss) and not miss.quiet]
    for region in view.walk():
        region.known.clear()  # masks are large, and views live as long as their graphs
    return Findings(tuple(matches), tuple(misses), tuple(errors))


def _in_one(
    view: GraphView, table: Mapping[str, list[Pattern]], errors: list[tuple[str, Exception]]
) -> list[Match | Miss]:
    results: list[Match | Miss] = []
    own: list[Match] = []  # of patterns that users gave
    for node in list(view.graph.nodes):
        candidates = table.get(op(node), ())
        missed: Match | Miss | None = None
        for pattern in candidates:
            try:
                found = pattern.results(view, node)
            except Exception as error:
                errors.append((pattern.name, error))
                continue
            matches = [result for result in found if isinstance(result, Match)]
            results += matches
            if not any(pattern is built_in for built_in in BUILTIN):
                own += matches
            if matches and not pattern.beside:
                missed = None
                break
            if not matches and (not isinstance(missed, Miss) or missed.quiet):
                missed = found[0]
        if not candidates and _is_opaque(node):
            missed = described_by_schema(view, node)
            missed = _undescribed(node) if isinstance(missed, Miss) and missed.quiet else missed
        if not candidates and op(node).startswith("higher_order::"):
            missed = _closed(node, table)
        if missed is not None:
            results.append(missed)
    results = decisions(_without_doubles(results, own), view)
    return [*results, *overlooked(view, results)]


def _without_doubles(results: list[Match | Miss], own: list[Match]) -> list[Match | Miss]:
    """A pattern of the user's may begin at another op than the built-in one that also fits: the user's stays."""
    taken = {(match.kind, match.roles[role]) for match in own for role in ("out", "indices") if role in match.roles}
    return [
        result
        for result in results
        if not isinstance(result, Match)
        or any(result is match for match in own)
        or not any((result.kind, node) in taken for node in result.roles.values())
    ]


def _outside(region: GraphView, result: Match | Miss) -> Match | Miss:
    if not isinstance(result, Match):
        return result
    spread = [role for role, node in result.roles.items() if is_sharded(node)]
    if spread:
        told = f"its {', '.join(spread)} are laid out over ranks (DTensor); probes read a rank's own part, `to_local()`"
        return Miss(result.anchor, told)
    in_function = region.call is not None and op(region.call) == FUNCTION
    return lift(region, result) if in_function else replace(with_router_laws(region, result), view=region)


def _closed(node: Node, table: Mapping[str, list[Pattern]]) -> Miss:
    """A call of a graph that is not followed (a branch, a loop): what might stand in it is named."""
    owner = node.graph.owning_module
    names = (
        [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        if body_of(node) is None
        else []
    )
    bodies = [body for body in (getattr(owner, name, None) for name in names) if isinstance(body, GraphModule)]
    inside = sorted({op(inner) for body in bodies for inner in body.graph.nodes if op(inner) in table})
    name = op(node).removeprefix("higher_order::")
    return Miss(node, f"{', '.join(inside)} inside `{name}`, which is not followed", quiet=not inside)


def _undescribed(node: Node) -> Miss:
    """An op of somebody's library that may be an attention kernel: it takes three activations of as many axes as its result."""
    fakes = [
        fake for x in (*node.all_input_nodes, node) if (fake := tensor(x)) is not None and fake.is_floating_point()
    ]
    results = [fake for user in node.users if (fake := tensor(user)) is not None]
    axes = [fake.dim() for fake in fakes]
    like = len(axes) > 3 if tensor(node) is not None else len(axes) > 2 and any(x.dim() == axes[0] for x in results)
    quiet = not like or axes[0] not in (3, 4) or len(set(axes[:3])) > 1
    told = "an op that nobody described takes three tensors of as many axes: if it is an attention, say so with"
    return Miss(node, f"{told} `foreshock.patterns.attention_op({op(node)!r}, q=..., k=..., v=...)`", quiet)


def _is_opaque(node: Node) -> bool:
    return node.op == "call_function" and "::" in op(node) and schema(node) is not None
