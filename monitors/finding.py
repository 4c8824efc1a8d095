"""What a detector says, and what monitors and detectors must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from foreshock.records import Reading, Site


@dataclass(frozen=True, slots=True)
class Finding:
    """One series that left what is expected of it, at one step.

    ``direction`` is +1 (too high) or -1 (too low); ``index`` the head or expert; ``score`` how far beyond the detector's own
    limit (1 is at the limit; less is a hint, which alarms nobody but helps to name what does). ``extent``: the share of several
    heads or experts that are out together (0: one alone, or not known). A detector repeats a finding at every sample for as long
    as it holds.
    """

    step: int
    onset: int
    site: str | None
    metric: str
    value: float
    expected: str
    direction: int
    score: float
    index: int | None = None
    extent: float = 0.0


@runtime_checkable
class Monitor(Protocol):
    """Reads what no graph shows (weights, optimizer state) at a sampled step."""

    def update(self, step: int, sites: Sequence[Site]) -> list[Reading]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Detector(Protocol):
    """Judges the readings of one sampled step; deterministic, and resumable through its state."""

    def update(self, step: int, readings: Sequence[Reading], sites: Mapping[str, Site]) -> list[Finding]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
