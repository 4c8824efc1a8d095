"""Which cases are trained on which seeds, for how long: the three tiers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from cases import CASES, Case
from recording import TWIN, Job

REPORTING, TUNING = 1, 100  # first seeds: thresholds may be chosen on those from 100 up, reports are of those from 1 up
SPARSE, DENSE = 10, 1  # sampled one step in so many
STRIDE = 10  # runs end on a sampled step's eve


@dataclass(frozen=True)
class Tier:
    """Steps: where faults start (``at``), where runs end (``steps``), and how many recordings at every step take from there.

    Seeds: how many of the healthy run, of each other from-scratch run, of each odd run, and of each fault. ``only``: patterns of
    cases; ``subjects``: of models.
    """

    at: int
    steps: int
    each_step: int
    each_step_healthy: int
    healthy: int
    odd: int
    faults: int
    only: tuple[str, ...] = ("*",)
    subjects: tuple[str, ...] = ("moe", "dense")


SMOKE = (
    "healthy/constant",
    "odd/no-clipping",
    "kernel/out-away-1",
    "kernel/delta-away-0",
    "rate/jump",
    "data/garbage-100",
)
TIERS = {
    "smoke": Tier(180, 280, 20, 20, healthy=2, odd=1, faults=1, only=SMOKE, subjects=("moe",)),
    "standard": Tier(400, 1600, 60, 300, healthy=12, odd=3, faults=3),
    "full": Tier(400, 1600, 60, 600, healthy=24, odd=8, faults=8),
}


def plan(
    tier: Tier, seeds: str = "reporting", only: Iterable[str] = ("*",), subjects: Sequence[str] = ()
) -> tuple[Job, ...]:
    """Every run of a tier, the healthy twins of all others among them. ``only``: shell patterns of case names."""
    first = {"reporting": REPORTING, "tuning": TUNING}[seeds]
    wanted = [case for case in CASES if _any(case.name, tier.only) and _any(case.name, only)]
    jobs: dict[Job, None] = {}
    for subject in subjects or tier.subjects:
        for case in wanted:
            if subject not in case.subjects and not (tier.only == SMOKE and case.group in ("rate", "data")):
                continue
            for seed in range(first, first + _count(case, tier)):
                for job in _jobs(case, subject, seed, tier):
                    jobs |= {job: None} if job.scratch else {job.twin(tier.steps): None, job: None}
    return tuple(jobs)


def _count(case: Case, tier: Tier) -> int:
    if case.name == TWIN:
        return tier.healthy
    return tier.odd if case.group in ("healthy", "odd", "control") else tier.faults


def _jobs(case: Case, subject: str, seed: int, tier: Tier) -> list[Job]:
    length = tier.steps - tier.at
    end = tier.steps if case.scratch else tier.at + math.ceil(case.until * length / STRIDE) * STRIDE
    jobs = [Job(subject, case.name, seed, tier.at, end, SPARSE)]
    if case.group in ("kernel", "control"):
        jobs.append(Job(subject, case.name, seed, tier.at, tier.at + tier.each_step, DENSE))
    elif case.name == TWIN and seed % 100 < 1 + tier.faults:
        jobs.append(Job(subject, case.name, seed, tier.at, tier.at + tier.each_step_healthy, DENSE))
    return jobs


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
