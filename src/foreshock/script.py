"""A program run as Python itself would run it: the one ``__main__``, with its arguments and import path, its threads waited for,
and its tracebacks without what foreshock puts between the script and torch.
"""

from __future__ import annotations

import builtins
import os
import pkgutil
import runpy
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from types import ModuleType, TracebackType
from typing import Any

from foreshock.errors import ConfigError

# Functions that only hand on what the script calls, or what torch has compiled for it.
HANDING_ON = frozenset(
    {
        "_watching.<locals>.compile_watched",
        "_closing.<locals>.destroy_process_group",
        "_meeting.<locals>.built",
        "_counting.<locals>.start",
        "Eager.<lambda>",
        "Eager._called",
        "_in_training",
        "Backend.__call__",
        "Backend._inner.<locals>.<lambda>",
        "Backend._watched.<locals>.compile_variant",
        "Backend._watched.<locals>.<lambda>",
        "WatchedGraph.__call__",
        "WatchedGraph._sampled",
        "WatchedGraph.compile",
    }
)


class NoProgramError(ConfigError):
    """There is no such module, or no ``__main__.py`` where one is looked for."""


def put(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until ``undo`` is closed."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def is_program(path: str) -> bool:
    """Whether Python can run it: a file, or a folder or zip file, of which Python runs the ``__main__.py``."""
    return os.path.isfile(path) or pkgutil.get_importer(path) is not None


def program(undo: ExitStack, script: str, args: Sequence[str], module: bool) -> Callable[[], None]:
    """What runs ``script`` in this process. Its ``__main__``, arguments and import path are the script's until ``undo`` is closed.

    Calling it raises NoProgramError where there is nothing, and whatever the script raises.
    """
    main = ModuleType("__main__")
    vars(main).update(__annotations__={}, __builtins__=builtins)
    undo.callback(sys.modules.__setitem__, "__main__", sys.modules["__main__"])
    sys.modules["__main__"] = main
    path = os.path.join(os.getcwd(), script)  # as Python writes it: neither normalized nor resolved
    packed = not module and pkgutil.get_importer(script) is not None
    first = os.getcwd() if module else path if packed else os.path.dirname(os.path.realpath(script))
    safe = sys.flags.safe_path
    put(undo, sys, "argv", ["-m" if module else script, *args])
    put(undo, sys, "path", [*([first] if packed or not safe else []), *(sys.path if safe else sys.path[1:])])
    if not module and not packed:
        return lambda: _run_file(main, path)

    def run() -> None:
        try:
            runpy._run_module_as_main(script if module else "__main__", module)  # type: ignore[attr-defined]  # python -m
        except SystemExit as leaving:
            if isinstance(leaving.__context__, runpy._Error):  # type: ignore[attr-defined]  # nothing was run
                raise NoProgramError(f"running {'-m ' * module}{script}: {leaving.__context__}") from None
            raise

    return run


def _run_file(main: ModuleType, path: str) -> None:
    kind = SourcelessFileLoader if path.endswith(".pyc") else SourceFileLoader
    loader = kind("__main__", path)
    vars(main).update(__file__=path, __loader__=loader, __cached__=None)
    if isinstance(loader, SourceFileLoader):
        code: Any = compile(loader.get_data(path), path, "exec", dont_inherit=True)
    else:
        code = loader.get_code("__main__")
    exec(code, vars(main))


def finish_threads() -> None:
    """Wait for the threads that the program has left, as Python does once the last line is done and before it calls what is
    registered with atexit; it does not wait twice. What interrupts the waiting is told and ends it.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # it lets executors go first; multiprocessing calls it as well
    except BaseException as error:
        print(f"Exception ignored in: {threading!r}", file=sys.stderr)
        traceback.print_exception(without_frames_of_ours(error))


def without_frames_of_ours(error: BaseException) -> BaseException:
    """``error``, with its causes and what it was raised in, as it would be without foreshock.

    Frames of foreshock stay where it did more than to hand on a call: there the error may be its own.
    """
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.__traceback__ = _cut(one.__traceback__)
        todo += [one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
    return error


def _cut(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in ("foreshock.run", __name__):  # the way here
        trace = trace.tb_next
    frames = []
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    ours = {id(frame): frame.tb_frame.f_code for frame in frames if _is_ours(frame)}
    if all(code.co_qualname in HANDING_ON for code in ours.values()):
        frames = [frame for frame in frames if id(frame) not in ours]
    for frame, after in zip(frames, [*frames, None][1:], strict=True):
        frame.tb_next = after
    return frames[0] if frames else None


def _is_ours(frame: TracebackType) -> bool:
    return str(frame.tb_frame.f_globals.get("__name__")).split(".")[0] == "foreshock"
