"""From readings to alarms: runs the detectors, remembers what they said, diagnoses, and speaks once.

One alarm per mechanism and site, until it clears (nothing at the site is out any more) or escalates (the loss has left its
trend too).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from foreshock.errors import ConfigError
from foreshock.monitors.budget import STEPS_PER_FALSE_ALARM, Budget
from foreshock.monitors.detectors import Drift, Extrapolation, LawTest, Limits, Moves, NonFinite
from foreshock.monitors.detectors.law_test import tf32
from foreshock.monitors.detectors.references import Run
from foreshock.monitors.diagnosis import Age, Context, Diagnosis, diagnose, key, ripe, symptom
from foreshock.monitors.finding import Detector, Finding
from foreshock.monitors.mechanisms import TABLE, UNKNOWN
from foreshock.monitors.metrics import metric
from foreshock.monitors.policy import TRENDS
from foreshock.monitors.rates import Rates
from foreshock.records import Alarm, Reading, Site, dated

# For so many samples, and so many steps, a finding that is no longer repeated still counts: consequences come later than causes.
MEMORY, MEMORY_STEPS = 20, 200
EXCUSED = 2000  # steps without a broken law after which a kernel that was blamed counts as mended
PATIENCE = 5  # samples that a symptom must last before it is called unknown or blamed on the data
ROWS = (*TABLE, UNKNOWN)
RANK = {"warning": 0, "critical": 1}
PARTS = {"heads": "head", "kv_heads": "key/value head", "experts": "expert"}

Key = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Heard:
    """A finding with its earliest onset and highest score; the score it was last heard with, in how many samples it was heard, and
    the last time in samples and steps."""

    finding: Finding
    score: float
    samples: int
    last: int
    step: int


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
        self._on_error, self._kernel_dtype = on_error, kernel_dtype
        budget = Budget(steps_per_false_alarm)
        self.detectors: tuple[Detector, ...] = (
            Limits(warmup=warmup),
            NonFinite(),
            Moves(),
            LawTest(kernel_dtype, budget),
            Drift(reference=baseline, warmup=warmup, align=align, budget=budget),
            Extrapolation(warmup=warmup, budget=budget),
            *detectors,
        )
        self._heard: dict[tuple[str | None, str, int], Heard] = {}
        self._open: dict[Key, tuple[str, int]] = {}  # severity, and the row
        self._rates = Rates()
        self._blamed: dict[
            str | None, tuple[int, int]
        ] = {}  # a site's kernel: by which row, and the last step of a broken law
        self._samples = 0

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Alarm]:
        """The alarms that are new at this step."""
        self._samples += 1
        self._rates.update(step, readings)
        for detector in self.detectors:
            for finding in self._ask(detector, step, readings, sites):
                self._remember(step, finding)
        self._heard = {
            k: h for k, h in self._heard.items() if self._samples - h.last <= MEMORY or step - h.step <= MEMORY_STEPS
        }
        ages = {k: Age(h.samples, self._samples - h.last) for k, h in self._heard.items()}
        values = {(r.metric, r.site): r.values for r in readings}
        self._excuse(step)
        blamed = {site: position for site, (position, _) in self._blamed.items()}
        context = Context(sites, self._rates.rise, self._rates.since, values, ages, blamed)
        made = diagnose([h.finding for h in self._heard.values()], context, TABLE, UNKNOWN)
        out = [h.finding for h in self._heard.values() if h.score >= 1]
        damaged = any(finding.metric == "run/loss" for finding in out)
        again = {(diagnosis.row.mechanism, diagnosis.site) for diagnosis in made}
        self._open = {
            name: value
            for name, value in self._open.items()
            if name in again or any(name[1] in (None, finding.site) for finding in out)
        }
        alarms = []
        for diagnosis in made:
            if not ripe(diagnosis, context, PATIENCE):
                continue
            name = (diagnosis.row.mechanism, diagnosis.site)
            severity = "critical" if damaged else diagnosis.row.severity
            before = self._open.get(name)
            if (before is None and self._spoken_for(diagnosis)) or (
                before is not None and RANK[severity] <= RANK[before[0]]
            ):
                continue
            beside = [
                f"{mechanism} at {_name(site, sites)}" for mechanism, site in self._open if (mechanism, site) != name
            ]
            self._open[name] = (severity, ROWS.index(diagnosis.row))
            if diagnosis.row.reach == "run":
                self._blamed[diagnosis.site] = (ROWS.index(diagnosis.row), step)
            alarms.append(alarm(step, diagnosis, severity, context, beside))
        return alarms

    @property
    def held_to(self) -> dict[str, Any]:
        """What decides on the floors of laws beside the sites' own dtypes."""
        return {"kernel_dtype": self._kernel_dtype, "tf32": tf32()}

    def _named(self) -> dict[str, Detector]:
        """Each detector by its class, those of one class by their order."""
        names = [type(detector).__name__ for detector in self.detectors]
        return {f"{name} {names[:at].count(name)}": self.detectors[at] for at, name in enumerate(names)}

    def _ask(
        self, detector: Detector, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]
    ) -> Sequence[Finding]:
        try:
            found = list(detector.update(step, readings, sites))
            if strange := [one for one in found if not isinstance(one, Finding)]:
                raise TypeError(f"it returned {type(strange[0]).__name__}; give a list of Finding")
            return found
        except Exception as error:
            if self._on_error is None:
                raise
            self._on_error(f"detector {type(detector).__name__}", error)
            return []

    def _excuse(self, step: int) -> None:
        """A kernel of which no law was heard for long was mended, and may be blamed anew."""
        broken = {h.finding.site for h in self._heard.values() if h.finding.metric.startswith("law/")}
        for site, (position, last) in list(self._blamed.items()):
            if site in broken:
                self._blamed[site] = (position, step)
            elif step - last > EXCUSED:
                del self._blamed[site]

    def _spoken_for(self, diagnosis: Diagnosis) -> bool:
        """An open alarm further up the table speaks for what it explains, at its site or as far as its consequences reach; and a
        kernel that was blamed once is not blamed again for less."""
        row, lead = diagnosis.row, symptom(diagnosis.findings[0])
        if row.independent:
            return False
        blamed, _ = self._blamed.get(diagnosis.site, (len(ROWS), 0))
        if ROWS.index(row) > blamed and row.reach == "run" and lead in (*ROWS[blamed].leads, *ROWS[blamed].explains):
            return True
        for (_, site), (_, position) in self._open.items():
            other = ROWS[position]
            if row.reach == "run" and other.reach != "run":
                continue  # what came once does not excuse a kernel that goes on
            explained = not row.leads or lead in (*other.leads, *other.explains)
            if position < ROWS.index(row) and explained and (site in (None, diagnosis.site) or other.reach == "run"):
                return True
        return False

    def _remember(self, step: int, finding: Finding) -> None:
        before = self._heard.get(key(finding))
        now, samples = finding.score, 1
        if before is not None:
            again = before.last == self._samples  # several detectors, or folds, of one series
            early = min(before.finding, finding, key=lambda one: one.onset)
            samples = before.samples + (not again)
            now = max(now, before.score) if again else now
            score = max(before.finding.score, finding.score)
            finding = before.finding if again and before.score > finding.score else finding
            finding = replace(finding, onset=early.onset, onset_interval=early.onset_interval, score=score)
        self._heard[key(finding)] = Heard(finding, now, samples, self._samples, step)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: findings as dictionaries, detectors by name, rows of the table by position."""
        return {
            "tables": _fingerprint(),
            "detectors": {n: one.state_dict() for n, one in self._named().items() if hasattr(one, "state_dict")},
            "heard": [[asdict(h.finding), h.score, h.samples, h.last, h.step] for h in self._heard.values()],
            "open": [[*name, *value] for name, value in self._open.items()],
            "blamed": [[site, *value] for site, value in self._blamed.items()],
            "rates": self._rates.state_dict(),
            "samples": self._samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. What another version saved is left, as its tables may mean other things: judging starts anew."""
        if state.get("tables") != _fingerprint():
            error = ConfigError(
                "restoring the judge: it was saved by another version of foreshock; judging starts anew"
            )
            if self._on_error is None:
                raise error
            self._on_error("restoring the judge", error)
            return
        for name, detector in self._named().items():
            if name in state["detectors"]:
                detector.load_state_dict(state["detectors"][name])
        heard = [Heard(_finding(plain), *rest) for plain, *rest in state["heard"]]
        self._heard = {key(h.finding): h for h in heard}
        self._open = {(mechanism, site): (severity, position) for mechanism, site, severity, position in state["open"]}
        self._blamed = {site: (position, last) for site, position, last in state["blamed"]}
        self._rates.load_state_dict(state["rates"])
        self._samples = state["samples"]


