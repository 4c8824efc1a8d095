"""Which key of a checkpoint is which parameter of a model, where the two are nested differently.

Wrappers (`torch.compile`, DDP, FSDP, activation checkpointing) put words into names: they are left out of both. Beyond that a
key is a parameter's if it has its name, or its name behind a change of prefix that is known (`KNOWN`) and that is the same for
all parameters asked for. A name as it is comes first. Keys that merely end alike are another model's, and refused.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foreshock.series import nearest

WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# What trainers and libraries put a whole model below: in a file (`{"model": ...}`, Lightning's state_dict, DCP's app) or as an
# attribute (a head's base model, PEFT's base_model.model).
KNOWN = frozenset({"model", "state_dict", "model_state_dict", "state", "app", "base_model"})
Renamed = Callable[[str], tuple[str, bool]]  # (the model's name for a saved key, whether its numbers change on the way)


def as_saved(key: str) -> tuple[str, bool]:
    """The key itself."""
    return key, False


@dataclass(frozen=True, slots=True)
class _Change:
    """Of prefixes: the model's ``ours`` is ``theirs`` in the checkpoint."""

    ours: str = ""
    theirs: str = ""

    def __call__(self, name: str) -> str | None:
        return self.theirs + name.removeprefix(self.ours) if name.startswith(self.ours) else None


AS_IT_IS = _Change()


class Keys:
    """The keys of a checkpoint, to be asked for parameters.

    ``prefix``: only keys below it, without it. ``words``: further words, beside `KNOWN`, that may stand before all names; of a
    model of transformers the one that it has for its base.
    """

    def __init__(
        self, keys: Iterable[str], renamed: Renamed = as_saved, prefix: str = "", words: Iterable[str] = ()
    ) -> None:
        self.prefix = f"{prefix.rstrip('.')}." if prefix else ""
        self.words = KNOWN | set(words)
        self._whole: dict[str, list[tuple[str, str]]] = {}  # names without wrappers, to those with them and the keys
        self._changed: dict[str, str] = {}
        for key in sorted(keys):
            if not key.startswith(self.prefix):
                continue
            name, changed = renamed(key.removeprefix(self.prefix))
            if changed:
                self._changed[_plain(name)] = key
            else:
                self._whole.setdefault(_plain(name), []).append((name, key))

    def find(self, names: Mapping[str, Iterable[str]]) -> tuple[dict[str, str], dict[str, str]]:
        """Of each parameter, named with its other names, the key; and of those that have none the reason."""
        found: dict[str, str] = {}
        reasons: dict[str, str] = {}
        every = {name: (name, *others) for name, others in names.items()}
        changes = self._fitting_all(list(every.values()))
        for name, others in every.items():
            fitting = [key for change in changes for key in self._under(change, others)]
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

    def _fitting_all(self, every: Sequence[Sequence[str]]) -> list[_Change]:
        """The changes that lead each parameter to a key; of them, or if there is none, names as they are."""
        ours = set(self._heads(_plain(every[0][0]))) if every else set()
        theirs = {head for name in (*self._whole, *self._changed) for head in self._heads(name)}
        changes = [_Change(a, b) for a, b in itertools.product(sorted(ours), sorted(theirs)) if _last(a) != _last(b)]
        fitting = [
            c
            for c in (AS_IT_IS, *changes)
            if all(self._under(c, names) or self._converted(c, names) for names in every)
        ]
        return [AS_IT_IS] if AS_IT_IS in fitting or not fitting else fitting

    def _under(self, change: _Change, names: Sequence[str]) -> list[str]:
        """The keys of a parameter: of one that has wrappers where the model has them, that one."""
        for name in names:
            saved = self._whole.get(change(_plain(name)) or "", [])
            if saved:
                return [key for own, key in saved if own == name] or [key for _, key in saved]
        return []

    def _converted(self, change: _Change, names: Sequence[str]) -> str:
        """The key of what transformers makes this parameter of."""
        return next((key for name in names if (key := self._changed.get(change(_plain(name)) or ""))), "")

    def _heads(self, name: str) -> Iterator[str]:
        """What may stand before a name and stands before this one: nothing, and each run of such words."""
        parts = name.split(".")
        for end, part in enumerate(parts):
            yield ".".join((*parts[:end], ""))
            if part not in self.words:
                return

    def _reason(self, name: str, fitting: list[str], suggest: bool) -> str:
        """``suggest``: look for keys that are spelled alike, which takes a second where there are many."""
        if fitting:
            return f"{name} could be any of {', '.join(fitting[:4])}; say which with --prefix"
        plain = _plain(name)
        changed = [key for known, key in self._changed.items() if known == plain or plain.endswith(f".{known}")]
        if changed:
            return f"{name} is stored otherwise ({changed[0]}), and transformers converts it while loading"
        missing = f"{name} is not in the checkpoint{f' below {self.prefix}' if self.prefix else ''}"
        alike = [keys[0][1] for other, keys in self._whole.items() if _end_alike(plain, other)]
        if alike:
            known = ", ".join(sorted(self.words))
            told = f"words in front may differ if they are known ({known}) and differ alike for all parameters"
            return f"{missing}; of what ends alike ({', '.join(alike[:4])}) nothing is taken: {told}; or give --prefix"
        return f"{missing}{nearest(name, list(self._whole)) if suggest else ''}"


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


def base_words(model: Any) -> tuple[str, ...]:
    """What a model of transformers calls its base, which may be saved without its head or with one (``transformer``, ``bert``)."""
    word = getattr(model, "base_model_prefix", "")
    return (word,) if word and hasattr(model, "main_input_name") else ()


def aliases(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Each parameter's first name, with the others of one that is shared."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: tuple(others) for first, *others in names.values()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _last(head: str) -> str | None:
    """The word next to the name."""
    return head.split(".")[-2] if head else None


def _end_alike(one: str, other: str) -> bool:
    return one.endswith(f".{other}") or other.endswith(f".{one}")
