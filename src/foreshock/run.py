"""Runs a training script unchanged, except that whatever it compiles with inductor is watched.

``foreshock run script.py --its --flags`` and ``python -m foreshock.run script.py --its --flags`` are the same. The script is
``__main__`` with its own arguments, import path, exit code and tracebacks.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from foreshock.config import PREFIX, load_settings
from foreshock.errors import ConfigError

if TYPE_CHECKING:
    from foreshock.watch import Watch


@dataclass(slots=True)
class Outcome:
    """How a script went: its exit code, the watch over what it compiled, and the backends that were left alone."""

    code: int = 0
    watch: Watch | None = None
    left_alone: set[str] = field(default_factory=set)

    def summary(self) -> list[str]:
        """Two lines for the terminal: the alarms, and where the run is."""
        if self.watch is None:
            others = f" (left alone: {', '.join(sorted(self.left_alone))})" if self.left_alone else ""
            return [f"nothing was watched: no torch.compile of the script used inductor{others}", "no run was kept"]
        alarms, run = self.watch.alarms, self.watch.settings.run
        first = f"{len(alarms)} alarm{'s' * (len(alarms) > 1)}; the first: {alarms[0].message}" if alarms else ""
        count = len(self.watch.sites)
        quiet = f"no alarm at {count} site{'s' * (count != 1)} in {self.watch.step} steps"
        kept = f"run kept in {run}; see it with: foreshock report {run}" if run else "run not kept; --run DIR keeps it"
        return [" ".join((first or quiet).split()), kept]


def launch(
    script: str,
    args: Sequence[str],
    *,
    run: str | None = None,
    every: int | None = None,
    strict: bool = False,
    prepare: Callable[[Watch], None] = lambda watch: None,
) -> Outcome:
    """Run ``script`` with ``args``, watched by the process-wide default watch, which is closed at the end.

    ``prepare(watch)`` is called before anything is captured.
    Raises ConfigError, before anything runs, for a script that does not exist or settings that are wrong. What the script
    itself raises is printed as Python would print it, and told by the exit code.
    """
    if not Path(script).is_file():
        raise ConfigError(f"running {script}: there is no such file; give the path of a Python script")
    outcome = Outcome()
    given = {"RUN": run, "EVERY": None if every is None else str(every), "STRICT": "true" if strict else None}
    with _environment({f"{PREFIX}{key}": value for key, value in given.items() if value is not None}):
        load_settings()
        with _watched(outcome, prepare), _arguments(script, args):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as leaving:
                outcome.code = _code(leaving)
            except BaseException as error:
                shown = error.with_traceback(_own(error.__traceback__))
                sys.excepthook(type(shown), shown, shown.__traceback__)
                outcome.code = 130 if isinstance(error, KeyboardInterrupt) else 1
            finally:
                if outcome.watch is not None:
                    outcome.watch.close()
    return outcome


@contextmanager
def _watched(outcome: Outcome, prepare: Callable[[Watch], None]) -> Iterator[None]:
    """`torch.compile` with foreshock where inductor would be; ``Module.compile`` and the decorator go through it as well."""
    import torch

    plain = torch.compile
    torch.compile = _watching(plain, outcome, prepare)
    try:
        yield
    finally:
        torch.compile = plain


def _watching(plain: Callable[..., Any], outcome: Outcome, prepare: Callable[[Watch], None]) -> Callable[..., Any]:
    import torch

    import foreshock

    @functools.wraps(plain)
    def compile_watched(model: Any = None, **options: Any) -> Any:
        backend = options.get("backend") or torch.compiler.get_default_backend()
        if backend in ("inductor", "foreshock", foreshock.instrumented):
            if outcome.watch is None:
                outcome.watch = foreshock.default_watch()
                prepare(outcome.watch)
            options["backend"] = foreshock.instrumented
        else:
            outcome.left_alone.add(
                backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
            )
        return plain(model, **options)

    return compile_watched


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _arguments(script: str, args: Sequence[str]) -> Iterator[None]:
    """The arguments and the import path that the script would have alone."""
    before = sys.argv, sys.path
    sys.argv = [script, *args]
    rest = sys.path if sys.flags.safe_path else sys.path[1:]
    sys.path = [*([] if sys.flags.safe_path else [str(Path(script).resolve().parent)]), *rest]
    try:
        yield
    finally:
        sys.argv, sys.path = before


def _code(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


def _own(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the script's first line on: without the frames of this file and of runpy."""
    frames = [frame.filename for frame in traceback.extract_tb(trace)]
    for name in frames:
        if trace is None or not (name == __file__ or name.startswith("<frozen runpy")):
            break
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    from foreshock.cli import main

    sys.argv.insert(1, "run")
    main()
