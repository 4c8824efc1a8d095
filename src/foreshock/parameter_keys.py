"""Which key of a checkpoint is which parameter of a model, where the two are nested differently.

Wrappers (`torch.compile`, DDP, FSDP, activation checkpointing) put words into names, trainers put names below a word of their
own, and a model saved for another head lacks one. A parameter is found by its name, else by the one key that ends with it, else
by the one key that it ends with. What fits two is told, never guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from foreshock.series import nearest

WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
Renamed = Callable[[str], tuple[str, bool]]  # (the model's name for a saved key, whether its numbers change on the way)


def as_saved(key: str) -> tuple[str, bool]:
    """The key itself."""
    return key, False


class Keys:
    """The keys of a checkpoint, to be asked for parameters. ``prefix``: only keys that begin with it, without it."""

    def __init__(self, keys: Iterable[str], renamed: Renamed = as_saved, prefix: str = "") -> None:
        self.prefix = prefix
        self._whole: dict[str, list[str]] = {}  # without wrappers, to the keys as they are
        self._ends: dict[str, list[str]] = {}  # each end of these, to them
        self._changed: dict[str, str] = {}
        for key in sorted(keys):
            if not key.startswith(prefix):
                continue
            own = key.removeprefix(prefix).removeprefix(".")
            name, changed = renamed(own)
            if changed:
                self._changed[_plain(name)] = key
                continue
            self._whole.setdefault(_plain(name), []).append(key)
        for name in self._whole:
            for end in _ends(name):
                self._ends.setdefault(end, []).append(name)

    def find(self, names: Mapping[str, Iterable[str]]) -> tuple[dict[str, str], dict[str, str]]:
        """Of each parameter, named with its other names, the key; and of those that have none the reason."""
        found: dict[str, str] = {}
        reasons: dict[str, str] = {}
        for name, others in names.items():
            answers = [self._find(_plain(each)) for each in (name, *others)]
            fitting = next((keys for keys in answers if keys), [])
            if len(fitting) == 1:
                found[name] = fitting[0]
            else:
                reasons[name] = self._reason(name, fitting, suggest=not reasons)
        claimed: dict[str, list[str]] = {}
        for name, key in found.items():
            claimed.setdefault(key, []).append(name)
        for key, several in claimed.items():
            for name in several if len(several) > 1 else ():
                del found[name]
                reasons[name] = f"the checkpoint's {key} could be any of {', '.join(several)}"
        return found, reasons

    def _find(self, name: str) -> list[str]:
        """The keys that fit; a key's whole name before its end, and that before an end of ``name``."""
        if name in self._whole:
            return self._whole[name]
        longer = self._ends.get(name, [])
        if longer:
            return [key for found in longer for key in self._whole[found]]
        return next((self._whole[end] for end in _ends(name) if end in self._whole), [])

    def _reason(self, name: str, fitting: list[str], suggest: bool) -> str:
        """``suggest``: look for keys that are spelled alike, which takes a second where there are many."""
        if fitting:
            return f"{name} could be any of {', '.join(fitting[:4])}; say which with --prefix"
        plain = _plain(name)
        changed = [key for known, key in self._changed.items() if known == plain or plain.endswith(f".{known}")]
        if changed:
            return f"{name} is stored otherwise ({changed[0]}), and transformers converts it while loading"
        where = f" below {self.prefix}" if self.prefix else ""
        return f"{name} is not in the checkpoint{where}{nearest(name, list(self._whole)) if suggest else ''}"


def renaming(model: Any) -> Renamed:
    """How transformers names what it saves of ``model``: for some families not as the model does. Of other models nothing."""
    if not hasattr(model, "main_input_name"):
        return as_saved
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        steps = get_model_conversion_mapping(model, add_legacy=False)
    except (ImportError, AttributeError, TypeError):  # transformers of before, or of after
        return as_saved
    return functools.partial(_renamed, [(step, hasattr(step, "operations")) for step in steps])


def _renamed(steps: list[tuple[Any, bool]], key: str) -> tuple[str, bool]:
    changed = False
    for step, converts in steps:
        key, pattern = step.rename_source_key(key)
        changed |= converts and pattern is not None
    return key, changed


def aliases(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Each parameter's first name, with the others of one that is shared."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: tuple(others) for first, *others in names.values()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _ends(name: str) -> Iterable[str]:
    """The ends of a dotted name that still say something, the longest first."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(1, max(2, len(parts) - 1)))
