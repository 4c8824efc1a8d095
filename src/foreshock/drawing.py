"""Pictures of sites: the ops between the weights and the boundary of one match, as SVG that reads on light and dark.

What is drawn is a slice of the captured graph: everything on a way from a weight, or from a tensor at the boundary, to the
boundary. Sites whose slices are alike but for sizes are one form, and drawn once. Same graph, same bytes.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import networkx as nx
from torch.fx import Node

from foreshock.errors import ConfigError
from foreshock.patterns import GraphView, Match
from foreshock.patterns.graph import module_of
from foreshock.patterns.ops import op, tensor
from foreshock.watch import Watch

MOST_NODES = 120  # of a slice; beyond that only the ways between the tensors at the boundary are drawn
COLORS: Mapping[str, str] = {
    "q": "#3b82f6", "k": "#10b981", "v": "#a855f7", "out": "#f59e0b", "mask": "#94a3b8", "logits": "#0891b2",
    "scores": "#10b981", "indices": "#f59e0b", "values": "#f97316", "input": "#94a3b8", "weight": "#ef4444",
}  # fmt: skip
OTHER = "#14b8a6"
_STYLE = """
.back { fill: #ffffff; } text { fill: #1f2937; font: 12px ui-sans-serif, system-ui, sans-serif; }
.title { font-weight: 600; font-size: 14px; } .small { font-size: 10.5px; opacity: .75; }
.op { fill: #ffffff; stroke: #9ca3af; } .edge { fill: none; stroke: #9ca3af; stroke-width: 1.2; }
.tap { stroke-width: 3.5; }
@media (prefers-color-scheme: dark) {
.back, .op { fill: #0d1117; } text { fill: #e5e7eb; } .op, .edge { stroke: #6b7280; }
}
"""
WIDTH, HEIGHT, GAP, LEVEL, MARGIN = 196, 40, 18, 68, 24
LANE = 8  # what an edge takes up on a level that it passes
LONGEST = 28  # characters of a label


@dataclass(frozen=True, slots=True)
class Box:
    """One op, input or weight. ``role`` is "" for what merely stands between."""

    label: str
    size: str
    role: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A slice in plain values: boxes in graph order, edges between their positions, tapped ones with the role they carry."""

    title: str
    subtitle: str
    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int, str], ...]

    @property
    def form(self) -> tuple[object, ...]:
        """What two sites share that differ in sizes and names only."""
        labels = tuple((box.label if box.role != "weight" else "", box.role) for box in self.boxes)
        return self.title, labels, self.edges


class Drawings:
    """Collects one `Picture` for each form of site that a watch meets."""

    def __init__(self) -> None:
        self.pictures: dict[tuple[object, ...], Picture] = {}

    def watch(self, watch: Watch) -> None:
        """Draw every match of ``watch`` from now on, and nothing of an earlier one."""
        self.pictures.clear()

        def add(view: GraphView, match: Match) -> None:
            try:
                drawn = picture(view, match)
                self.pictures.setdefault(drawn.form, drawn)
            except Exception as error:
                watch.fail("drawing a site", error)

        watch.on_match = add

    def write(self, folder: Path) -> list[Path]:
        """One SVG for each form. Raises `ConfigError` if the folder cannot be written."""
        names: dict[str, int] = {}
        written = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for drawn in self.pictures.values():
                base = re.sub(r"[^a-z0-9]+", "-", drawn.title.lower()).strip("-")
                names[base] = names.get(base, 0) + 1
                path = folder / (f"{base}.svg" if names[base] == 1 else f"{base}-{names[base]}.svg")
                path.write_text(svg(drawn), encoding="utf-8")
                written.append(path)
        except OSError as error:
            raise ConfigError(f"drawing into {folder}: {error.strerror}; pass another folder with --draw") from error
        return written


def picture(view: GraphView, match: Match) -> Picture:
    """The slice of ``match``, found in ``view`` or in a body that it calls."""
    inside = next(v for v in view.walk() if v.graph is match.anchor.graph)
    roles = {node: role for role, node in match.roles.items() if node.graph is inside.graph}
    taps = {match.edge(role): role for role in match.operands}
    tapped = {(edge.source, edge.node): role for edge, role in taps.items() if edge.node.graph is inside.graph}
    entries = [match.roles[role] for role in (*match.operands, match.tapped or "") if role in match.roles]
    whole = match.roles.get(match.tapped or "")  # tapped on the tensor itself, with all its users
    ends = {match.anchor, *roles, *(node for pair in tapped for node in pair)}
    kept = ends | _between(inside, entries, ends)
    weights: dict[Node, str] = {}
    inputs = [node for node in inside.graph.nodes if node.op == "placeholder"]
    for role, outside in match.sources.items():
        named = {n: inside.names.get(inside.source(n), "") for n in inputs if inside.source(n) in outside}
        end = match.roles.get(role.removesuffix("_weight"), match.roles.get("logits"))
        way = _way(inside, end, set(named)) if end is not None and end.graph is inside.graph else set()
        if len(kept | way) <= MOST_NODES:
            kept |= way
            weights |= {node: name for node, name in named.items() if node in way}
    projections = {user for weight in weights for user in inside.dataflow.successors(weight)}
    kept |= _between(inside, sorted(projections & kept, key=inside.order.__getitem__), ends)  # a fused one makes v too
    order = sorted(kept, key=inside.order.__getitem__)
    position = {node: i for i, node in enumerate(order)}
    boxes = [
        Box(weights.get(n) or _label(n), _size(n), roles.get(n) or ("weight" if n in weights else "")) for n in order
    ]
    lines = [
        (position[source], position[node], tapped.get((source, node), match.tapped if source is whole else "") or "")
        for node in order
        for source in sorted(inside.dataflow.predecessors(node), key=inside.order.__getitem__)
        if source in position
    ]
    place = module_of(match.anchor) or "the graph's top"
    return Picture(f"{match.kind}: {match.pattern}", f"first met in {place}", tuple(boxes), tuple(lines))


def _between(view: GraphView, starts: Sequence[Node], ends: set[Node]) -> set[Node]:
    """Nodes on a way from ``starts`` to ``ends``, none of them behind the last end; none at all if they are too many."""
    last = max(view.order[node] for node in ends)
    reached, queue = set(starts), list(starts)
    for node in queue:
        if len(reached) > 4 * MOST_NODES:
            return set()
        for user in view.dataflow.successors(node):
            if user not in reached and view.order[user] <= last:
                reached.add(user)
                queue.append(user)
    needed = set(ends)
    for node in sorted(reached, key=view.order.__getitem__, reverse=True):
        if any(user in needed for user in view.dataflow.successors(node)):
            needed.add(node)
    return needed & reached


def _way(view: GraphView, end: Node, sources: set[Node]) -> set[Node]:
    """Nodes on a way from ``sources`` to ``end``: backwards, the latest first, until every source has been read once."""
    missing, seen, queue = set(sources), {end}, [(-view.order[end], end)]
    behind: list[Node] = []
    while queue and missing and len(behind) < 20 * MOST_NODES:
        _, node = heapq.heappop(queue)
        behind.append(node)
        for source in view.dataflow.predecessors(node):
            missing.discard(source)
            if source not in seen:
                seen.add(source)
                heapq.heappush(queue, (-view.order[source], source))
    made = set(sources)
    for node in reversed(behind):
        if any(source in made for source in view.dataflow.predecessors(node)):
            made.add(node)
    return made - missing


def _label(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return "input"
    return op(node).rpartition("::")[2] or str(node.target)


def _size(node: Node) -> str:
    found = tensor(node)
    if found is None:
        return ""
    return f"[{', '.join(map(str, found.shape))}] {str(found.dtype).removeprefix('torch.')}"


def svg(drawn: Picture) -> str:
    """The picture as a self-contained SVG document."""
    places, lanes, width, height = _layout(len(drawn.boxes), [(a, b) for a, b, _ in drawn.edges])
    used = list(dict.fromkeys(box.role for box in drawn.boxes if box.role))
    width = max(width, 2 * MARGIN + 7 * max(len(drawn.title), len(drawn.subtitle)), 2 * MARGIN + 78 * (len(used) + 1))
    top, bottom = 64, 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height + top + bottom:.0f}" '
        f'width="{width:.0f}" height="{height + top + bottom:.0f}" role="img" aria-label="{escape(drawn.title)}">',
        f"<style>{_STYLE}</style>",
        '<rect class="back" width="100%" height="100%"/>',
        f'<text class="title" x="{MARGIN}" y="26">{escape(drawn.title)}</text>',
        f'<text class="small" x="{MARGIN}" y="44">{escape(drawn.subtitle)}</text>',
        f'<g transform="translate(0 {top})">',
    ]
    for source, node, role in drawn.edges:
        parts.append(_edge(places[source], lanes[source, node], places[node], role))
    for box, (x, y) in zip(drawn.boxes, places, strict=True):
        parts.append(_box(box, x, y))
    parts.append("</g>")
    parts += _legend(used, any(role for _, _, role in drawn.edges), height + top + 30)
    return "\n".join([*parts, "</svg>", ""])


