"""Keeps the last checkpoint from before an alarm's onset from being rotated away: ``Watch(on_alarm=CheckpointGuard(folder))``.

Nothing of the user's is ever deleted, moved or written to; a pin is a second name for the same data on the disk.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from foreshock.completeness import incomplete
from foreshock.errors import ConfigError
from foreshock.records import Alarm

_log = logging.getLogger("foreshock")
PINNED = "foreshock-pinned"
NAMED = re.compile(r"(?:steps?|checkpoint|iter(?:ation)?|ckpt)[-_=.]*(\d+)", re.IGNORECASE)
EPOCH = re.compile(r"epoch[-_=.]*\d+", re.IGNORECASE)
SUFFIX = re.compile(r"\.(?!step|checkpoint|iter|ckpt\d)[a-z]+\d?$", re.IGNORECASE)


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name carries: the last integer after step, checkpoint, iter or ckpt, else the only integer
    that counts no epochs; None if there is none."""
    name = SUFFIX.sub("", path.name)
    named = NAMED.findall(name)
    numbers = named[-1:] or re.findall(r"\d+", EPOCH.sub("", name))
    return int(numbers[0]) if len(numbers) == 1 else None


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    step: int
    paths: tuple[Path, ...]  # what was saved at that step: often one, else model and optimizer, say


