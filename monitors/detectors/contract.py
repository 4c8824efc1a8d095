"""What every test of series offers: many series at once, one pass of NumPy an update, no loop over them.

Shapes: S series, in columns that may be appended from one update to the next and never move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from foreshock.records import Array


@runtime_checkable
class SeriesTest(Protocol):
    """A test of S series, deterministic, whose state is plain JSON values and continues bit for bit.

    What is not finite is missing: it enters no baseline and changes nothing of its series. An adapter (`Detector`) gives a test its
    columns, and makes findings of what it says.
    """

    def update(self, step: int, x_S: Array) -> None:
        """Take one sample of each series."""

    @property
    def score(self) -> Array:
        """float ``[S]``: 1 is at the limit."""

    @property
    def direction(self) -> Array:
        """int ``[S]``: +1 too high, -1 too low."""

    @property
    def onset(self) -> Array:
        """int ``[S]``: the step at which each excursion most likely began; -1 where there was no sample yet."""

    @property
    def onset_interval(self) -> Array:
        """int ``[S, 2]``: the change came after the first of these steps (still healthy) and not after the second."""

    @property
    def expected(self) -> Array:
        """float ``[S]``: what was expected at the last update; NaN where nothing was."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Baseline(Protocol):
    """What healthy series are expected to be: a test's yardstick."""

    def expect(self, step: int, series: int) -> tuple[Array, Array]:
        """Middle and spread of each of ``series`` columns at ``step``, float ``[S]``; NaN where it is not known."""

    def learn(self, step: int, x_S: Array, calm_S: Array) -> None:
        """Take the sample that came. ``calm_S``, bool: no excursion is under way."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
