"""What ``foreshock watch`` shows of a run, cut to what fits: verdict and cost first, then alarms, what stands nearest to its limit,
and curves.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from foreshock.monitors.ledger import where
from foreshock.monitors.report_limits import bands
from foreshock.monitors.report_worst import Standing, worst
from foreshock.monitors.verdict import Verdict, in_order, verdict
from foreshock.reader import Run
from foreshock.records import Alarm, Array, Site

BARS = "▁▂▃▄▅▆▇█"
STYLES = {"critical": "bold red", "warning": "bold yellow", "good": "bold green", "unknown": "bold"}
SYMBOLS = {"critical": "▲", "warning": "◆", "good": "●", "unknown": "○"}
CURVES = ("run/loss", "optim/lr", "optim/grad_norm")
LEAST = 8  # characters of a column that is cut
# What the parts of a view are given in turn while there is room: a line more of each answer, or a row more.
TURNS = ("answers", "alarms", "worst", "alarms", "worst", "curves")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is shown of a run at one moment."""

    name: str
    verdict: Verdict
    alarms: Sequence[Alarm]
    sites: Mapping[str, Site]
    steps: Array
    worst: Sequence[Standing]
    curves: Mapping[str, Array]
    cost: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values; of curves what they say now, in the units of their metrics."""
        told = self.verdict
        return {
            "run": self.name,
            "steps": {"recorded": len(self.steps), "last": int(self.steps[-1]) if len(self.steps) else None},
            "verdict": {"level": told.level, "title": told.title, "answers": dict(told.answers)},
            "alarms": [alarm.to_json() for alarm in self.alarms],
            "worst": [
                {"metric": one.metric, "site": one.site, "value": one.value, "limit": one.limit, "share": one.share}
                for one in self.worst
            ],
            "now": {name: float(values[-1]) for name, values in self.curves.items() if len(values)},
            "cost": dict(self.cost),
        }


def snapshot(run: Run) -> Snapshot:
    """All that the view shows, from one open run."""
    sites, alarms, steps = {site.id: site for site in run.sites}, in_order(run.alarms), run.steps
    keys = set(run.columns())
    curves = {name: run.column(name, None)[1][:, 0] for name in CURVES if (name, None) in keys}
    found = worst(run, sites, bands(run))
    return Snapshot(
        run.name, verdict(alarms, sites, steps), alarms, sites, steps, found, curves, run.meta.get("cost", {})
    )


def view(shown: Snapshot, line: str, console: Console, height: int | None = None) -> Group:
    """The whole view in ``height`` lines; None: as many as it takes. ``line`` says how the run goes on.

    Texts from the run are plain: nothing in them is markup.
    """
    width = console.width
    most = {
        "answers": max((len(_lines(answer, _room(shown, width))) for _, answer in shown.verdict.answers), default=1),
        "alarms": len(shown.alarms),
        "worst": len(shown.worst),
        "curves": len(shown.curves),
    }

    @functools.cache
    def part(name: str, size: int) -> tuple[RenderableType, int]:
        """Made of so many rows, or lines an answer, and how high it is."""
        made = PARTS[name](shown, size, width)
        return made, _height(made, console)

    fixed = [Text(line, no_wrap=True, overflow="ellipsis"), Text(_cost(shown.cost), style="dim")]
    left = None if height is None else height - sum(_height(text, console) for text in fixed)
    sizes = most if left is None else _sizes(most, lambda name, size: part(name, size)[1], left)
    head, *rest = [part(name, size) for name, size in sizes.items() if size or name == "answers"]
    parts = [head[0], *fixed, *[made for made, _ in rest]]
    spare = len(parts) if left is None else left - sum(high for _, high in (head, *rest))
    gap = [Text("")] if spare >= len(parts) else []
    return Group(*[one for part in parts for one in (part, *gap)])


def _sizes(most: Mapping[str, int], height: Callable[[str, int], int], left: int) -> dict[str, int]:
    """What each part grows to within ``left`` lines, in its turn."""
    sizes, grows = dict.fromkeys(most, 0), True
    left -= height("answers", 0)
    while grows:
        grows = False
        for name in TURNS:
            size = sizes[name]
            if size == most[name]:
                continue
            more = height(name, size + 1) - (height(name, size) if size or name == "answers" else 0)
            if more <= left:
                sizes[name], left, grows = size + 1, left - more, True
    return sizes


def _height(part: RenderableType, console: Console) -> int:
    return len(console.render_lines(part, console.options.update(height=None)))


def _head(shown: Snapshot, most: int, width: int) -> Panel:
    told, style = shown.verdict, STYLES[shown.verdict.level]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for question, answer in told.answers if most else ():
        cut = "\n".join(_lines(answer, _room(shown, width), most))
        table.add_row(question, Text(cut, style="bold" if question == "What to do" else ""))
    title = Text(f" {SYMBOLS[told.level]} {told.title} ", style=style)
    return Panel(table, title=title, title_align="left", border_style=style.removeprefix("bold ").strip() or "white")


def _room(shown: Snapshot, width: int) -> int:
    """For an answer, within the frame and beside its question."""
    return max(width - 6 - max((len(question) for question, _ in shown.verdict.answers), default=0), 10)


def _lines(answer: str, room: int, most: int | None = None) -> list[str]:
    return textwrap.wrap(answer, room, max_lines=most, placeholder=" …")


def _curves(shown: Snapshot, most: int, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, values in list(shown.curves.items())[:most]:
        table.add_row(
            Text(name, style="dim"),
            Text(f"{values[-1]:.4g}" if len(values) else "none"),
            sparkline(values, max(width - 34, 16)),
        )
    return table


def sparkline(values: Array, width: int) -> str:
    """``values`` in at most ``width`` characters, each the mean of a stretch; ✕ where one was not finite."""
    if not len(values):
        return ""
    edges = np.unique(np.linspace(0, len(values), min(width, len(values)) + 1).astype(int))[:-1]
    sums = np.add.reduceat(np.asarray(values, dtype=float), edges)
    means = sums / np.diff(np.append(edges, len(values)))
    real = means[np.isfinite(means)]
    low, high = (float(real.min()), float(real.max())) if len(real) else (0.0, 0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[int((x - low) * scale)] if np.isfinite(x) else "✕" for x in means)


def _columns(names: Sequence[str], rows: Sequence[Sequence[Text]], give: Sequence[int], width: int) -> list[Column]:
    """Columns of one line a row, in ``width`` together: the widest of those that can ``give`` are cut first."""
    widths = [max(map(cell_len, (name, *(row[i].plain for row in rows)))) for i, name in enumerate(names)]
    while sum(widths) + len(widths) > width:
        widest = max(give, key=lambda i: widths[i])
        if widths[widest] <= LEAST:
            break
        widths[widest] -= 1
    return [
        Column(name, width=size, no_wrap=True, overflow="ellipsis") for name, size in zip(names, widths, strict=True)
    ]


def _table(columns: Sequence[Column], rows: Sequence[Sequence[Text]], of: int, command: str) -> Group:
    """``rows``, and a line about those of all that are left out: ``command`` has them."""
    table = Table(*columns, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return Group(table, *([Text(f"and {of - len(rows)} more: {command}", style="dim")] if of > len(rows) else []))


def _alarms(shown: Snapshot, most: int, width: int) -> Group:
    names = ("Alarms since", "heard", "what", "where", "how sure")
    rows = []
    for alarm in shown.alarms[:most]:
        style = STYLES["critical" if alarm.severity == "critical" else "warning"]
        cells = (str(alarm.onset), str(alarm.step), alarm.mechanism, where(alarm, shown.sites), alarm.confidence)
        rows.append(
            [Text(cell, style=style if name == "what" else "") for name, cell in zip(names, cells, strict=True)]
        )
    return _table(_columns(names, rows, (2, 3), width), rows, len(shown.alarms), "foreshock alarms")


def _worst(shown: Snapshot, most: int, width: int) -> Group:
    """A law's share of its floor; a judged series' way to the edge of what is expected; and its recent curve."""
    rows = []
    for one in shown.worst[:most]:
        name = "the run" if one.site is None else shown.sites[one.site].name if one.site in shown.sites else one.site
        share = "out" if one.share == np.inf else f"{one.share:.2g}"
        style = "bold red" if one.share > 1 else ""
        rows.append([Text(name), Text(one.metric), Text(f"{one.value:.3g}"), Text(one.limit), Text(share, style=style)])
    columns = _columns(("Nearest to its limit", "metric", "now", "limit", "of it"), rows, (0, 1), width - LEAST)
    left = width - sum((column.width or 0) + 1 for column in columns)
    curves = [Text(sparkline(one.recent, max(min(left, width // 3), 1))) for one in shown.worst[:most]]
    drawn = [[*row, curve] for row, curve in zip(rows, curves, strict=True)]
    return _table([*columns, Column("", no_wrap=True)], drawn, len(shown.worst), "foreshock report")


def _cost(cost: Mapping[str, Any]) -> str:
    if not cost:
        return "what watching costs: not told yet"
    told = [
        f"{part} {cost[part]}" for part in ("wall clock", "sampled steps now", "weight spectra now") if part in cost
    ]
    dearest = [f"{part} {seconds}" for part, seconds in cost.items() if "of the wall clock" in str(seconds)][:2]
    return "what watching costs: " + "; ".join([*dearest, *told])


# By name: what is shown, how many rows or lines an answer, and in how many columns of the terminal.
PARTS: Mapping[str, Callable[[Snapshot, int, int], RenderableType]] = {
    "answers": _head,
    "alarms": _alarms,
    "worst": _worst,
    "curves": _curves,
}
