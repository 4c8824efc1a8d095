"""From readings to alarms: runs the detectors, remembers what they said, diagnoses, and speaks once.

One alarm per mechanism and site, until it clears (nothing at the site is out any more) or escalates (the loss has left its
trend too).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from foreshock.errors import ConfigError
from foreshock.monitors.budget import STEPS_PER_FALSE_ALARM, Budget
from foreshock.monitors.detectors import Drift, Extrapolation, LawTest, Limits, NonFinite
from foreshock.monitors.detectors.references import Run
from foreshock.monitors.diagnosis import TABLE, UNKNOWN, Context, Diagnosis, diagnose
from foreshock.monitors.finding import Detector, Finding
from foreshock.monitors.metrics import metric
from foreshock.records import Alarm, Reading, Site, dated

MEMORY = 20  # samples for which a finding that is no longer repeated still counts: consequences come later than causes
PATIENCE = 5  # samples that a symptom must last before it is called unknown or blamed on the data
RATES = 200  # samples of the learning rate that its rise is measured over
ORDER = {row.mechanism: place for place, row in reversed(list(enumerate((*TABLE, UNKNOWN))))}
RANK = {"warning": 0, "critical": 1}
PARTS = {"heads": "head", "kv_heads": "key/value head", "experts": "expert"}

Key = tuple[str, str | None]


class Judge:
    """``update`` once a sampled step. ``baseline``: recorded healthy runs. ``detectors``: a user's own, beside the built-in ones.

    ``warmup``: steps before drift and settled limits are judged (the learning rate's own rise is waited for in any case).
    ``on_error`` receives what a detector raises, and the others go on; without it the error is raised.
    ``kernel_dtype``: the precision that attention kernels are meant to store in, where it is not that of their inputs.
    ``steps_per_false_alarm``: the budget of all tests together. ``align``: to the baseline, at the same "step" or "tokens".
    """

    def __init__(
        self,
        baseline: Sequence[Run] = (),
        *,
        warmup: int = 0,
        kernel_dtype: str | None = None,
        detectors: Sequence[Detector] = (),
        on_error: Callable[[str, Exception], None] | None = None,
        steps_per_false_alarm: int = STEPS_PER_FALSE_ALARM,
        align: str = "step",
    ) -> None:
        self._on_error = on_error
        budget = Budget(steps_per_false_alarm)
        self.detectors: tuple[Detector, ...] = (
            Limits(warmup=warmup),
            NonFinite(),
            LawTest(kernel_dtype, budget),
            Drift(reference=baseline, warmup=warmup, align=align, budget=budget),
            Extrapolation(warmup=warmup, budget=budget),
            *detectors,
        )
        self._heard: dict[
            tuple[str | None, str, int], tuple[Finding, int, int]
        ] = {}  # last, first heard, samples since
        self._open: dict[Key, str] = {}
        self._rates: deque[float] = deque(maxlen=RATES)
        self._warm = False
        self._samples = 0

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Alarm]:
        """The alarms that are new at this step."""
        self._samples += 1
        self._watch_rate(readings)
        for detector in self.detectors:
            for finding in self._ask(detector, step, readings, sites):
                self._remember(finding)
        self._heard = {key: entry for key, entry in self._heard.items() if self._samples - entry[2] <= MEMORY}
        rise = self._rates[-1] / min(self._rates) if self._rates and min(self._rates) > 0 else 1.0
        context = Context(sites, rise)
        diagnoses = [d for d in diagnose([entry[0] for entry in self._heard.values()], context) if self._ripe(d)]
        out = [finding for finding, _, _ in self._heard.values() if finding.score >= 1]
        damaged = any(finding.metric == "run/loss" for finding in out)
        self._open = {key: value for key, value in self._open.items() if any(key[1] in (None, f.site) for f in out)}
        alarms = []
        for diagnosis in diagnoses:
            key = (diagnosis.row.mechanism, diagnosis.site)
            severity = "critical" if damaged else diagnosis.row.severity
            before = self._open.get(key)
            if (before is None and self._spoken_for(key)) or (before is not None and RANK[severity] <= RANK[before]):
                continue
            self._open[key] = severity
            alarms.append(alarm(step, diagnosis, severity, context))
        return alarms

    def _ask(
        self, detector: Detector, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]
    ) -> Sequence[Finding]:
        try:
            return detector.update(step, readings, sites)
        except Exception as error:
            if self._on_error is None:
                raise
            self._on_error(f"detector {type(detector).__name__}", error)
            return []

    def _spoken_for(self, key: Key) -> bool:
        """An open alarm speaks for every mechanism further down the table, at its site or, if it is the run's, everywhere."""
        return any(ORDER[name] < ORDER[key[0]] and site in (None, key[1]) for name, site in self._open)

    def _watch_rate(self, readings: Sequence[Reading]) -> None:
        rate = next((float(r.values.max()) for r in readings if r.metric == "optim/lr"), None)
        if rate is None:
            return
        self._warm = self._warm or (bool(self._rates) and rate <= self._rates[-1])
        if not self._warm:
            self._rates.clear()
        self._rates.append(rate)

    def _remember(self, finding: Finding) -> None:
        key = (finding.site, finding.metric, finding.direction)
        last, first, _ = self._heard.get(key, (finding, self._samples, 0))
        early = last if last.onset < finding.onset else finding
        merged = replace(
            finding, onset=early.onset, onset_interval=early.onset_interval, score=max(last.score, finding.score)
        )
        self._heard[key] = (merged, first, self._samples)

    def _ripe(self, diagnosis: Diagnosis) -> bool:
        if not diagnosis.row.patient:
            return True
        entries = [self._heard[f.site, f.metric, f.direction] for f in diagnosis.findings]
        return any(last - first >= PATIENCE for _, first, last in entries)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: findings as dictionaries, detectors by position."""
        return {
            "detectors": [detector.state_dict() for detector in self.detectors],
            "heard": [[asdict(finding), first, last] for finding, first, last in self._heard.values()],
            "open": [[*key, severity] for key, severity in self._open.items()],
            "clock": [list(self._rates), self._warm, self._samples],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for detector, saved in zip(self.detectors, state["detectors"], strict=False):
            detector.load_state_dict(saved)
        heard = [(_finding(plain), first, last) for plain, first, last in state["heard"]]
        self._heard = {(entry[0].site, entry[0].metric, entry[0].direction): entry for entry in heard}
        self._open = {(mechanism, site): severity for mechanism, site, severity in state["open"]}
        rates, self._warm, self._samples = state["clock"]
        self._rates = deque(rates, maxlen=RATES)


def _finding(plain: Mapping[str, Any]) -> Finding:
    return Finding(**{**plain, "onset_interval": tuple(plain["onset_interval"])})


def alarm(step: int, diagnosis: Diagnosis, severity: str, context: Context) -> Alarm:
    """The diagnosis as a record: the leading finding's numbers, everybody's evidence, and what to do."""
    lead, row = diagnosis.findings[0], diagnosis.row
    first = min((finding for finding in diagnosis.findings if finding.score >= 1), key=lambda finding: finding.onset)
    low, high = first.onset_interval
    evidence = [describe(finding, context.sites) for finding in diagnosis.findings]
    if "learning rate" in row.mechanism and context.lr_rise > 1:
        evidence.append(f"optim/lr rose to {context.lr_rise:.3g} times its lowest since the warm-up")
    message = f"{row.mechanism} at {_where(lead, context.sites)}: {row.says}. {evidence[0]}. {row.advice}"
    axis = _axis(lead.metric)
    return Alarm(
        step=step,
        onset=min(first.onset, step),
        site=lead.site,
        metric=lead.metric,
        value=lead.value,
        expected=lead.expected,
        severity=severity,
        mechanism=row.mechanism,
        evidence=tuple(evidence),
        message=message,
        head=lead.index if axis in ("heads", "kv_heads") else None,
        expert=lead.index if axis == "experts" else None,
        onset_interval=(min(low, step), min(high, step)),
    )


def describe(finding: Finding, sites: Mapping[str, Site]) -> str:
    """One line of evidence, with its numbers."""
    value = "not finite" if not math.isfinite(finding.value) else f"{finding.value:.3g}"
    since = dated(finding.onset, finding.onset_interval)
    return f"{finding.metric} at {_where(finding, sites)} is {value}, expected {finding.expected}; {since}"


def _where(finding: Finding, sites: Mapping[str, Site]) -> str:
    if finding.site is None:
        return "the run"
    site = sites.get(finding.site)
    name = finding.site if site is None else site.name or site.id
    if finding.index is None:
        return name
    axis = _axis(finding.metric)
    return (
        f"{name} {axis.split(',')[finding.index]}"
        if "," in axis
        else f"{name} {PARTS.get(axis, 'entry')} {finding.index}"
    )


def _axis(name: str) -> str:
    """What a metric's values run over; a user's own metric has no entry in the table."""
    try:
        return metric(name).axis
    except ConfigError:
        return ""
