"""What the scores of many runs come to, by case and by detector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from cases import HEALTHY_GROUPS, named
from peers import PEERS
from plan import SPARSE
from scoring import FORESHOCK, Score

DETECTORS = (FORESHOCK, *(peer.name for peer in PEERS))


@dataclass(frozen=True)
class Share:
    """``hits`` of ``total``, with the interval in which the true share lies with 95 % confidence (Wilson's score interval)."""

    hits: int
    total: int

    @classmethod
    def of(cls, answers: Iterable[bool | None]) -> Share:
        """Of the answers that are not None."""
        known = [answer for answer in answers if answer is not None]
        return cls(sum(known), len(known))

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else float("nan")

    def interval(self) -> tuple[float, float]:
        if not self.total:
            return 0.0, 1.0
        z, n, share = NormalDist().inv_cdf(0.975), self.total, self.value
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        return f"{self.hits}/{self.total}" if self.total else ""


def middle(values: Iterable[int | None]) -> float | None:
    """The median of those that are there."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _middle_of_all(values: Sequence[int | None]) -> float | None:
    """The median where None is beyond every number; None if it is that, or if there is nothing."""
    found = median([float("inf") if value is None else value for value in values]) if values else float("inf")
    return None if found == float("inf") else found


@dataclass(frozen=True)
class CaseRow:
    """One case on one model at one sampling; medians are over the runs that have a value."""

    case: str
    subject: str
    every: int
    found: Share
    delay: float | None
    damaged: float | None
    ahead: Share
    lead: float | None
    left: float | None
    lead_left: float | None
    right: Share
    right_ever: Share
    site_right: Share
    onset_error: float | None
    within: Share
    named: str


def case_rows(scores: Sequence[Score], group: str) -> list[CaseRow]:
    """The rows of a group's table, in the order of the cases."""
    rows: dict[tuple[str, str, int], list[Score]] = {}
    for found in scores:
        if found.group == group:
            rows.setdefault((found.case, found.subject, found.every), []).append(found)
    return [_case_row(*key, runs) for key, runs in rows.items()]


def _case_row(case: str, subject: str, every: int, runs: Sequence[Score]) -> CaseRow:
    names = [run.mechanism for run in runs if run.mechanism is not None]
    return CaseRow(
        case=case,
        subject=subject,
        every=every,
        found=Share.of(run.found for run in runs),
        delay=middle(run.delays[FORESHOCK] for run in runs),
        damaged=middle(run.damaged for run in runs),
        ahead=Share.of(run.ahead(run.damaged) for run in runs),
        lead=middle(run.lead(run.damaged) for run in runs),
        left=middle(run.left for run in runs),
        lead_left=middle(run.lead(run.left) for run in runs),
        right=Share.of(run.right for run in runs),
        right_ever=Share.of(run.right_ever for run in runs),
        site_right=Share.of(run.site_right for run in runs),
        onset_error=middle(run.onset_error for run in runs),
        within=Share.of(run.within for run in runs),
        named=", ".join(f"{name} {names.count(name)}" for name in dict.fromkeys(names)),
    )


@dataclass(frozen=True)
class DetectorRow:
    """``ahead``: of the fault runs that do damage, how many it heard before. ``delay``: the median over
    all of them, one that it never heard being the longest; None where that is most of them."""

    name: str
    ahead: Share
    ahead_of_band: Share
    delay: float | None
    false_alarms: int
    steps: int

    @property
    def rate(self) -> float:
        """False alarms per 10,000 healthy steps."""
        return 1e4 * self.false_alarms / self.steps if self.steps else float("nan")


def detector_rows(scores: Sequence[Score]) -> list[DetectorRow]:
    """Foreshock first, then the peers, over the runs sampled sparsely."""
    sparse = [found for found in scores if found.every == SPARSE]
    healthy = [found for found in sparse if found.group in HEALTHY_GROUPS]
    hurt = [found for found in sparse if found.damaged is not None and found.group != "control"]
    steps = sum(found.steps for found in healthy)
    return [
        DetectorRow(
            name,
            Share.of(found.ahead(found.damaged, name) for found in hurt),
            Share.of(found.ahead(found.left, name) for found in hurt),
            _middle_of_all([found.delays[name] for found in hurt]),
            sum(found.false_alarms[name] for found in healthy),
            steps,
        )
        for name in DETECTORS
    ]


def notes(scores: Sequence[Score]) -> dict[str, str]:
    """What each case that was scored does."""
    return {name: named(name).note for name in dict.fromkeys(found.case for found in scores)}
