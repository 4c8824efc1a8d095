"""Judge a stored run again: what other thresholds, references or a sparser sampling would have said of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from foreshock.monitors.judge import Judge
from foreshock.monitors.laws import BiasLaw
from foreshock.monitors.spectra import in_turn
from foreshock.pending import rounded
from foreshock.reader import Run
from foreshock.records import Alarm, Reading

POOLED = ("law/bias", "law/bias_t", "law/bias_site", "law/bias_site_t", "law/bias_samples")  # made anew


def rejudge(run: Run | Sequence[Run], *, every: int | None = None, **options: Any) -> list[Alarm]:
    """The alarms of a `Judge` with ``options`` over all that ``run`` recorded; nothing is written.

    Several runs are read one after the other, each until the next one's first step: a run and what was resumed from it.

    ``every``: take one step in so many, as if the run had been sampled that often; at least its own. With the options of the
    run itself the answer is that of the run: the judge is given what the store keeps.
    """
    runs = [run] if isinstance(run, Run) else list(run)
    judge, bias = Judge(**options), BiasLaw()
    sites = {site.id: site for one in runs for site in one.sites}
    alarms = []
    for step, readings in _samples(runs, every or 1):
        alarms += judge.update(step, [*readings, *rounded(bias.update(step, readings, sites))], sites)
    return alarms


def _samples(runs: Sequence[Run], every: int) -> Iterator[tuple[int, list[Reading]]]:
    """Each judged step with its readings, and with those of weights that came since the one before."""
    by_step: dict[int, list[Reading]] = {}
    judged: set[int] = set()
    for run in runs:
        own, sampled = _recorded(run)
        start = min(own, default=math.inf)
        by_step = {step: readings for step, readings in by_step.items() if step < start} | own
        judged = {step for step in judged if step < start} | {step for step in sampled if step % every == 0}
    waiting: dict[tuple[str, str | None], Reading] = {}
    for step in sorted(by_step):
        waiting |= {(r.metric, r.site): r for r in by_step[step] if in_turn(r.metric)}
        if step in judged:
            direct = [reading for reading in by_step[step] if not in_turn(reading.metric)]
            yield step, [*direct, *waiting.values()]
            waiting = {}


def _recorded(run: Run) -> tuple[dict[int, list[Reading]], set[int]]:
    """What a run holds for the judge, by step, and the steps that were sampled."""
    by_step: dict[int, list[Reading]] = defaultdict(list)
    sampled: set[int] = set()
    for metric in run.metrics():
        if metric in POOLED:
            continue
        for site in run.sites_of(metric):
            steps, values = run.series(metric, site)
            if not in_turn(metric) and not metric.startswith("run/"):
                sampled.update(steps.tolist())
            for step, row in zip(steps.tolist(), values.reshape(len(steps), -1), strict=True):
                by_step[step].append(Reading(metric, site, row))
    return dict(by_step), sampled