class CheckpointGuard:
    """Pins the newest complete checkpoint at or before the onset of each alarm, as ``foreshock-pinned/NAME`` beside it.

    Args:
        where: folder of the checkpoints, or a glob. The folder may be made later.
        step: which step a path was saved at, or None for what is no checkpoint; see `step_of`.
        copy: copy, where training writes into files that exist already (a hard link would show it). Otherwise files are
            linked, which takes no room, and copied only where the file system cannot link.

    While nothing is out, nothing is pinned: what rotation deletes before the alarm comes is lost, so let it keep checkpoints
    for longer than alarms take. In a distributed job the rank that heard the alarm pins, on a file system that all share;
    another that does it at the same time is left alone. Nothing is raised in training: what fails is logged.
    """

    every_alarm = True  # another site's may lie further back

    def __init__(
        self, where: str | os.PathLike[str], *, step: Callable[[Path], int | None] = step_of, copy: bool = False
    ) -> None:
        self.where = os.fspath(where)
        self._is_glob = glob.has_magic(self.where) and not Path(self.where).is_dir()
        if not self.where.strip():
            raise ConfigError(
                "making a CheckpointGuard: the folder is ''; give the folder of the checkpoints, or a glob"
            )
        if not self._is_glob and Path(self.where).exists() and not Path(self.where).is_dir():
            raise ConfigError(
                f"making a CheckpointGuard: {self.where} is a file; give the folder of the checkpoints, or a glob"
            )
        if not callable(step):
            raise ConfigError(
                f"making a CheckpointGuard: step must be a callable from Path to int or None, got {step!r}"
            )
        self._step, self._copy = step, copy
        self._noted: dict[Path, int] = {}

    def note(self, path: str | os.PathLike[str], step: int) -> None:
        """``path`` was saved at ``step``, whatever its name says and wherever it is. Call it when the checkpoint is whole."""
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ConfigError(
                f"noting the checkpoint {os.fspath(path)}: the step must be an int of at least 0, got {step!r}"
            )
        self._noted[Path(os.path.abspath(path))] = step

    def __call__(self, alarm: Alarm) -> tuple[Path, ...]:
        """Pin what is from before ``alarm``; what is pinned for it, also if it was so before. Logs, and never raises."""
        try:
            return self._guard(alarm)
        except Exception as error:
            _log.error("pinning a checkpoint in %s: %s: %s", self.where, type(error).__name__, error)
            return ()

    def _guard(self, alarm: Alarm) -> tuple[Path, ...]:
        last = int(getattr(alarm, "onset_interval", (alarm.onset, alarm.onset))[0])
        found = self._found()
        before = [checkpoint for checkpoint in found if checkpoint.step <= last]
        for checkpoint in before:
            pins = self._pin(checkpoint, alarm, last)
            if pins:
                return pins
        steps = f"there are steps {', '.join(str(c.step) for c in found[:8])}" if found else "none was found at all"
        _log.warning(
            "no complete checkpoint in %s is from step %d or before (%s): nothing was pinned", self.where, last, steps
        )
        return ()

    def _found(self) -> list[_Checkpoint]:
        """Newest first."""
        paths: dict[Path, int] = {}
        for path in self._paths():
            step = self._step(path)
            if step is not None:
                paths[path] = step
        paths |= {path: step for path, step in self._noted.items() if path.exists()}
        by_step: dict[int, list[Path]] = {}
        for path, step in paths.items():
            by_step.setdefault(step, []).append(path)
        return [_Checkpoint(step, tuple(sorted(by_step[step]))) for step in sorted(by_step, reverse=True)]

    def _paths(self) -> Iterator[Path]:
        folder = Path(self.where)
        if self._is_glob:
            paths = [Path(name) for name in glob.glob(self.where)]
            if not paths:
                _log.warning("looking for checkpoints: the glob %s matches nothing", self.where)
        else:
            paths = list(folder.iterdir()) if folder.is_dir() else []
        for path in paths:
            if path.name != PINNED and not path.name.startswith("."):
                yield Path(os.path.abspath(path))

    def _pin(self, checkpoint: _Checkpoint, alarm: Alarm, last: int) -> tuple[Path, ...]:
        """The pins of one step's files; none if one of them is not whole, or goes while it is being pinned."""
        for path in checkpoint.paths:
            reason = incomplete(path)
            if reason:
                _log.warning("passing over the checkpoint %s: %s", path, reason)
                return ()
        pins = []
        for path in checkpoint.paths:
            pin = _name_for(path)
            if not pin.exists():
                try:
                    how = self._hold(path, pin)
                except FileNotFoundError:
                    _log.warning("passing over the checkpoint %s: it was deleted while it was being pinned", path)
                    return ()
                if not how:
                    continue
                _explain(pin, path, checkpoint.step, alarm, last, how)
                _log.warning(
                    "pinned the checkpoint %s (step %d, before the onset %d): %s", path, checkpoint.step, last, pin
                )
            pins.append(pin)
        return tuple(pins) or checkpoint.paths

    def _hold(self, path: Path, pin: Path) -> str:
        """Make ``pin`` a second name of ``path``, in one move at the end; how, or "" if another process is at it."""
        part = pin.with_name(f".{pin.name}.part")
        pin.parent.mkdir(exist_ok=True)
        try:
            part.mkdir()  # whoever makes it does the work
        except FileExistsError:
            _log.warning("not pinning %s: another process is at it, or one died there; then delete %s", path, part)
            return ""
        try:
            copied = sum(self._second(source, part / target) for source, target in _files(path))
            os.replace(part / path.name, pin)
            return "copied" if copied else "hard links"
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _second(self, source: Path, target: Path) -> bool:
        """A second name for one file; whether it had to be copied."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            target.mkdir(exist_ok=True)
            return False
        real = os.path.realpath(source)
        if not self._copy:
            try:
                os.link(real, target)
                return False
            except FileNotFoundError:
                raise
            except OSError:
                pass  # another device, or a file system without hard links
        shutil.copy2(real, target)
        return True


def _name_for(path: Path) -> Path:
    """Where the checkpoint is pinned, or is to be: a run begun anew in the same folder may have saved another under its name."""
    folder = path.parent / PINNED
    names = itertools.chain([path.name], (f"{path.name}.{number}" for number in itertools.count(2)))
    return next(pin for name in names if not (pin := folder / name).exists() or _is_of(pin, path))


def _is_of(pin: Path, path: Path) -> bool:
    """Whether every file of the checkpoint stands in the pin as it is: of the same size and time."""
    try:
        pairs = [(source.stat(), (pin / target.relative_to(path.name)).stat()) for source, target in _files(path)]
    except OSError:
        return False
    return all(a.st_size == b.st_size and a.st_mtime_ns == b.st_mtime_ns for a, b in pairs)


def _files(path: Path) -> Iterator[tuple[Path, Path]]:
    """Every file of a checkpoint, and every folder without any, with where it goes below the pin's folder."""
    if not path.is_dir():
        yield path, Path(path.name)
        return
    for folder, folders, names in os.walk(path, followlinks=True):
        here = Path(folder)
        if not names and not folders:
            yield here, here.relative_to(path.parent)
        for name in names:
            yield here / name, (here / name).relative_to(path.parent)


def _explain(pin: Path, path: Path, step: int, alarm: Alarm, last: int, how: str) -> None:
    told = {
        "checkpoint": str(path),
        "step": step,
        "why": f"the newest complete checkpoint at or before step {last}, where this alarm may have begun",
        "how": how,
        "pinned": datetime.now(UTC).isoformat(timespec="seconds"),
        "alarm": alarm.to_json(),
    }
    pin.with_name(f"{pin.name}.json").write_text(json.dumps(told, indent=2, default=str), encoding="utf-8")
