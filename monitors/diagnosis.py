"""From joint symptoms to mechanisms: how a table of signatures is read. The table itself is `foreshock.monitors.mechanisms`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from foreshock.monitors.finding import Finding
from foreshock.records import Array, Site

PROVED, LIKELY, POSSIBLE = "proved", "likely", "possible"
Evidence = Sequence[Finding]


@dataclass(frozen=True, slots=True)
class Age:
    """In how many samples a finding was heard, from the first to the last of them, and how many have gone by since."""

    samples: int = 1
    quiet: int = 0


@dataclass(frozen=True, slots=True)
class Context:
    """What a row may ask beyond the symptoms: the sites; how far and since when the learning rate is above the highest that the
    run was healthy with; this sample's readings by (metric, site); how old each finding is; and the row that blamed the kernel of
    a site earlier in the run."""

    sites: Mapping[str, Site]
    lr_rise: float = 1.0
    lr_since: int | None = None
    readings: Mapping[tuple[str, str | None], Array] = field(default_factory=dict)
    ages: Mapping[tuple[str | None, str, int], Age] = field(default_factory=dict)
    blamed: Mapping[str | None, int] = field(default_factory=dict)

    def share(self, findings: Evidence, kind: str) -> float:
        """Share of the sites of a kind among which the findings are."""
        of_kind = {site.id for site in self.sites.values() if site.kind == kind}
        return len({finding.site for finding in findings} & of_kind) / max(len(of_kind), 1)

    def age(self, finding: Finding) -> Age:
        return self.ages.get(key(finding), Age())

    def typical(self, metric: str, findings: Evidence) -> float:
        """The median over the heads of ``metric`` at the findings' site; NaN where it was not read."""
        values = self._read(metric, findings)
        return float(np.median(values)) if len(values) else math.nan

    def largest(self, metric: str, findings: Evidence) -> float:
        """The largest over the heads of ``metric`` at the findings' site; zero where it was not read."""
        values = self._read(metric, findings)
        return float(values.max()) if len(values) else 0.0

    def dtype(self, findings: Evidence) -> str:
        """The dtype of the findings' site; nothing where it is not known."""
        found = (self.sites.get(finding.site) for finding in findings if finding.site is not None)
        return next((site.dtype for site in found if site is not None), "")

    def _read(self, metric: str, findings: Evidence) -> Array:
        site = next((finding.site for finding in findings if finding.site is not None), None)
        values = self.readings.get((metric, site), np.zeros(0))
        return values[np.isfinite(values)]


Condition = Callable[[Evidence, Context], bool]


@dataclass(frozen=True, slots=True)
class Row:
    """``leads`` (any one) makes the row's case if ``condition`` agrees and there is not so much as a hint of ``unless``;
    ``explains`` are taken along as its consequences.

    ``when`` an alarm may be raised: "now"; "confirmed", heard in two samples or at most heads of the site at once, as a fault of
    hardware is not; "lasting", for something better may explain it meanwhile.
    """

    mechanism: str
    leads: tuple[str, ...]
    explains: tuple[str, ...]
    scope: str  # "site" | "run": where leads are gathered, and what an alarm stands for
    severity: str
    source: str
    says: str
    advice: str
    condition: Condition = lambda evidence, context: True
    when: str = "now"
    unless: tuple[str, ...] = ()
    reach: str = "site"  # "site" | "run": how far its consequences go
    independent: bool = False  # its cause is seen by itself, so that no other alarm speaks for it
    least: float = 1.0  # the score that a lead must have: less where the cause is seen by itself


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A mechanism with the findings that make its case, the leading one first."""

    row: Row
    site: str | None
    findings: tuple[Finding, ...]

    @property
    def confidence(self) -> str:
        """ "proved" by an identity or a value that is not finite; "likely" if two symptoms agree; else "possible"."""
        out = {symptom(finding) for finding in self.findings if finding.score >= 1}
        if any(name.startswith("law/") or name == "nonfinite" for name in out):
            return PROVED
        return LIKELY if len(out) > 1 and self.row.leads else POSSIBLE


def key(finding: Finding) -> tuple[str | None, str, int]:
    """What makes two findings one: the same series left on the same side."""
    return finding.site, finding.metric, finding.direction


def symptom(finding: Finding) -> str:
    """The metric and the side it left on; every non-finite value is one symptom."""
    if finding.metric.endswith("nonfinite") or not np.isfinite(finding.value):
        return "nonfinite"
    return finding.metric + ("+" if finding.direction > 0 else "-")


def diagnose(findings: Evidence, context: Context, table: Sequence[Row], unknown: Row) -> list[Diagnosis]:
    """Every mechanism that the findings make a case for; each finding leads in at most one, and hints lead in none.

    What no row of ``table`` explains, at a site or a run where none made a case, is ``unknown``.
    """
    left = sorted(findings, key=lambda f: (f.onset, f.step, f.metric, f.site or ""))
    made: list[Diagnosis] = []
    for row in table:
        here = [diagnosis for place in _places(row, left) if (diagnosis := _case(row, place, left, context))]
        made += here
        taken = {id(f) for diagnosis in here for f in diagnosis.findings}
        consequences = row.explains if here and row.reach == "run" else ()
        left = [f for f in left if id(f) not in taken and symptom(f) not in consequences]
    known = {diagnosis.site for diagnosis in made}
    strangers = [] if None in known else [f for f in left if f.site not in known and f.score >= 1]
    places = dict.fromkeys(f.site for f in strangers)
    return made + [Diagnosis(unknown, place, tuple(f for f in strangers if f.site == place)) for place in places]


def _places(row: Row, findings: Evidence) -> Sequence[str | None]:
    return list(dict.fromkeys(f.site for f in findings if symptom(f) in row.leads)) if row.scope == "site" else [None]


def _case(row: Row, place: str | None, findings: Evidence, context: Context) -> Diagnosis | None:
    here = [f for f in findings if row.scope == "run" or f.site in (place, None)]
    leads = [
        f for f in here if symptom(f) in row.leads and f.score >= row.least and (row.scope == "run" or f.site == place)
    ]
    if not leads or any(symptom(f) in row.unless for f in here) or not row.condition(here, context):
        return None
    lead = max(leads, key=lambda f: min(f.score, 1e9))
    others = [f for f in here if f is not lead and symptom(f) in (*row.leads, *row.explains)]
    return Diagnosis(row, place, (lead, *others))


def ripe(diagnosis: Diagnosis, context: Context, patience: int) -> bool:
    """Whether the row's ``when`` has come; ``patience`` is how many samples are lasting."""
    ages = [context.age(finding).samples for finding in diagnosis.findings if finding.score >= diagnosis.row.least]
    if diagnosis.row.when == "lasting":
        return any(samples > patience for samples in ages)
    if diagnosis.row.when == "confirmed":
        leads = [f for f in diagnosis.findings if symptom(f) in diagnosis.row.leads and f.score >= diagnosis.row.least]
        return any(context.age(f).samples > 1 or f.extent > 0.5 for f in leads)
    return True
