"""A sink that is slow without slowing training: its work is done by a thread of its own, behind a queue with an end.

Nothing is opened before the first reading or alarm comes, so that ranks which another one speaks for leave nothing behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from foreshock.errors import RunError
from foreshock.monitors.sinks.selection import Selection
from foreshock.records import Alarm, Reading

MOST_WAITING = 256  # sampled steps
PATIENCE = 30.0  # seconds that `close` waits for the rest to be sent


class QueuedSink:
    """Base of sinks that write or send. A subclass says how to ``_open``, ``_send`` a step's readings, ``_tell`` an alarm and
    ``_finish``; all of that runs on one thread, in the order in which it came.

    What fails there is raised by the next call, where the watch reports it, and the next step is tried again. Where more than
    `MOST_WAITING` steps wait, the oldest readings are left out, which is reported likewise; alarms never are. ``selection.points``
    makes curves of readings, and counts what is not finite, also in those left out.
    """

    patience = PATIENCE

    def __init__(self) -> None:
        self.selection = Selection()
        self._waiting: deque[Alarm | tuple[int, Sequence[Reading]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._opened = self._closing = False
        self._error: Exception | None = None
        self._left_out = 0

    def alarm(self, alarm: Alarm) -> None:
        """Leave ``alarm`` to the thread."""
        self._put(alarm)

    def readings(self, step: int, readings: Sequence[Reading]) -> None:
        """Leave the readings of ``step`` to the thread."""
        self._put((step, readings))

    def close(self) -> None:
        """Have the rest sent, and let go. Raises RunError if that takes longer than ``patience`` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(self.patience)
            if self._thread.is_alive():
                left = len(self._waiting)
                raise RunError(f"closing {self}: not done after {self.patience:g} s; {left} entries were not sent")
        self._raise()

    def _open(self) -> None:
        """Called once, before the first of the others."""

    def _send(self, step: int, readings: Sequence[Reading]) -> None:
        raise NotImplementedError

    def _tell(self, alarm: Alarm) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        """Called last, if `_open` went well."""

    def __str__(self) -> str:
        return type(self).__name__

    # -- on the thread that trains -------------------------------------------------------------------------------------

    def _put(self, entry: Alarm | tuple[int, Sequence[Reading]]) -> None:
        with self._changed:
            self._waiting.append(entry)
            if len(self._waiting) > MOST_WAITING:
                self._trim()
            self._changed.notify()
        if self._thread is None:
            self._start()
        self._raise()

    def _trim(self) -> None:
        readings = [entry for entry in self._waiting if not isinstance(entry, Alarm)]
        if len(readings) > MOST_WAITING:
            self._waiting.remove(readings[0])
            self._left_out += 1
            self.selection.skip(readings[0][1])

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name=f"foreshock {self}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter is on its way out, where no thread is made any more
            self._thread, self._closing = None, True
            self._work()

    def _raise(self) -> None:
        with self._changed:
            error, self._error = self._error, None
            left_out, self._left_out = self._left_out, 0
        if error is not None:
            raise error
        if left_out:
            told = (
                f"it is slower than training; the readings of {left_out} steps were left out (the run folder has them)"
            )
            raise RunError(f"sending to {self}: {told}; sample less often, or choose fewer metrics")

    # -- on the thread of the sink -------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    break
                entry = self._waiting.popleft()
            self._guarded(self._handle, entry)
        if self._opened:
            self._guarded(self._finish)

    def _handle(self, entry: Alarm | tuple[int, Sequence[Reading]]) -> None:
        if not self._opened:
            self._open()
            self._opened = True
        if isinstance(entry, Alarm):
            self._tell(entry)
        else:
            self._send(*entry)

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:
            with self._changed:
                self._error = self._error or error
