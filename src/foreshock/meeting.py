"""Where the ranks of a job find each other before they tell anything: none waits for one that compiles, or has no watch.

A group can only be made by all ranks at once: one that tries it alone holds up the job's training, and counts the groups that torch
makes later otherwise than the others. So each rank counts itself in the key-value store of the job, and trains on. The last one
writes the step at which all begin, a little ahead: ranks that exchange gradients are never further apart than a step.
Who has waited in vain writes that nobody begins, unless the others have agreed meanwhile. What is written first holds for all.
"""

from __future__ import annotations

import time
from typing import Any

from foreshock import _torch
from foreshock.errors import ForeshockError

PATIENCE = 8  # steps that a rank trains on before it waits: others that train with it have come by then
AHEAD = 2  # steps: the next one, before which the other ranks read, and one more
_LOOK = 0.02  # seconds between two looks of a rank that waits
_NOBODY = "nobody"


class Meeting:
    """The first meeting of the ``ranks`` of a job. Meetings of a process are told apart by their order, the same on every rank."""

    _made = 0

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._number = self._first = -1
        self._came = 0.0
        self._counted = False
        self._store: Any = None
        self._error: Exception | None = None
        self._begin: str | None = None

    def begins(self, step: int, timeout: float, last: bool = False) -> bool:
        """Whether this rank is to make the group now, before its optimizer makes ``step``: the same step on all.

        A rank that came `PATIENCE` steps ago waits, until ``timeout`` seconds after it came; where no step is to come (``last``) as
        long from now. Raises ForeshockError where the others do not come, and what the store raises.
        """
        if self._number < 0:
            Meeting._made += 1
            self._number, self._first, self._came = Meeting._made, step, time.monotonic()
        self._look(step)
        if self._begin is None and (last or step - self._first >= PATIENCE):
            self._wait(step, (time.monotonic() if last else self._came) + timeout)
        if self._begin == _NOBODY:
            raise ForeshockError(
                f"after {timeout:g} s not all {self._ranks} ranks had come to their watch; make it on every rank, in the same "
                "order and with the same arguments, or with merge=False to watch one by itself; a larger merge_timeout waits longer"
            )
        return self._begin is not None and (last or step >= int(self._begin))

    def _wait(self, step: int, until: float) -> None:
        while self._begin is None and time.monotonic() < until:
            time.sleep(_LOOK)
            self._look(step)
        if self._begin is None:
            self._write(_NOBODY)
        if self._begin is None and self._error is not None:
            raise self._error

    def _look(self, step: int) -> None:
        """Count this rank, or read what was agreed; after a failure the next look goes through a new connection."""
        if self._begin is not None:
            return
        try:
            if self._store is None:
                self._store = _torch.job_store()
            if not self._counted:
                came = self._store.add(self._key("came"), 1)
                self._counted = True
                if came >= self._ranks:
                    self._write(str(step + AHEAD))
            elif self._store.check([self._key("begin")]):
                self._begin = self._store.get(self._key("begin")).decode()
        except Exception as error:
            self._store, self._error = None, error

    def _write(self, begin: str) -> None:
        try:
            if self._store is None:
                self._store = _torch.job_store()
            self._begin = self._store.compare_set(self._key("begin"), "", begin).decode()
        except Exception as error:
            self._store, self._error = None, error

    def _key(self, what: str) -> str:
        return f"meeting/{self._number}/{what}"
