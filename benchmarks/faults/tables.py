"""The scores as tables: of words alone, so that a terminal and a Markdown file show the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cases import CASES, HEALTHY_GROUPS
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scoring import FORESHOCK, Score
from summary import case_rows, detector_rows
from targets import targets

TITLES = {
    "kernel": "Kernel faults",
    "rate": "Learning rate",
    "logits": "Attention logits",
    "router": "Router",
    "weights": "Weights and optimizer state",
    "loop": "Training loop",
    "data": "Data",
    "several": "Several at once",
    "control": "Controls: alarms are allowed, but of no kernel and no router",
}


@dataclass(frozen=True)
class Words:
    """A table: its title, its columns, its rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Table:
        table = Table(*self.columns, title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", _row(self.columns), _row(["---"] * len(self.columns)), *map(_row, self.rows)]
        return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def all_tables(scores: Sequence[Score]) -> list[Words]:
    """A table for each group that was run, the false alarms one by one, the detectors, the targets."""
    groups = dict.fromkeys(case.group for case in CASES)
    faults = [_group(scores, group) for group in groups if group not in HEALTHY_GROUPS]
    return [*(table for table in faults if table.rows), _quiet(scores), _detectors(scores), _targets(scores)]


def _group(scores: Sequence[Score], group: str) -> Words:
    """``mechanism``: the first alarm names an accepted one; ``later``: some alarm does. Delays, leads and clocks are medians."""
    columns = (
        *("case", "model", "every", "found", "delay", "damage at", "before", "lead"),
        *("t5s", "lead t5s", "mechanism", "later", "site", "onset error", "in interval", "first named"),
    )
    rows = [
        (
            *(row.case.split("/")[1], row.subject, str(row.every), str(row.found), _number(row.delay)),
            *(_number(row.damaged), str(row.ahead), _number(row.lead), _number(row.left), _number(row.lead_left)),
            *(
                str(row.right),
                str(row.right_ever),
                str(row.site_right),
                _number(row.onset_error),
                str(row.within),
                row.named,
            ),
        )
        for row in case_rows(scores, group)
    ]
    return Words(TITLES.get(group, group), columns, tuple(rows))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _quiet(scores: Sequence[Score]) -> Words:
    """Healthy and odd runs by case, and what was said in them."""
    rows = []
    for case, subject, every in dict.fromkeys(
        (s.case, s.subject, s.every) for s in scores if s.group in HEALTHY_GROUPS
    ):
        runs = [s for s in scores if (s.case, s.subject, s.every) == (case, subject, every)]
        steps, count = sum(run.steps for run in runs), sum(run.false_alarms[FORESHOCK] for run in runs)
        said = "; ".join(
            f"seed {run.seed} step {run.at + (run.delays[FORESHOCK] or 0)}: {', '.join(run.mechanisms)}"
            for run in runs
            if run.found
        )
        rows.append(
            (case, subject, str(every), str(len(runs)), f"{steps:,}", str(count), f"{1e4 * count / steps:.2f}", said)
        )
    columns = ("case", "model", "every", "runs", "steps", "alarms", "per 10,000 steps", "which")
    return Words("Healthy and odd runs: every alarm is false", columns, tuple(rows))


def _detectors(scores: Sequence[Score]) -> Words:
    rows = [
        (
            row.name,
            str(row.ahead),
            str(row.ahead_of_band),
            "never" if row.delay is None else _number(row.delay),
            str(row.false_alarms),
            f"{row.rate:.2f}",
        )
        for row in detector_rows(scores)
    ]
    columns = ("detector", "before damage", "before t5s", "median delay", "false alarms", "per 10,000 steps")
    steps = next((row.steps for row in detector_rows(scores)), 0)
    return Words(f"Detectors, over the faults that do damage and {steps:,} healthy steps", columns, tuple(rows))


def _targets(scores: Sequence[Score]) -> Words:
    answer = {True: "met", False: "missed", None: "too little to say"}
    rows = tuple((target.words, target.measured, answer[target.met]) for target in targets(scores))
    return Words("Targets", ("target", "measured", ""), rows)
