"""Where Dynamo left compiled code: graph breaks, frames it gave up, recompile limits; in words, with the source line.

Dynamo keeps records of all three for itself. They are only read, when a graph arrives and when the ledger is asked for: torch
logs what it always did, and a step costs nothing.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Sequence
from typing import Any

from foreshock import _torch

_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_(\d+)$")
_LIMIT = re.compile(r"exceeding the (\w+) .*\(currently set to (\d+)\)")
_NO_WAY_BACK = "step_unsupported"  # a break after which Dynamo cannot go on in this frame
_SOFT = ("Unsupported", "UserError")  # failures after which Dynamo goes on in eager; others are raised


class Fallbacks:
    """What Dynamo recorded since this was made."""

    def __init__(self) -> None:
        self.graph_breaks: list[str] = []
        self._eager: dict[str, None] = {}
        self._frames: dict[str, Any] = {}  # the last compilation of each frame, which the hit of a limit does not name
        self._last_break = _newest(_torch.break_records)
        self._last_compilation = _newest(_torch.compilation_records)

    @property
    def eager(self) -> tuple[str, ...]:
        """Frames that run eagerly, once each."""
        return tuple(self._eager)

    def read(self) -> None:
        """Take in what was recorded since the last time. Raises what a torch of another version makes it raise."""
        for record in _since(_torch.break_records(), self._last_break):
            self._last_break = record
            if record.reason == _NO_WAY_BACK:
                self._eager.setdefault(_cut_short(record))
            else:
                self.graph_breaks.append(_broken(record))
                if len(record.user_stack) > 1 and _torch.is_skipped(record.user_stack[1].filename):
                    self._eager.setdefault(_not_entered(record.user_stack[1]))
        for record in _since(_torch.compilation_records(), self._last_compilation):
            self._last_compilation = record
            frame = str(record.compile_id).rpartition("/")[0]
            if record.co_name is not None:
                self._frames[frame] = record
            if record.fail_type in _SOFT or (record.fail_type is not None and record.config_suppress_errors):
                self._eager.setdefault(_given_up(record, self._frames.get(frame)))


def _newest(records: Callable[[], Sequence[Any]]) -> Any:
    try:
        return next(reversed(records()), None)
    except Exception:  # `read` meets it again, where it is reported
        return None


def _since(records: Sequence[Any], last: Any) -> Sequence[Any]:
    """The records after ``last``; all of them if it is gone, for then they are younger."""
    for position in reversed(range(len(records))):
        if records[position] is last:
            return records[position + 1 :]
    return records


def _broken(record: Any) -> str:
    words = _first_line(record.reason)
    if words.startswith("generic_jump"):
        words = "Data-dependent branching"  # what Dynamo calls it where the branch stands in an inlined function
    return f"{words}{_innermost(record)}"


def _cut_short(record: Any) -> str:
    return f"the rest of a function runs eagerly: Dynamo cannot resume after a break here{_innermost(record)}"


def _not_entered(at: Any) -> str:
    """Behind a break the function that was called runs by itself, and not every file's functions are compiled by themselves."""
    place = _place(at.filename, at.lineno, _function(at.name), at.line)
    return f"a function of a library that Dynamo compiles only from outside runs eagerly, for it breaks the graph ({place})"


def _innermost(record: Any) -> str:
    at = record.user_stack[-1] if record.user_stack else None
    return "" if at is None else f" ({_place(at.filename, at.lineno, _function(at.name), at.line)})"


def _given_up(record: Any, known: Any) -> str:
    reason = record.fail_reason or record.fail_type
    limit = _LIMIT.search(reason)
    frame = record if record.co_name is not None else known
    name = _function(frame.co_name) if frame is not None else "a frame"
    if limit is not None:
        cause = _first_line((record.recompile_reason or "").partition(": ")[2].partition("  #")[0])
        words = f"`{name}` hit the {limit[1].replace('_', ' ')} of {limit[2]}: its later variants run eagerly and are not watched"
        words += f"; the last one was asked for by `{cause}`" if cause else ""
    else:
        loop = ", inside a loop" if "graph break in loop" in reason else ""
        words = f"`{name}` runs eagerly: {_first_line(reason)}{loop}"
    if frame is None:
        return words
    filename, line = frame.fail_user_frame_filename, frame.fail_user_frame_lineno
    if limit is not None or filename is None or line is None:
        filename, line = frame.co_filename, frame.co_firstlineno
    return f"{words} ({_place(filename, line, '', None)})"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


def _function(name: str) -> str:
    """The user's name of a function, also where Dynamo made one of the rest of it."""
    resumed = _RESUMED.match(name)
    return name if resumed is None else f"{resumed[1]} from line {resumed[2]} on"


def _place(filename: str, line: int | None, function: str, code: str | None) -> str:
    where = f"{filename}:{line}" + (f" in {function}" if function else "")
    code = (code or linecache.getline(filename, line or 0)).strip()
    return f"{where}: {code}" if code else where
