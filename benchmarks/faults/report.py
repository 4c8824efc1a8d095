"""Scores every stored run, prints the tables, and writes ``scores.json`` and ``report.md``."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from clocks import RULES
from outcome import Outcome, outcome, plain
from peers import PEERS
from plan import Tier
from recording import Job, finished
from rich.console import Console
from rich.progress import track
from scoring import Score, score_all
from summary import notes
from tables import Words, all_tables
from targets import targets

import foreshock


def report(jobs: Sequence[Job], tier: Tier, seeds: str, out: Path, pool: Executor, console: Console) -> list[Score]:
    """Judge, score, print, write. Runs that are not recorded are left out, and said to be."""
    there = [job for job in jobs if finished(job, out) and finished(job.twin(tier.steps), out)]
    if not there:
        console.print(f"nothing is recorded in {out}; run without --score-only first")
        return []
    futures = [pool.submit(outcome, job, out, job.twin(tier.steps)) for job in there]
    outcomes = [future.result() for future in track(futures, "judging", console=console)]
    scores = score_all(outcomes)
    tables = all_tables(scores)
    for table in tables:
        console.print(table.rich())
    console.print(RULES)
    facts = _facts(outcomes, len(jobs), tier, seeds)
    (out / "scores.json").write_text(
        json.dumps(
            {
                "facts": facts,
                "targets": [asdict(target) for target in targets(scores)],
                "scores": [asdict(found) for found in scores],
                "runs": [plain(found) for found in outcomes],
            },
            indent=1,
            default=str,
        )
    )
    (out / "report.md").write_text(_markdown(facts, tables, scores))
    console.print(f"written: {out / 'scores.json'}, {out / 'report.md'}", soft_wrap=True)
    return scores


def _facts(outcomes: Sequence[Outcome], planned: int, tier: Tier, seeds: str) -> dict[str, Any]:
    """What a reader needs to know to believe the tables, or to repeat them."""
    own = [found.job.seed for found in outcomes]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "runs": f"{len(outcomes)} of {planned} planned, {sum(found.steps for found in outcomes):,} steps",
        "steps": f"runs of {tier.steps}, faults from {tier.at} on",
        "seeds": f"{seeds} ({min(own)} to {max(own)}): thresholds may be chosen on seeds from 100 up, and never on those below",
        "text sha256": ", ".join(sorted({found.text for found in outcomes})),
        "foreshock": foreshock.__version__,
        "recorded with": ", ".join(sorted({", ".join(f"{k} {v}" for k, v in o.machine.items()) for o in outcomes})),
        "judged with": f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}",
        "time": f"{sum(found.seconds for found in outcomes) / 60:.0f} core minutes of training",
    }


def _markdown(facts: dict[str, Any], tables: Sequence[Words], scores: Sequence[Score]) -> str:
    parts = ["# Fault zoo", "", *(f"- {name}: {value}" for name, value in facts.items()), "", RULES, ""]
    parts += [table.markdown() for table in tables]
    parts += ["## Cases", "", *(f"- `{name}`: {note}" for name, note in notes(scores).items()), ""]
    parts += ["## Peers' rules", "", *(f"- {peer.name}: {peer.source}" for peer in PEERS), ""]
    return "\n".join(parts)
