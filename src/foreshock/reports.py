"""What foreshock has to say of itself: each thing once, in the log and in the ledger."""

from __future__ import annotations

import logging

_log = logging.getLogger("foreshock")


class Reports:
    """``lines``: all that was said. ``strict``: failures are raised."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._told: dict[str, str] = {}

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(self._told.values())

    def fail(self, what: str, error: Exception) -> None:
        """``what`` failed inside foreshock, and training goes on; raises ``error`` under ``strict``."""
        if self._strict:
            raise error
        if what not in self._told:
            try:
                told = str(error)
            except Exception:
                told = "an error that cannot say what it is"
            self._told[what] = f"{what}: {type(error).__name__}: {told}"
            _log.warning("%s (training goes on)", self._told[what])

    def note(self, told: str, about: str = "") -> None:
        """Something to know that is no failure; what is said ``about`` the same thing later takes its place in the ledger."""
        key = about or told
        if self._told.get(key) != told:
            self._told[key] = told
            _log.warning("%s", told)
