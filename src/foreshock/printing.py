"""What commands print on a terminal: alarms, comparisons, the ledger, tables, and JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock.monitors.compare import Comparison
    from foreshock.records import Alarm, Coverage


def print_alarms(alarms: Sequence[Alarm]) -> None:
    for alarm in alarms:
        print(f"step {alarm.step} ({alarm.since}) {alarm.severity}: {' '.join(alarm.message.split())}")
    if not alarms:
        print("no alarms")


def print_comparison(comparison: Comparison, alarms: Sequence[Alarm], most: int | None) -> None:
    c = comparison
    first, last = (f"{place:.0f}" for place in c.span)
    print(
        f"{c.run} beside {', '.join(c.references)}: {c.series} series at {c.sites} sites, {c.align} {first} to {last}"
    )
    for text in c.missing:
        print(f"  {text}")
    print("\nAlarms, with the references as baseline:")
    print_alarms(alarms)
    if not c.departures:
        print("\nNo series ends outside the references' band.")
        return
    started = sum(departure.started for departure in c.departures)
    print(f"\n{len(c.departures)} series end outside the references' band, {started} of them from the start (*):")
    rows = [
        [d.metric, d.site or "", d.over, f"{d.first}{'*' * d.started}", _widths(d.end), f"{_widths(d.worst)} at {d.worst_step}",
         d.direction]
        for d in c.departures[:most]
    ]  # fmt: skip
    print_table(("metric", "site", "over", "from step", "widths at the end", "at worst", "direction"), rows)
    if len(rows) < len(c.departures):
        print(f"and {len(c.departures) - len(rows)} more: --all")


def _widths(distance: float) -> str:
    if not math.isfinite(distance):
        return "not finite"
    return f"{distance:+.1f}" if abs(distance) < 1000 else f"{math.copysign(1000, distance):+.0f} or more"


def print_coverage(coverage: Coverage, every: bool) -> None:
    from foreshock.monitors.ledger import beside, summary, table

    rows, footnotes = table(coverage, every=every)
    columns = ("model", "site", "n", "kind", "form", "shape", "logits", "weights", "runs", "laws that hold", "notes")
    models = [row.model for row in rows]
    several = len(set(models)) > 1
    told = iter("" if model == before else model or "?" for model, before in zip(models, [None, *models], strict=False))
    cells = [
        (next(told), row.name, row.sites, row.kind, row.form, row.shape, row.details, row.weights, row.evaluations, row.laws,
         " ".join(f"[{number}]" for number in row.footnotes))
        for row in rows
    ]  # fmt: skip
    if rows:
        first = 0 if several else 1  # a single model goes without saying
        print_table(columns[first:], [[str(cell) for cell in line[first:]] for line in cells])
    for number, text in enumerate(footnotes, 1):
        print(f"[{number}] {text}")
    for title, lines in beside(coverage):
        print(f"\n{title}:")
        for text in lines:
            print(f"  {text}")
    print(f"\n{summary(coverage)}")


def print_table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in columns))
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 200
    Console(markup=False, highlight=False, width=width).print(table)


def print_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
