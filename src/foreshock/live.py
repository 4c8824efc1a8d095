"""``foreshock watch``: a run in the terminal while it is written, until q or Ctrl-C; printed once where there is no terminal."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from foreshock.errors import RunError
from foreshock.following import Following
from foreshock.live_view import Snapshot, snapshot, view

try:
    import termios
    import tty
except ImportError:  # Windows: q is not heard, Ctrl-C is
    termios = tty = None  # type: ignore[assignment]

EVERY = 1.0  # seconds between two looks, at least


def watch(path: str, *, once: bool = False, every: float = EVERY, console: Console | None = None) -> int:
    """Show the run at ``path`` until q or Ctrl-C; once, if so asked or where there is no terminal. The exit code."""
    console = Console() if console is None else console
    following = Following(path)
    if once or not console.is_terminal:
        shown = following.look(snapshot)
        console.print(view(shown, _line(shown, following, None), console))
        return 0
    following.exists()
    seen: Snapshot | None = None
    with (
        suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(console=console, screen=True, auto_refresh=False) as screen,
    ):
        version, progress = "", Progress()
        now: RenderableType = Text("waiting for the run's first flush")
        while True:
            if following.version != version:
                version = following.version
                try:
                    seen = following.look(snapshot)
                    progress.note(int(seen.steps[-1]) if len(seen.steps) else 0)
                except RunError as error:  # not yet there, or being moved aside
                    now = Text(str(error), style="yellow")
            if seen is not None:
                now = view(seen, _line(seen, following, progress.pace), console, console.height)
            screen.update(now, refresh=True)
            if pressed(following.rest(every)):
                break
    if seen is not None:  # the screen is as it was before; what it said last stays
        console.print(Text(f"{seen.name}: {seen.verdict.title}"))
    return 0


class Progress:
    """Steps a second, over the last half minute of looks."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def note(self, step: int) -> None:
        now = time.monotonic()
        self._seen = [(at, before) for at, before in self._seen if now - at < 30 and before <= step] + [(now, step)]

    @property
    def pace(self) -> float | None:
        (first, low), (last, high) = self._seen[0], self._seen[-1]
        return (high - low) / (last - first) if last > first else None


def _line(shown: Snapshot, following: Following, pace: float | None) -> str:
    """How the run goes on."""
    written = following.written
    parts = [shown.name, f"step {shown.steps[-1]}" if len(shown.steps) else "no step yet"]
    if pace:
        parts.append(f"{pace:.3g} steps/s")
    if following.log.exists():
        parts.append(f"last written {_ago(written)}" if written is not None else "")
    else:
        parts.append("closed by its writer")
    return " · ".join(parts)


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 5400 else f"{seconds / 3600:.0f} h ago"


@contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key, and says whether it was q."""
    if termios is None or not sys.stdin.isatty():
        yield lambda seconds: threading.Event().wait(seconds)  # which nobody sets
        return
    source = sys.stdin.fileno()
    before = termios.tcgetattr(source)

    def pressed(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([source], [], [], left)[0] and os.read(source, 1) in (b"q", b"Q", b""):
                return True
        return False

    try:
        tty.setcbreak(source)
        yield pressed
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
