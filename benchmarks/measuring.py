"""How benchmarks measure: ratios of interleaved blocks with intervals, peak memory, and where they ran.

Time is the processor's (`time.process_time`): with one thread it is the step time of a machine that does nothing else.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Work = Callable[[], Any]
FEW = 5  # rounds; below them a bootstrap's interval is no such thing (of 3 it holds the truth in 74 % of trials, of 5 in 95 %)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and an interval: that of 95 % of its bootstrap, or the range of few ``rounds``."""

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    @property
    def words(self) -> str:
        """What stands in the brackets."""
        return "95 % of the bootstrap" if self.rounds >= FEW else f"the range of {self.rounds} rounds"


def interleaved(variants: Mapping[str, tuple[Work, int]], rounds: int) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds a step of each variant's block ``(step, steps)`` in each round; the order turns from round to round."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            step, steps = variants[name]
            start = time.process_time()
            for _ in range(steps):
                step()
            taken[name].append((time.process_time() - start) / steps)
    return {name: np.array(values) for name, values in taken.items()}


def ratio(mine: np.ndarray[Any, Any], base: np.ndarray[Any, Any], draws: int = 2000) -> Ratio:
    """Of medians; rounds are drawn again in pairs, for what disturbs a round disturbs both. Of few rounds all are kept."""
    middle, rounds = float(np.median(mine) / np.median(base)), len(mine)
    if rounds < FEW:
        return Ratio(middle, float((mine / base).min()), float((mine / base).max()), rounds)
    drawn = np.random.default_rng(0).integers(len(mine), size=(draws, len(mine)))
    spread = np.median(mine[drawn], 1) / np.median(base[drawn], 1)
    low, high = np.quantile(spread, (0.025, 0.975))
    return Ratio(middle, float(low), float(high), rounds)


def processor_seconds() -> float:
    """Of this process and the compilers it has waited for."""
    return sum(os.times()[:4])


def peak_bytes(work: Work) -> int:
    """The most that ``work`` held at a time beyond what was held before: the allocator's own account, on CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    moved = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([0, *(nbytes for _, nbytes in moved)]).max())


def where() -> dict[str, str]:
    """The machine, the versions and the day."""
    cpu = next((x for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.processor())
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": cpu.rpartition(":")[2].strip(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write(name: str, found: Any, folder: str | None) -> None:
    """``<folder>/<name>.json`` with what was found and where."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"where": where(), "found": found}, indent=1, default=lambda x: vars(x))
        (Path(folder) / f"{name}.json").write_text(text + "\n")
