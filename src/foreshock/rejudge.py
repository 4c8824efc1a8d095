"""Judge a stored run again: what other thresholds, references or a sparser sampling would have said of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from foreshock.collector import rounded
from foreshock.errors import ConfigError
from foreshock.monitors.judge import Judge
from foreshock.monitors.laws import BiasLaw
from foreshock.monitors.metrics import family
from foreshock.monitors.spectra import UPDATE_RATIO
from foreshock.reader import Run
from foreshock.records import Alarm, Reading

POOLED = ("law/bias", "law/bias_t", "law/bias_site", "law/bias_site_t")  # made anew


def rejudge(run: Run, *, every: int | None = None, **options: Any) -> list[Alarm]:
    """The alarms of a `Judge` with ``options`` over all that ``run`` recorded; nothing is written.

    ``every``: take one step in so many, as if the run had been sampled that often; at least its own. With the options of the
    run itself the answer is that of the run: the judge is given what the store keeps.
    """
    judge, bias = Judge(**options), BiasLaw()
    sites = {site.id: site for site in run.sites}
    alarms = []
    for step, readings in _samples(run, every or 1):
        alarms += judge.update(step, [*readings, *rounded(bias.update(step, readings, sites))], sites)
    return alarms


def _samples(run: Run, every: int) -> Iterator[tuple[int, list[Reading]]]:
    """Each judged step with its readings, and with those of weights that came since the one before."""
    by_step: dict[int, list[Reading]] = defaultdict(list)
    judged: set[int] = set()
    for metric in run.metrics():
        if metric in POOLED:
            continue
        for site in run.sites_of(metric):
            steps, values = run.series(metric, site)
            if not _in_turn(metric) and not metric.startswith("run/"):
                judged.update(step for step in steps.tolist() if step % every == 0)
            for step, row in zip(steps.tolist(), values.reshape(len(steps), -1), strict=True):
                by_step[step].append(Reading(metric, site, row))
    waiting: dict[tuple[str, str | None], Reading] = {}
    for step in sorted(by_step):
        waiting |= {(r.metric, r.site): r for r in by_step[step] if _in_turn(r.metric)}
        if step in judged:
            own = [reading for reading in by_step[step] if not _in_turn(reading.metric)]
            yield step, [*own, *waiting.values()]
            waiting = {}


def _in_turn(metric: str) -> bool:
    """Whether a metric is read from the weights at whatever step it is the site's turn."""
    try:
        return metric == UPDATE_RATIO or family(metric) == "spectra"
    except ConfigError:
        return False
