"""Faults that really hurt small models, and what foreshock and the usual rules make of each.

    python benchmarks/faults [--tier smoke|standard|full] [--out DIR] [--jobs 2] [--seeds reporting|tuning] [--only GLOB ...]

First every run is recorded (`cases` says which, `training` how): a healthy one from scratch for each seed, and from its checkpoint
each fault, so that both are equal bit for bit until the fault starts. A run that was recorded to its end is not recorded again.
Then the stored runs are judged and scored (`scoring`, `peers`), which ``--score-only`` does alone; tables are printed and
written to the out folder as ``scores.json`` and ``report.md``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from plan import TIERS, plan
from recording import Job, finished, record
from report import report
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def record_all(jobs: Sequence[Job], out: Path, pool: Executor, console: Console) -> None:
    """Record what is missing: the runs from scratch first, then what is forked from them."""
    missing = [job for job in jobs if not finished(job, out)]
    total = sum(job.cost for job in missing)
    console.print(f"{len(jobs)} runs, {len(missing)} to record: {total:,} steps")
    columns = TextColumn("{task.description:>44}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,} steps")
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("compiling", total=total)
        for scratch in (True, False):
            futures = {pool.submit(record, job, out): job for job in missing if job.scratch is scratch}
            for future in as_completed(futures):
                future.result()
                job = futures[future]
                progress.update(task, advance=job.cost, description=f"{job.subject} {job.case} seed {job.seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=TIERS, default="standard")
    parser.add_argument("--out", type=Path, default=Path("build/faults"), help="folder of runs and report")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--seeds", choices=("reporting", "tuning"), default="reporting")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="GLOB", help="cases, by shell patterns of their names"
    )
    parser.add_argument(
        "--subjects", nargs="+", default=[], choices=("moe", "dense"), help="models; the tier's own if not given"
    )
    parser.add_argument("--list", action="store_true", help="print the runs and train nothing")
    parser.add_argument("--score-only", action="store_true", help="judge what is recorded, and record nothing")
    options = parser.parse_args()
    console = Console()
    jobs = plan(TIERS[options.tier], options.seeds, options.only, options.subjects)
    if options.list:
        for job in jobs:
            console.print(job, soft_wrap=True)
        console.print(f"{len(jobs)} runs, {sum(job.cost for job in jobs):,} steps")
        return
    pool = ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        if not options.score_only:
            record_all(jobs, options.out, pool, console)
        report(jobs, TIERS[options.tier], options.seeds, options.out, pool, console)
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
