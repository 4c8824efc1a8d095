"""The settings of a watch, and where each may come from.

Later wins: the defaults, ``[tool.foreshock]`` in the nearest pyproject.toml, the nearest foreshock.toml, the environment
(``FORESHOCK_EVERY=1``; several values separated by commas). A key that does not exist is an error, wherever it stands.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from dataclasses import replace as copy
from pathlib import Path
from typing import Any

from foreshock.errors import ConfigError
from foreshock.monitors.budget import STEPS_PER_FALSE_ALARM
from foreshock.monitors.detectors.references import ALIGNMENTS
from foreshock.monitors.sinks.names import problem as wrong_sink
from foreshock.series import nearest

FIRST_TIER = ("laws", "attention", "router", "spectra", "optim")
SECOND_TIER = ("activations", "residual", "gradients", "adam", "updates", "experts")
FAMILIES = (*FIRST_TIER, *SECOND_TIER)
GROUPS = {"default": FIRST_TIER, "all": FAMILIES}
ON_ALARM = ("warn", "raise", "stop")
CHOICES = {"on_alarm": ON_ALARM, "align": ALIGNMENTS}
PREFIX = "FORESHOCK_"


@dataclass(frozen=True, slots=True)
class Settings:
    """What to watch and how often. ``monitors=None`` is the first tier; ``windows`` are steps, for the weight spectra.

    ``align``: compare with the baseline at the same "step", or at the same count of logged "tokens".
    ``steps_per_false_alarm``: healthy steps in which all tests together may be wrong once.
    ``budget``: share of a step's time that watching may take; None leaves sampling at ``every``.
    ``on_alarm`` may name several actions, separated by commas; ``debounce`` is in steps.
    ``merge_timeout``: seconds for which a rank waits for the others before it steps aside and trains on (docs/ranks.md).
    ``sinks`` are names with what they take, as in ``tensorboard:runs/tb`` (docs/sinks.md).
    """

    run: str | None = None
    every: int = 10
    budget: float | None = None
    inner: str = "inductor"
    monitors: tuple[str, ...] | None = None
    baseline: tuple[str, ...] = ()
    align: str = "step"
    steps_per_false_alarm: int = STEPS_PER_FALSE_ALARM
    on_alarm: str = "warn"
    debounce: int = 100
    strict: bool = False
    merge: bool = True
    merge_timeout: float = 60.0
    rows: int = 16
    windows: tuple[int, ...] = (10, 50)
    sinks: tuple[str, ...] = ()

    def replace(self, **values: Any) -> Settings:
        """A copy with other values, checked as if read from a file; raises ConfigError."""
        return _merge(self, "the arguments", values)


TYPES = {field.name: str(field.type) for field in fields(Settings)}


def families(monitors: Iterable[str] | None) -> frozenset[str]:
    """The metric families that ``monitors`` names, "default" (the first tier) and "all" written out; None is the first tier."""
    named = ("default",) if monitors is None else monitors
    return frozenset(family for name in named for family in GROUPS.get(name, (name,)))


def load_settings(start: Path | None = None) -> Settings:
    """The settings that hold in ``start`` (the working directory). Raises ConfigError naming the source and the key."""
    settings = Settings()
    for source, values in _sources((start or Path.cwd()).resolve()):
        settings = _merge(settings, source, values)
    return settings


def _sources(start: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if (project := _upward(start, "pyproject.toml")) is not None:
        yield f"[tool.foreshock] in {project}", _toml(project).get("tool", {}).get("foreshock", {})
    if (own := _upward(start, "foreshock.toml")) is not None:
        yield str(own), _toml(own)
    for name, text in sorted(os.environ.items()):
        if name.startswith(PREFIX) and text:
            key = name.removeprefix(PREFIX).lower()
            yield f"the environment variable {name}", {key: _read(text, TYPES.get(key, ""))}


def _upward(start: Path, name: str) -> Path | None:
    return next((folder / name for folder in (start, *start.parents) if (folder / name).is_file()), None)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"reading {path}: {error}; correct the file") from error


def _read(text: str, kind: str) -> Any:
    """The text of a variable as the value its type asks for; what does not fit stays text and is refused later."""
    if kind.startswith("tuple"):
        items = [item.strip() for item in text.split(",") if item.strip()]
        return [_read(item, "int") for item in items] if "int" in kind else items
    if kind == "bool":
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(text.lower(), text)
    try:
        return int(text) if kind == "int" else float(text) if kind.startswith("float") else text
    except ValueError:
        return text


def _merge(settings: Settings, source: str, values: Mapping[str, Any]) -> Settings:
    if not isinstance(values, Mapping):
        raise ConfigError(f"reading {source}: expected a table of settings, got {values!r}")
    for key, value in values.items():
        if key not in TYPES:
            raise ConfigError(
                f"reading {source}: there is no setting {key!r}{nearest(key, list(TYPES))}; there are {', '.join(TYPES)}"
            )
        fitted = _fit(value, TYPES[key])
        if fitted is NotImplemented:
            raise ConfigError(f"reading {source}: {key} must be {TYPES[key]}, got {value!r}")
        if problem := _problem(key, fitted):
            raise ConfigError(f"reading {source}: {key} {problem}")
        settings = copy(settings, **{key: fitted})
    return settings


def _fit(value: Any, kind: str) -> Any:
    """``value`` as the field's type, or NotImplemented."""
    if value is None:
        return None if kind.endswith("None") else NotImplemented
    if isinstance(value, Path):
        value = str(value)
    if kind.startswith("tuple"):
        item: type = int if "int" in kind else str
        listed = isinstance(value, list | tuple) and all(type(one) is item for one in value)
        return tuple(value) if listed else NotImplemented
    if kind.startswith("float"):
        return float(value) if type(value) in (int, float) else NotImplemented
    wanted: type = {"int": int, "bool": bool}.get(kind, str)
    return value if type(value) is wanted else NotImplemented


def _problem(key: str, value: Any) -> str:
    if key in ("every", "rows", "steps_per_false_alarm") and value < 1:
        return f"must be at least 1, got {value}"
    if key == "windows" and (not value or min(value) < 1):
        return f"must be steps of at least 1, got {value!r}"
    if key == "budget" and value is not None and not 0 < value < 1:
        return f"must be a share of a step's time between 0 and 1, got {value}"
    if key == "merge_timeout" and not value > 0:
        return f"must be seconds, more than 0, got {value}"
    if key == "debounce" and value < 0:
        return f"must be steps, at least 0, got {value}"
    several = value.split(",") if key == "on_alarm" else [value]
    for name in [name.strip() for name in several] if key in CHOICES else ():
        if name not in CHOICES[key]:
            return f"must be one of {', '.join(CHOICES[key])}, got {name!r}{nearest(name, CHOICES[key])}"
    for family in value or () if key == "monitors" else ():
        if family not in FAMILIES and family not in GROUPS:
            known = (*FAMILIES, *GROUPS)
            return f"names {family!r}{nearest(family, known)}; there are {', '.join(known)}"
    return next(filter(None, map(wrong_sink, value)), "") if key == "sinks" else ""
