"""From stored runs to numbers: was the fault heard, how soon, how far ahead of the damage, and was the answer right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from cases import HEALTHY_GROUPS, Case, named
from clocks import damage, leaves_band
from outcome import Heard, Outcome
from recording import TWIN

FORESHOCK = "foreshock"


@dataclass(frozen=True)
class Score:
    """One run's numbers, all in steps. ``delays``: by detector, of its first alarm after the fault, None where it was silent.

    ``damaged`` and ``left`` count from step 0, and are asked only where the case says that it damages. ``right``: whether the
    mechanism that the first alarm names is accepted; ``right_ever``: whether that of any is. ``site_right``: None where any site is
    right. ``onset_error``: estimated onset minus true. ``within``: the fault's start lies in the interval that the alarm gives.
    ``false_alarms``: by detector, how many in the run's own steps if it is healthy.
    """

    subject: str
    case: str
    group: str
    seed: int
    every: int
    at: int
    steps: int
    delays: Mapping[str, int | None]
    damaged: int | None
    left: int | None
    mechanism: str | None
    right: bool | None
    right_ever: bool | None
    site: str | None
    site_right: bool | None
    onset_error: int | None
    within: bool | None
    false_alarms: Mapping[str, int]
    mechanisms: tuple[str, ...]

    @property
    def found(self) -> bool:
        return self.delays[FORESHOCK] is not None

    def lead(self, clock: int | None, detector: str = FORESHOCK) -> int | None:
        """Steps from the detector's first alarm to the clock; None without either."""
        delay = self.delays[detector]
        return None if clock is None or delay is None else clock - self.at - delay

    def ahead(self, clock: int | None, detector: str = FORESHOCK) -> bool | None:
        """Whether the detector spoke before the clock; None without a clock."""
        lead = self.lead(clock, detector)
        return None if clock is None else lead is not None and lead > 0


def score(run: Outcome, twin: Outcome | None, others: Sequence[Sequence[float]] = ()) -> Score:
    """The numbers of one run. ``twin``: the healthy run of its seed; ``others``: losses of the other healthy seeds."""
    case, job = named(run.job.case), run.job
    faulty = case.group not in HEALTHY_GROUPS
    clocked = faulty and case.damages
    heard = tuple(alarm for alarm in run.own() if alarm.step >= job.at or not faulty)
    first = heard[0] if heard else None
    steps = {FORESHOCK: [alarm.step for alarm in heard]}
    steps |= {name: [step for step in alarms if step >= run.first] for name, alarms in run.peers.items()}
    return Score(
        subject=job.subject,
        case=job.case,
        group=case.group,
        seed=job.seed,
        every=job.every,
        at=job.at,
        steps=run.steps,
        delays={name: found[0] - job.at if found else None for name, found in steps.items()},
        damaged=damage(run.losses, twin.losses) if clocked and twin is not None else None,
        left=leaves_band(run.losses, others, job.at) if clocked else None,
        mechanism=first.mechanism if first else None,
        right=first.mechanism in case.accepted if first and faulty else None,
        right_ever=any(alarm.mechanism in case.accepted for alarm in heard) if heard and faulty else None,
        site=first.site if first else None,
        site_right=_site_right(case, first),
        onset_error=first.onset - job.at if first and faulty else None,
        within=first.interval[0] <= job.at <= first.interval[1] if first and faulty else None,
        false_alarms={} if faulty else {name: len(found) for name, found in steps.items()},
        mechanisms=tuple(dict.fromkeys(alarm.mechanism for alarm in heard)),
    )


def _site_right(case: Case, first: Heard | None) -> bool | None:
    return None if first is None or case.sites is None else fnmatch(first.site, case.sites)


def score_all(outcomes: Sequence[Outcome]) -> list[Score]:
    """Every run against its twin, and against the healthy runs of other seeds."""
    healthy = {(o.job.subject, o.job.seed): o for o in outcomes if o.job.case == TWIN and o.first == 0}
    scores = []
    for run in outcomes:
        key = (run.job.subject, run.job.seed)
        others = [o.losses for (subject, seed), o in healthy.items() if subject == key[0] and seed != key[1]]
        scores.append(score(run, healthy.get(key), others))
    return scores
