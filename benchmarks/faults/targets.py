"""What was promised, what was measured, and whether it was met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cases import HEALTHY_GROUPS, KERNEL, ROUTER
from plan import SPARSE
from scoring import FORESHOCK, Score
from summary import DetectorRow, Share, detector_rows


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


BF16 = "kernel/out-truncated-7"
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

    precise = [run for run in those(sparse, *PRECISE) if run.case != BF16]
    precise_dense = [run for run in those(dense, *PRECISE) if run.case != BF16]
    calm = [found for found in scores if found.group in HEALTHY_GROUPS]
    steps, alarms = sum(run.steps for run in calm), sum(run.false_alarms[FORESHOCK] for run in calm)
    quiet = [run for run in scores if run.group in (*HEALTHY_GROUPS, "control")]
    wronged = [run for run in quiet if set(run.mechanisms) & set(KERNEL)]
    controls = [run for run in scores if run.group in ("control", "data") and set(run.mechanisms) & {*KERNEL, *ROUTER}]
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
            "no control and no data fault called a kernel's or a router's",
            f"{len(controls)} runs: {', '.join(sorted({run.case for run in controls})) or 'none'}",
            not controls if any(run.group in ("control", "data") for run in scores) else None,
        ),
        *(
            _share(
                f"O truncated to bf16's 7 bits heard within 50 steps at every={every}",
                Share.of(map(within(50), runs)),
                1.0,
            )
            for every, runs in ((1, those(dense, BF16)), (SPARSE, those(sparse, BF16)))
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
