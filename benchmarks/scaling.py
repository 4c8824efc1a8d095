"""How time grows with the size of the graph, the number of sites in it, the number of series and the length of the run.

    python benchmarks/scaling.py [--quick] [--json FOLDER]

Processor seconds, each table with its slope on log axes over the larger half of its sizes, four at least, half a decade apart; a
slope above 1.1 is a miss. Graphs are those of `benchmarks/matching.py`: their sites grow with their nodes, or alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matching import by_size
from measuring import where, write
from rich.console import Console
from rich.table import Table

from foreshock.monitors.report import write_report
from foreshock.reader import open_run
from foreshock.records import Reading
from foreshock.store import RunStore

STEEPEST = 1.1
OPEN, READ = 1.0, 0.1  # seconds to open a run, and to read one series of it
FEWEST = 4  # sizes that a slope is taken of
NODES = 20_000  # of graphs that differ by their sites alone
FLUSHED = 1000  # records a flush here; a watch flushes each, as they come


def halves(least: float, largest: float) -> list[int]:
    """Sizes half a decade apart."""
    first, last = (round(2 * np.log10(size)) for size in (least, largest))
    return [round(10 ** (power / 2)) for power in range(first, last + 1)]


def seconds(work: Callable[[], Any]) -> float:
    """Of the processor, once."""
    start = time.process_time()
    work()
    return time.process_time() - start


def slope(sizes: Sequence[float], taken: Sequence[float]) -> float:
    """On log axes, over the larger half."""
    half = max(FEWEST, (len(sizes) + 1) // 2)
    return float(np.polyfit(np.log(sizes[-half:]), np.log(np.maximum(taken[-half:], 1e-6)), 1)[0])


def shown(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[float]], sloped: Sequence[int]
) -> Any:
    """Print rows whose first column is a size; ``sloped`` are columns that may grow no faster than it."""
    table = Table(*columns, title=title)
    for first, *others in rows:
        table.add_row(f"{first:,.0f}", *(f"{x:,.0f}" if x >= 1000 or x == int(x) else f"{x:.3g}" for x in others))
    console.print(table)
    slopes = {columns[i]: slope([row[0] for row in rows], [row[i] for row in rows]) for i in sloped}
    for name, found in slopes.items():
        console.print(f"  slope of {name}: {found:.2f}{'' if found <= STEEPEST else f'  MISSED (<= {STEEPEST})'}")
    return {"columns": columns, "rows": rows, "slopes": slopes}


def graphs(console: Console, largest: int) -> Any:
    """Finding sites and rewriting, up to ``largest`` nodes."""
    rows = by_size([(size, None) for size in halves(100, largest)])
    return shown(console, "graphs", ("nodes", "sites", "matching s", "rewriting s"), rows, (2, 3))


def sites(console: Console, largest: int) -> Any:
    """The same with 1 to ``largest`` sites among as many nodes."""
    nodes = NODES * largest // 1000
    rows = [(found, *rest) for _, found, *rest in by_size([(nodes, size) for size in halves(1, largest)])]
    columns = ("sites", "matching s", "rewriting s")
    return shown(console, f"sites among {nodes:,} nodes", columns, rows, (1, 2))


def series(console: Console, largest: int) -> Any:
    """One record of so many series of one number, written, flushed, and one of them read."""
    rows = []
    for size in halves(1000, largest):
        readings = [Reading(f"metric/{i % 100}", f"site{i // 100}", np.array([0.5])) for i in range(size)]
        with tempfile.TemporaryDirectory() as folder:
            store = RunStore(folder)
            store.write(0, readings)
            first = seconds(store.flush)
            store.write(1, readings)
            second = seconds(store.flush)
            store.close()
            with open_run(folder) as run:
                read = seconds(lambda run=run: run.series("metric/7", "site3"))
        rows.append((size, first, second, read))
    return shown(console, "series", ("series", "first record s", "next record s", "read one s"), rows, (1, 2))


def lengths(console: Console, largest: int) -> Any:
    """A run of 16 series, 8 numbers each for half of them, as it grows to so many records: written, opened, read, reported."""
    rows, written, filling = list[tuple[float, ...]](), 0, 0.0
    random = np.random.default_rng(0)

    def fill(folder: str, first: int, last: int) -> None:
        store = RunStore(folder)
        for flushed in range(first, last, FLUSHED):
            for step, numbers in enumerate(random.standard_normal((min(FLUSHED, last - flushed), 16, 8)), flushed):
                readings = [Reading(f"metric/{i}", "site", row[: 8 if i % 2 else 1]) for i, row in enumerate(numbers)]
                store.write(step, readings)
            store.flush()
        store.close()

    with tempfile.TemporaryDirectory() as folder:
        for size in halves(1000, largest):
            filling += seconds(partial(fill, folder, written, size))
            written = size
            bytes_each = sum(file.stat().st_size for file in Path(folder).glob("run.sqlite*")) / (size * (8 * 8 + 8))
            opening = seconds(lambda: open_run(folder).close())
            with open_run(folder) as run:
                one, eight = (seconds(lambda run=run, m=m: run.series(m, "site")) for m in ("metric/0", "metric/1"))
                page = Path(folder) / "report.html"
                reporting = seconds(lambda run=run, page=page: write_report(run, page))
                megabytes = page.stat().st_size / 1e6
            rows.append((size, filling, bytes_each, opening, one, eight, reporting, megabytes))
    columns = ("records", "write s", "bytes a number", "open s", "read 1 s", "read 8 s", "report s", "report MB")
    found = shown(console, "run length", columns, rows, (1, 4, 5, 6))
    for name, value, most in (
        ("open", rows[-1][3], OPEN),
        ("read 1", rows[-1][4], READ),
        ("read 8", rows[-1][5], READ),
    ):
        told = "met" if value <= most else "MISSED: thousands of chunks are inflated and joined"
        console.print(f"  {name} at {rows[-1][0]:,} records: {value:.3f} s of {most} s, {told}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of every size")
    parser.add_argument("--json", metavar="FOLDER")
    options = parser.parse_args()
    console, tenth = Console(width=120), 10 if options.quick else 1
    console.print(" ".join(f"{key} {value}" for key, value in where().items()))
    found = {
        "graphs": graphs(console, 100_000 // tenth),
        "sites": sites(console, 1000 // tenth),
        "series": series(console, 1_000_000 // tenth),
        "lengths": lengths(console, 1_000_000 // tenth),
    }
    write("scaling", found, options.json)


if __name__ == "__main__":
    main()
