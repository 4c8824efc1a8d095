"""The one tree of errors. A message says what was being done, what was received, and what to do."""

from __future__ import annotations


class ForeshockError(Exception):
    """Base of every error that foreshock raises itself."""


class ConfigError(ForeshockError, ValueError):
    """A setting, metric, monitor or pattern that does not exist or has a wrong value."""


class RunError(ForeshockError):
    """A run folder or store that is missing, not a store, or damaged."""


class CheckpointError(ForeshockError):
    """A saved checkpoint that is missing, damaged, or not of the model it is read as."""


class PatternError(ForeshockError, ValueError):
    """A user's pattern that cannot be used as written."""


class AlarmRaised(ForeshockError):  # noqa: N818 - an alarm is the event; the name is read in tracebacks
    """Raised by ``on_alarm="raise"``; ``alarm`` holds the finding."""

    def __init__(self, alarm: object) -> None:
        super().__init__(str(getattr(alarm, "message", alarm)))
        self.alarm = alarm
