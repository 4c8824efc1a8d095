"""A run that may still be written, looked at again whenever its files change. Nothing is ever written to its folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from foreshock.errors import RunError
from foreshock.reader import Run, open_run
from foreshock.tables import FILE

Answer = TypeVar("Answer")
SHARE = 5  # at most one part in so many of a processor goes into looking


class Following:
    """``look`` opens the run, read-only and for the moment, and asks it; ``version`` tells one state of its files from another."""

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        folder = Path(path)
        self.file = folder if folder.is_file() else folder / FILE
        self._clock = clock
        self._took = 0.0

    @property
    def version(self) -> str:
        """Changes with every flush of the writer, and when the run is set aside for another; "" while there is none."""
        return "-".join(_stamp(path) for path in (self.file, self.log) if path.exists())

    @property
    def log(self) -> Path:
        """The write-ahead log, which is there as long as the run is open to its writer, or was when that was killed."""
        return self.file.with_name(self.file.name + "-wal")

    @property
    def written(self) -> float | None:
        """Seconds since the last flush; None while there is none."""
        times = [path.stat().st_mtime for path in (self.file, self.log) if path.exists()]
        return max(time.time() - max(times), 0.0) if times else None

    def look(self, ask: Callable[[Run], Answer]) -> Answer:
        """The answer of ``ask``. Raises RunError where there is no run, or none yet."""
        began = self._clock()
        try:
            with open_run(self.file if self.file.exists() else self.file.parent) as run:
                return ask(run)
        finally:
            self._took = self._clock() - began

    def rest(self, least: float) -> float:
        """Seconds until the next look, ``least`` at least: a large run is looked at less often."""
        return max(least, (SHARE - 1) * self._took)

    def exists(self) -> bool:
        """Whether there is a run to look at. Raises RunError for a folder that is missing, or holds no run and is none yet."""
        if self.file.exists() or self.file.parent.is_dir():
            return self.file.exists()
        raise RunError(
            f"watching {self.file.parent}: there is no such folder; pass the one that was given to Watch(...) or --run"
        )


def _stamp(path: Path) -> str:
    try:
        found: Any = path.stat()
    except FileNotFoundError:  # the writer has just closed
        return ""
    return f"{found.st_ino:x}.{found.st_mtime_ns:x}.{found.st_size:x}"
