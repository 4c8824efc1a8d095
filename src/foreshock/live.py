"""``foreshock watch``: a run in the terminal while it is written, until q or Ctrl-C; printed once where there is no terminal."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from foreshock.errors import RunError
from foreshock.following import Following
from foreshock.monitors.ledger import where
from foreshock.monitors.report_limits import bands
from foreshock.monitors.report_worst import Standing, worst
from foreshock.monitors.verdict import Verdict, in_order, verdict
from foreshock.reader import Run
from foreshock.records import Alarm, Array, Site

try:
    import termios
    import tty
except ImportError:  # Windows: q is not heard, Ctrl-C is
    termios = tty = None  # type: ignore[assignment]

EVERY = 1.0  # seconds between two looks, at least
BARS = "▁▂▃▄▅▆▇█"
STYLES = {"critical": "bold red", "warning": "bold yellow", "good": "bold green", "unknown": "bold"}
SYMBOLS = {"critical": "▲", "warning": "◆", "good": "●", "unknown": "○"}
CURVES = ("run/loss", "optim/lr", "optim/grad_norm")
ALARMS = 5  # the newest, on the screen


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


def snapshot(run: Run) -> Snapshot:
    """All that the view shows, from one open run."""
    sites, alarms, steps = {site.id: site for site in run.sites}, in_order(run.alarms), run.steps
    keys = set(run.columns())
    curves = {name: run.column(name, None)[1][:, 0] for name in CURVES if (name, None) in keys}
    found = worst(run, sites, bands(run))
    return Snapshot(
        run.name, verdict(alarms, sites, steps), alarms, sites, steps, found, curves, run.meta.get("cost", {})
    )


def watch(path: str, *, once: bool = False, every: float = EVERY, console: Console | None = None) -> int:
    """Show the run at ``path`` until q or Ctrl-C; once, if so asked or where there is no terminal. The exit code."""
    console = Console() if console is None else console
    following = Following(path)
    if once or not console.is_terminal:
        console.print(view(following.look(snapshot), following, None, console.width))
        return 0
    following.exists()
    shown: Snapshot | None = None
    with (
        suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(console=console, screen=True, auto_refresh=False) as screen,
    ):
        version, progress, told = "", Progress(), Text("waiting for the run's first flush")
        while True:
            if following.version != version:
                version = following.version
                try:
                    shown = following.look(snapshot)
                    progress.note(int(shown.steps[-1]) if len(shown.steps) else 0)
                except RunError as error:  # not yet there, or being moved aside
                    told = Text(str(error), style="yellow")
            screen.update(told if shown is None else view(shown, following, progress.pace, console.width), refresh=True)
            if pressed(following.rest(every)):
                break
    if shown is not None:  # the screen is as it was before; what it said last stays
        console.print(Text(f"{shown.name}: {shown.verdict.title}"))
    return 0


class Progress:
    """Steps a second, over the last half minute of looks."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def note(self, step: int) -> None:
        now = time.monotonic()
        self._seen = [(at, before) for at, before in self._seen if now - at < 30 and before <= step] + [(now, step)]

    @property
    def pace(self) -> float | None:
        (first, low), (last, high) = self._seen[0], self._seen[-1]
        return (high - low) / (last - first) if last > first else None


def view(shown: Snapshot, following: Following, pace: float | None, width: int) -> Group:
    """The whole view. Texts from the run are plain: nothing in them is markup."""
    parts: list[Any] = [_head(shown), _progress(shown, following, pace), _curves(shown, width)]
    if shown.alarms:
        parts.append(_alarms(shown))
    if shown.worst:
        parts.append(_worst(shown, width))
    parts.append(Text(_cost(shown.cost), style="dim"))
    return Group(*parts)


def _head(shown: Snapshot) -> Panel:
    told, style = shown.verdict, STYLES[shown.verdict.level]
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim")
    lines.add_column()
    for question, answer in told.answers:
        lines.add_row(question, Text(answer, style="bold" if question == "What to do" else ""))
    title = Text(f" {SYMBOLS[told.level]} {told.title} ", style=style)
    return Panel(lines, title=title, title_align="left", border_style=style.removeprefix("bold ").strip() or "white")


def _progress(shown: Snapshot, following: Following, pace: float | None) -> Text:
    written = following.written
    parts = [shown.name, f"step {shown.steps[-1]}" if len(shown.steps) else "no step yet"]
    if pace:
        parts.append(f"{pace:.3g} steps/s")
    if following.log.exists():
        parts.append(f"last written {_ago(written)}" if written is not None else "")
    else:
        parts.append("closed by its writer")
    return Text(" · ".join(parts))


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 5400 else f"{seconds / 3600:.0f} h ago"


def _curves(shown: Snapshot, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, values in shown.curves.items():
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


def _alarms(shown: Snapshot) -> Table:
    columns = ("since", "heard", "what", "where", "how sure")
    table = Table(*columns, title="Alarms", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for alarm in shown.alarms[:ALARMS]:
        style = STYLES["critical" if alarm.severity == "critical" else "warning"]
        cells = (str(alarm.onset), str(alarm.step), alarm.mechanism, where(alarm, shown.sites), alarm.confidence)
        table.add_row(
            *(Text(cell) for cell in cells[:2]), Text(cells[2], style=style), *(Text(cell) for cell in cells[3:])
        )
    if len(shown.alarms) > ALARMS:
        table.add_row("", "", Text(f"and {len(shown.alarms) - ALARMS} more: foreshock alarms", style="dim"), "", "")
    return table


def _worst(shown: Snapshot, width: int) -> Table:
    title = "Nearest to their limits: laws to their floors, others to the edge of what is expected"
    columns = [
        Column(name, no_wrap=True, min_width=least)
        for name, least in (("site", 8), ("metric", 22), ("now", 6), ("limit", 6))
    ]
    columns += [Column("of it", no_wrap=True, min_width=4), Column("", no_wrap=True, min_width=8)]
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for one in shown.worst:
        name = "the run" if one.site is None else shown.sites[one.site].name if one.site in shown.sites else one.site
        share = "out" if one.share == np.inf else f"{one.share:.2g}"
        style = "bold red" if one.share > 1 else ""
        cells = (Text(name), Text(one.metric), Text(f"{one.value:.3g}"), Text(one.limit), Text(share, style=style))
        table.add_row(*cells, sparkline(one.recent, max(width // 2 - 32, 8)))
    return table


def _cost(cost: Mapping[str, Any]) -> str:
    if not cost:
        return "what watching costs: not told yet"
    told = [
        f"{part} {cost[part]}" for part in ("wall clock", "sampled steps now", "weight spectra now") if part in cost
    ]
    dearest = [f"{part} {seconds}" for part, seconds in cost.items() if "of the wall clock" in str(seconds)][:2]
    return "what watching costs: " + "; ".join([*dearest, *told])


@contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key, and says whether it was q."""
    if termios is None or not sys.stdin.isatty():
        yield lambda seconds: threading.Event().wait(seconds)  # which nobody sets
        return
    source = sys.stdin.fileno()
    before = termios.tcgetattr(source)

    def pressed(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([source], [], [], left)[0] and os.read(source, 1) in (b"q", b"Q", b""):
                return True
        return False

    try:
        tty.setcbreak(source)
        yield pressed
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
