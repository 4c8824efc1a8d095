"""Alarms as log lines."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from foreshock.records import Alarm, Reading

log = logging.getLogger("foreshock")
LEVELS = {"critical": logging.CRITICAL, "warning": logging.WARNING}


class ConsoleSink:
    """One log line an alarm, through the logger ``foreshock``."""

    def alarm(self, alarm: Alarm) -> None:
        log.log(LEVELS.get(alarm.severity, logging.WARNING), "step %d: %s", alarm.step, alarm.message)

    def readings(self, step: int, readings: Sequence[Reading]) -> None:
        """Readings are too many for a console."""

    def close(self) -> None:
        """Nothing is held open."""