def _edge(start: tuple[float, float], lanes: Sequence[tuple[float, float]], end: tuple[float, float], role: str) -> str:
    x, y = start[0] + WIDTH / 2, start[1] + HEIGHT
    path = f"M{x:.1f} {y:.1f}"
    for to_x, to_y, further in [*((x, y, HEIGHT) for x, y in lanes), (end[0] + WIDTH / 2, end[1], 0)]:
        bend = (to_y - y) / 2
        path += f" C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y - bend:.1f} {to_x:.1f} {to_y:.1f}"
        path += f" v{further}" if further else ""
        x, y = to_x, to_y + further
    color = f' style="stroke: {_color(role)}"' if role else ""
    return f'<path class="edge{" tap" * bool(role)}" d="{path}"{color}/>'


def _box(box: Box, x: float, y: float) -> str:
    color = f' style="stroke: {_color(box.role)}; stroke-width: 2.5"' if box.role else ""
    label = box.label if len(box.label) <= LONGEST else f"…{box.label[1 - LONGEST :]}"
    tag = (
        f'<text class="small" x="{x + WIDTH - 6:.1f}" y="{y - 3:.1f}" text-anchor="end">{escape(box.role)}</text>'
        if box.role and box.role != "weight"
        else ""
    )
    return (
        f'<g><title>{escape(box.label)}</title><rect class="op" x="{x:.1f}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" '
        f'rx="6"{color}/><text x="{x + WIDTH / 2:.1f}" y="{y + 17:.1f}" text-anchor="middle">{escape(label)}</text>'
        f'<text class="small" x="{x + WIDTH / 2:.1f}" y="{y + 32:.1f}" text-anchor="middle">{escape(box.size)}</text>{tag}</g>'
    )


