"""A stored run as the scores need it: judged again by foreshock's defaults, joined to its healthy twin before the fault."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cases import named
from peers import PEERS, Series
from recording import RESULT, Job

import foreshock
from foreshock.errors import ConfigError
from foreshock.reader import Run
from foreshock.rejudge import rejudge


@dataclass(frozen=True)
class Heard:
    """An alarm in plain words; ``site`` is the site's name, "" for the run. ``interval``: steps between which it says it began."""

    step: int
    onset: int
    interval: tuple[int, int]
    mechanism: str
    site: str
    metric: str = ""


@dataclass(frozen=True)
class Outcome:
    """One run. ``losses`` are from step 0 on; ``first`` is the first step that is the run's own. ``peers``: alarms by rule."""

    job: Job
    first: int
    losses: tuple[float, ...]
    heard: tuple[Heard, ...]
    peers: Mapping[str, tuple[int, ...]]
    seconds: float
    text: str
    machine: Mapping[str, str]

    @property
    def steps(self) -> int:
        """Steps that were trained for this run alone."""
        return len(self.losses) - self.first

    def own(self) -> tuple[Heard, ...]:
        """Alarms of its own steps: what came before is the twin's."""
        return tuple(heard for heard in self.heard if heard.step >= self.first)


def outcome(job: Job, out: Path, twin: Job) -> Outcome:
    """Judge what was stored of ``job``. Raises RunError or OSError where it is not there."""
    own, before = _result(job, out), _result(twin, out)
    first = own["first"]
    with ExitStack() as stack:
        folders = [job.folder(out)] if first == 0 else [twin.folder(out), job.folder(out)]
        runs = [stack.enter_context(foreshock.open_run(folder)) for folder in folders]
        names = {site.id: site.name for run in runs for site in run.sites}
        heard = tuple(_heard(alarm, names) for alarm in rejudge(runs))
        recorded = {
            name: _joined([_series(run, name) for run in runs], first) for name in ("logit_max", "load_entropy")
        }
    losses = [*before["losses"][:first], *own["losses"]]
    norms = [*before["grad_norms"][:first], *own["grad_norms"]]
    for name, values in (("loss", losses), ("grad_norm", norms)):
        recorded[name] = np.arange(len(values)), np.array(values, float)
    peers = {peer.name: tuple(peer.alarms({k: v for k, v in recorded.items() if len(v[0])})) for peer in PEERS}
    text, machine = own["text"]["sha256"], own["machine"]
    return Outcome(job, first, tuple(losses), heard, peers, own["seconds"], text, machine)


def _result(job: Job, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.folder(out) / RESULT).read_text())
    return found


def _heard(alarm: foreshock.Alarm, names: Mapping[str, str]) -> Heard:
    low, high = getattr(alarm, "onset_interval", None) or (alarm.onset, alarm.onset)
    site = "" if alarm.site is None else names.get(alarm.site, alarm.site)
    return Heard(alarm.step, alarm.onset, (int(low), int(high)), alarm.mechanism, site, alarm.metric)


METRICS = {"logit_max": ("attention/logit_max", np.max), "load_entropy": ("router/load_entropy", np.min)}


def _series(run: Run, name: str) -> Series:
    """A metric at each sampled step, of the site and head that is worst."""
    metric, fold = METRICS[name]
    try:
        columns = [run.series(metric, site) for site in run.sites_of(metric)]
    except ConfigError:
        return np.zeros(0, np.int64), np.zeros(0)
    worst: dict[int, list[float]] = {}
    for steps, values in columns:
        for step, row in zip(steps.tolist(), values.reshape(len(steps), -1), strict=True):
            known = row[~np.isnan(row)]  # NaN is "not available"
            worst.setdefault(step, []).extend(known.tolist())
    kept = sorted(step for step, values in worst.items() if values)
    return np.array(kept, np.int64), np.array([fold(worst[step]) for step in kept])


def _joined(parts: list[Series], first: int) -> Series:
    """The twin's samples before ``first`` and the run's own from there on."""
    if len(parts) == 1:
        return parts[0]
    (steps, values), (later, more) = parts
    kept: npt.NDArray[np.bool_] = steps < first
    return np.concatenate([steps[kept], later]), np.concatenate([values[kept], more])


def plain(found: Outcome) -> dict[str, Any]:
    """For a JSON file; the losses stay where they are stored."""
    told = {**asdict(found), "group": named(found.job.case).group}
    del told["losses"]
    return told
