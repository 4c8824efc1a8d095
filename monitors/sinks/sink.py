"""What a sink is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from foreshock.records import Alarm, Reading


@runtime_checkable
class Sink(Protocol):
    """Receives every alarm and the readings of every sampled step; an error in a sink never reaches training.

    All three are called between two steps, on the thread that trains: what waits for a network or a disk is a `QueuedSink`.
    """

    def alarm(self, alarm: Alarm) -> None: ...

    def readings(self, step: int, readings: Sequence[Reading]) -> None: ...

    def close(self) -> None: ...