def _legend(roles: Sequence[str], taps: bool, y: float) -> Iterable[str]:
    x = float(MARGIN)
    for role in roles:
        yield (
            f'<rect class="op" x="{x:.0f}" y="{y - 10:.0f}" width="14" height="12" rx="3" '
            f'style="stroke: {_color(role)}; stroke-width: 2.5"/>'
            f'<text x="{x + 20:.0f}" y="{y:.0f}">{escape(role)}</text>'
        )
        x += 78
    if taps:
        yield (
            f'<path class="edge tap" d="M{MARGIN} {y + 16:.0f} h24"/>'
            f'<text x="{MARGIN + 30}" y="{y + 20:.0f}">thick: a gradient tap</text>'
        )


def _color(role: str) -> str:
    return COLORS.get(role, OTHER)


def _layout(
    count: int, edges: Sequence[tuple[int, int]]
) -> tuple[list[tuple[float, float]], dict[tuple[int, int], list[tuple[float, float]]], float, float]:
    """Upper left corners, each edge's lanes, width and height. Levels from the last box up; a long edge keeps a lane on each."""
    flow = nx.DiGraph()
    flow.add_nodes_from(range(count))
    flow.add_edges_from(edges)
    levels: list[list[int]] = [sorted(level) for level in nx.topological_generations(flow.reverse())][::-1]
    level_of = {node: depth for depth, level in enumerate(levels) for node in level}
    lanes, passing = count, {}
    for source, node in dict.fromkeys(edges):
        before = source
        passing[source, node] = range(lanes, lanes + max(0, level_of[node] - level_of[source] - 1))
        flow.remove_edge(source, node)
        for depth in range(level_of[source] + 1, level_of[node]):
            levels[depth].append(lanes)
            flow.add_edge(before, lanes)
            before, lanes = lanes, lanes + 1
        flow.add_edge(before, node)
    order = {node: i for level in levels for i, node in enumerate(level)}
    for sweep in range(8):
        for level in levels if sweep % 2 else reversed(levels):
            near = flow.predecessors if sweep % 2 else flow.successors
            level.sort(key=lambda n: (_middle([order[m] for m in near(n)], order[n]), n))
            order.update({node: i for i, node in enumerate(level)})
    widths = [sum(WIDTH if node < count else LANE for node in level) + GAP * (len(level) - 1) for level in levels]
    width = max(widths, default=0) + 2 * MARGIN
    places = [(0.0, 0.0)] * lanes
    for depth, level in enumerate(levels):
        x = (width - widths[depth]) / 2
        for node in level:
            places[node] = (x if node < count else x + LANE / 2, float(depth * LEVEL))
            x += (WIDTH if node < count else LANE) + GAP
    routes = {edge: [places[lane] for lane in passed] for edge, passed in passing.items()}
    return places[:count], routes, width, float(len(levels) * LEVEL)


def _middle(around: Sequence[int], otherwise: int) -> float:
    return sum(around) / len(around) if around else float(otherwise)