def _fingerprint() -> str:
    """Tells one version's rows and trends from another's, whose positions mean something else."""
    named = [*((row.mechanism, row.leads) for row in ROWS), *((trend.metric, trend.fold) for trend in TRENDS)]
    return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


def _finding(plain: Mapping[str, Any]) -> Finding:
    return Finding(**{**plain, "onset_interval": tuple(plain["onset_interval"])})


def alarm(step: int, diagnosis: Diagnosis, severity: str, context: Context, beside: Sequence[str] = ()) -> Alarm:
    """The diagnosis as a record: the leading finding's numbers, everybody's evidence, and what to do.

    ``beside`` names the alarms that are open already.
    """
    lead, row = diagnosis.findings[0], diagnosis.row
    led = [f for f in diagnosis.findings if f is lead or (f.score >= row.least and symptom(f) in row.leads)]
    first = min(led, key=lambda finding: finding.onset)
    low, high = first.onset_interval
    evidence = [describe(finding, context.sites) for finding in diagnosis.findings]
    if "learning rate" in row.mechanism and context.lr_rise > 1:
        evidence.append(f"optim/lr rose to {context.lr_rise:.3g} times the highest that the run was healthy with")
    evidence += [f"at the same time: {other}" for other in beside]
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
        confidence=diagnosis.confidence,
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


def _name(site: str | None, sites: Mapping[str, Site]) -> str:
    if site is None:
        return "the run"
    known = sites.get(site)
    return site if known is None else known.name or known.id


def _where(finding: Finding, sites: Mapping[str, Site]) -> str:
    name = _name(finding.site, sites)
    if finding.index is None or finding.site is None:
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
