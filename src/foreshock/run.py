"""Runs a training script unchanged, except that whatever it compiles with inductor is watched.

``foreshock run script.py --its --flags`` and ``python -m foreshock.run script.py --its --flags`` are the same, and so are both with
``-m package.module``. The script is ``__main__`` with its own arguments, import path, exit code and tracebacks.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from foreshock.config import PREFIX, load_settings
from foreshock.errors import ConfigError
from foreshock.script import NoProgramError, finish_threads, is_program, program, put, without_frames_of_ours

if TYPE_CHECKING:
    from foreshock.eager import Eager
    from foreshock.watch import Watch

log = logging.getLogger("foreshock")


MOST_NAMES = 12  # of classes, in one line


@dataclass(slots=True)
class Outcome:
    """How a script went: its exit code, the watch over what it compiled, and the backends that were left alone.

    ``interrupted``: a KeyboardInterrupt ended it. ``eager``: what was to be compiled besides. ``spawned``: processes that the
    script started anew by multiprocessing. ``process``: the one that ran it, of which the script may leave forks behind.
    """

    code: int = 0
    watch: Watch | None = None
    left_alone: set[str] = field(default_factory=set)
    interrupted: bool = False
    eager: Eager | None = None
    spawned: int = 0
    process: int = field(default_factory=os.getpid)

    def summary(self) -> list[str]:
        """Lines for the terminal: what was compiled for the watch, the alarms or what to do about their lack, where the run is."""
        return [*self._compiled(), *self._heard()]

    def _compiled(self) -> list[str]:
        eager = self.eager
        if eager is None:
            return []
        if eager.compiled:
            return [
                "left eager by the script and compiled: "
                + ", ".join(f"{n} {name}" for name, n in eager.compiled.items())
            ]
        if not eager.trained:
            return [
                f"--compile-eager {eager.wanted} compiled nothing: no optimizer of torch held a module's parameters"
            ]
        names = ", ".join(list(eager.trained)[:MOST_NAMES]) + ", ..." * (len(eager.trained) > MOST_NAMES)
        return [f"--compile-eager {eager.wanted} compiled nothing of what is trained and called as a module: {names}"]

    def _heard(self) -> list[str]:
        if self.watch is None:
            others = f" (left alone: {', '.join(sorted(self.left_alone))})" if self.left_alone else ""
            what = f"nothing was watched: no torch.compile of the script used inductor{others}"
            return [what + self._advice("; --compile-eager auto compiles what it trains"), "no run was kept"]
        alarms, run = self.watch.alarms, self.watch.settings.run
        kept = f"run kept in {run}; see it with: foreshock report {run}" if run else "run not kept; --run DIR keeps it"
        count = len(self.watch.sites)
        if not count:
            told = "nothing was watched: no attention and no router ran in what was compiled"
            hint = self._advice(", and --compile-eager auto compiles what the script leaves eager")
            return [f"{told}; foreshock sites says what was met instead{hint}", kept]
        first = f"{len(alarms)} alarm{'s' * (len(alarms) > 1)}; the first: {alarms[0].message}" if alarms else ""
        quiet = f"no alarm at {count} site{'s' * (count != 1)} in {self.watch.step} steps"
        return [" ".join((first or quiet).split()), kept]

    def _advice(self, to_compile: str) -> str:
        """Where nothing was watched: what is likely to change that."""
        if not self.spawned:
            return "" if self.eager else to_compile
        told = "1 process" if self.spawned == 1 else f"{self.spawned} processes"
        return (
            f"; foreshock does not reach into {told} that the script spawned by multiprocessing: where it trains there, "
            "start it with torchrun ... -m foreshock.run"
        )


def launch(
    script: str,
    args: Sequence[str],
    *,
    module: bool = False,
    compile_eager: str | None = None,
    run: str | None = None,
    every: int | None = None,
    strict: bool = False,
    last: bool = False,
    prepare: Callable[[Watch], None] = lambda watch: None,
) -> Outcome:
    """Run ``script`` with ``args``, watched by the process-wide default watch, which is closed at the end.

    ``module``: ``script`` is a module's name, as for Python's ``-m``. ``compile_eager``: what is compiled as well, for `Eager`.
    ``last``: this process ends after it, and stays the script's: ``__main__``, arguments and all; its threads are waited for.
    ``prepare(watch)`` is called before anything is captured.
    Raises ConfigError, before anything runs, for a script that does not exist or settings that are wrong. What the script
    itself raises is printed as Python would print it, and told by the exit code.
    """
    if not module and not is_program(script):
        raise ConfigError(
            f"running {script}: there is no such file; give the path of a Python script, or -m and a module"
        )
    outcome = Outcome()
    given = {"RUN": run, "EVERY": None if every is None else str(every), "STRICT": "true" if strict else None}
    with ExitStack() as undo:
        _environment(undo, {f"{PREFIX}{key}": value for key, value in given.items() if value is not None})
        load_settings()
        with _watched(outcome, prepare, compile_eager):
            start = program(undo, script, args, module)
            try:
                start()
            except NoProgramError:
                last = False
                raise
            except SystemExit as leaving:
                outcome.code = _code(leaving)
            except BaseException as error:
                shown = without_frames_of_ours(error)
                sys.excepthook(type(shown), shown, shown.__traceback__)
                outcome.interrupted = isinstance(error, KeyboardInterrupt)
                outcome.code = 130 if outcome.interrupted else 1
            finally:
                if last:
                    undo.pop_all()  # what is called at exit, or waited for, finds its own `__main__`
                    finish_threads()
                if outcome.watch is not None:
                    outcome.watch.close()
    return outcome


def speaks(outcome: Outcome) -> bool:
    """Whether this process has something to say at the end: of merged ranks it is the first that does, and no fork of it."""
    if outcome.process != os.getpid():
        return False
    merged = outcome.watch is None or outcome.watch.settings.merge
    return not merged or os.environ.get("RANK", "0") == "0"


@contextmanager
def _watched(outcome: Outcome, prepare: Callable[[Watch], None], compile_eager: str | None) -> Iterator[None]:
    """`torch.compile` with foreshock where inductor would be; ``Module.compile`` and the decorator go through it as well."""
    import torch
    from torch import distributed

    from foreshock.eager import Eager

    with ExitStack() as undo:
        put(undo, torch, "compile", _watching(torch.compile, outcome, prepare))
        put(undo, BaseProcess, "start", _counting(BaseProcess.start, outcome))
        if distributed.is_available():
            put(undo, distributed, "destroy_process_group", _closing(distributed.destroy_process_group, outcome))
        if compile_eager is not None:
            outcome.eager = Eager(compile_eager)
            put(undo, torch.optim.Optimizer, "__init__", _meeting(torch.optim.Optimizer.__init__, outcome.eager))
        yield


def _watching(plain: Callable[..., Any], outcome: Outcome, prepare: Callable[[Watch], None]) -> Callable[..., Any]:
    import torch

    import foreshock

    @functools.wraps(plain)
    def compile_watched(model: Any = None, **options: Any) -> Any:
        compiled = getattr(model, "__self__", model)  # `Module.compile` compiles a method
        if outcome.eager is not None and isinstance(compiled, torch.nn.Module):
            outcome.eager.disarm(compiled)
        backend = options.get("backend") or torch.compiler.get_default_backend()
        if backend in ("inductor", "foreshock", foreshock.instrumented):
            if model is not None and (options.get("mode") or options.get("options")):
                plain(model, **options)  # inductor finds a wrong one here, before anything is captured
            if outcome.watch is None:
                outcome.watch = foreshock.default_watch()
                prepare(outcome.watch)
            options["backend"] = outcome.watch.backend
        else:
            outcome.left_alone.add(
                backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
            )
        return plain(model, **options)

    return compile_watched


def _counting(plain: Callable[[BaseProcess], None], outcome: Outcome) -> Callable[[BaseProcess], None]:
    """Processes that begin anew and import the script compile without foreshock; those that load data have nothing to compile."""

    @functools.wraps(plain)
    def start(process: BaseProcess) -> None:
        target = getattr(process, "_target", None)  # which the start lets go of
        plain(process)
        loads = str(getattr(target, "__module__", "")).startswith("torch.utils.data.")
        forked = getattr(getattr(process, "_popen", None), "method", "fork") == "fork"
        outcome.spawned += not loads and not forked

    return start


def _closing(plain: Callable[..., Any], outcome: Outcome) -> Callable[..., Any]:
    """What ranks have to tell each other must be told before the script takes their process group away."""

    @functools.wraps(plain)
    def destroy_process_group(group: Any = None) -> Any:
        if group is None and outcome.watch is not None:
            outcome.watch.close()
        return plain(group)

    return destroy_process_group


def _meeting(plain: Callable[..., None], eager: Eager) -> Callable[..., None]:
    @functools.wraps(plain)
    def built(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        plain(optimizer, *args, **kwargs)
        try:
            eager.meet(optimizer)
        except Exception:
            log.warning("looking for modules to compile; they stay eager", exc_info=True)

    return built


def _environment(undo: ExitStack, values: dict[str, str]) -> None:
    for name, value in values.items():
        if name in os.environ:
            undo.callback(os.environ.__setitem__, name, os.environ[name])
        else:
            undo.callback(os.environ.pop, name, None)
        os.environ[name] = value


def _code(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    from foreshock.cli import main

    sys.argv.insert(1, "run")
    main()
