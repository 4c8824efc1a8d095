"""What of a run is kept, and what whoever keeps it can do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from foreshock.config import FAMILIES
from foreshock.errors import ForeshockError
from foreshock.monitors.metrics import family
from foreshock.records import Alarm, Array, Coverage, Reading


class Store(Protocol):
    """Where readings are kept: a run folder, or memory."""

    def write(self, step: int, readings: Sequence[Reading]) -> None: ...
    def rewind(self, step: int) -> None: ...
    def alarm(self, alarm: Alarm) -> None: ...
    def coverage(self, coverage: Coverage) -> None: ...
    def meta(self, **values: Any) -> None: ...
    def flush(self, now: bool = ...) -> None: ...
    def troubles(self) -> list[tuple[str, Exception]]: ...
    def close(self) -> None: ...
    def series(self, metric: str, site: str | None = None) -> tuple[Array, Array]: ...
    def metrics(self) -> list[str]: ...


class Wanted:
    """Whether a metric's family is among ``families``, which are recorded."""

    def __init__(self, families: Collection[str]) -> None:
        self._families = families
        self._verdicts: dict[str, bool] = {}

    def __call__(self, metric: str) -> bool:
        known = self._verdicts.get(metric)
        if known is not None:
            return known
        try:
            of = family(metric)
        except ForeshockError:
            return True  # a user's own metric belongs to no family
        self._verdicts[metric] = of in self._families or of not in FAMILIES  # the latter of a user's own kind of site
        return self._verdicts[metric]
