"""What the scores of many runs come to: by case, by detector, and against the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Any

from cases import HEALTHY_GROUPS, KERNEL, ROUTER, named
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
    """``ahead``: of the fault runs that do damage, how many it heard before. ``delay``: over those it heard at all."""

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
            middle(found.delays[name] for found in hurt),
            sum(found.false_alarms[name] for found in healthy),
            steps,
        )
        for name in DETECTORS
    ]


@dataclass(frozen=True)
class Target:
    """``met`` is None where there is nothing to judge."""

    words: str
    measured: str
    met: bool | None


def _share(words: str, share: Share, least: float) -> Target:
    low, high = share.interval()
    measured = f"{share} = {share.value:.0%} (95 %: {low:.0%} to {high:.0%})" if share.total else "no run"
    return Target(words, measured, share.value >= least if share.total else None)


PRECISE = ("kernel/out-", "kernel/delta-", "kernel/p-", "kernel/k-")


def targets(scores: Sequence[Score]) -> list[Target]:
    """What was promised, what was measured, and whether it was met."""
    sparse = [found for found in scores if found.every == SPARSE]
    dense = [found for found in scores if found.every == 1]
    faults = [found for found in scores if found.group not in (*HEALTHY_GROUPS, "control")]

    def those(runs: Iterable[Score], *prefixes: str) -> list[Score]:
        return [found for found in runs if found.case.startswith(prefixes)]

    def within(limit: int) -> Callable[[Score], bool]:
        return lambda run: run.found and (run.delays[FORESHOCK] or 0) <= limit

    precise = [run for run in those(sparse, *PRECISE) if run.case != "kernel/out-truncated-7"]
    precise_dense = [run for run in those(dense, *PRECISE) if run.case != "kernel/out-truncated-7"]
    calm = [found for found in scores if found.group in HEALTHY_GROUPS]
    steps, alarms = sum(run.steps for run in calm), sum(run.false_alarms[FORESHOCK] for run in calm)
    quiet = [run for run in scores if run.group in (*HEALTHY_GROUPS, "control")]
    wronged = [run for run in quiet if set(run.mechanisms) & set(KERNEL)]
    controls = [run for run in scores if run.group == "control" and set(run.mechanisms) & {*KERNEL, *ROUTER}]
    slow = those(sparse, "kernel/out-away", "kernel/out-truncated-1", "kernel/delta", "kernel/p-")
    jumps = those(sparse, "router/jump", "router/balance", "router/dead-expert")
    return [
        _share("O, P, D, K faults heard within 20 steps at every=1", Share.of(map(within(20), precise_dense)), 1.0),
        _share("the same within 5 samples at every=10", Share.of(map(within(5 * SPARSE), precise)), 1.0),
        _share("and the layer named", Share.of(run.site_right for run in (*precise, *precise_dense)), 1.0),
        Target(
            "no kernel law alarm in healthy, odd and control runs", f"{len(wronged)} of {len(quiet)} runs", not wronged
        ),
        _share("slow attention faults before damage", Share.of(run.ahead(run.damaged) for run in slow), 0.9),
        _share("router step faults within 100 steps", Share.of(map(within(100), jumps)), 1.0),
        _share("router ramps before damage", _ahead(those(sparse, "router/ramp")), 0.8),
        _share(
            "learning-rate ramps before t5s",
            Share.of(run.ahead(run.left) for run in those(sparse, "rate/ramp", "rate/query-key-ramp")),
            0.8,
        ),
        Target(
            "at most 1 false alarm in 100,000 healthy and odd steps",
            f"{alarms} in {steps:,} steps",
            _few(alarms, steps),
        ),
        _share("mechanism right where a fault was heard", Share.of(run.right for run in faults), 0.9),
        Target(
            "no control called a kernel's or a router's fault",
            f"{len(controls)} runs: {', '.join(sorted({run.case for run in controls})) or 'none'}",
            not controls if any(run.group == "control" for run in scores) else None,
        ),
        _share(
            "O truncated to bf16's 7 bits heard within 50 steps",
            Share.of(map(within(50), those(scores, "kernel/out-truncated-7"))),
            1.0,
        ),
        _ahead_of_peers(detector_rows(scores)),
    ]


def _ahead(runs: Sequence[Score]) -> Share:
    return Share.of(run.ahead(run.damaged) for run in runs)


def _few(alarms: int, steps: int) -> bool | None:
    return None if steps < 100_000 and alarms <= 1 else alarms <= max(1, steps // 100_000)


def _ahead_of_peers(rows: Sequence[DetectorRow]) -> Target:
    own, *peers = rows
    better = [
        peer.name
        for peer in peers
        if peer.rate < own.rate or (peer.delay is not None and (own.delay is None or peer.delay < own.delay))
    ]
    words = "ahead of every peer's rule, on delay and on false alarms"
    return Target(words, f"better in one of the two: {', '.join(better) or 'none'}", not better)


def plain(share: Share) -> dict[str, Any]:
    """For a JSON file."""
    return {"hits": share.hits, "total": share.total, "interval": share.interval()}


def notes(scores: Sequence[Score]) -> dict[str, str]:
    """What each case that was scored does."""
    return {name: named(name).note for name in dict.fromkeys(found.case for found in scores)}
