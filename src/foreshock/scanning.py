"""Weight-side monitors over saved checkpoints: no training, no forward pass, and of the weights only those that are needed.

Where heads and experts are comes from capturing the model (without its weights), never from names; the numbers come from the
monitors that a watch runs, so that they are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.checkpoints import step_of
from foreshock.errors import CheckpointError, ConfigError
from foreshock.models import captured
from foreshock.monitors import RouterWeights, Spectra
from foreshock.monitors.spectra import standing
from foreshock.parameter_keys import Keys, aliases, base_words, renaming
from foreshock.records import Array, Coverage, Reading, Site, WeightView
from foreshock.saved import Saved, Shape, open_saved
from foreshock.survey import survey

Model = str | Path | tuple[Any, ...]  # what `foreshock sites` takes, or (module, args, kwargs)
Values = Mapping[str, Array]  # by metric
Progress = Callable[[int, int], None]
NO_WEIGHTS = "its weights were not found on the way back from it; `foreshock sites` says why"
ROLES = ("q_weight", "k_weight", "weight")


@dataclass(frozen=True, slots=True)
class Scanned:
    """One checkpoint: how much of it was read, and which parameters hold how many entries that are not finite.

    ``other_keys``: of the parameters that were read under another name than the model's, the keys.
    """

    path: str
    step: int | None
    read_keys: int
    read_bytes: int
    not_finite: Mapping[str, int]
    other_keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SiteScan:
    """One site. ``standing``: its metrics in each checkpoint; ``changes``: those of the change from each to the next."""

    site: Site
    standing: tuple[Values, ...]
    changes: tuple[Values, ...]


@dataclass(frozen=True, slots=True)
class Scan:
    """What `scan` found. ``left_out``: sites that could not be read, with the reason."""

    checkpoints: tuple[Scanned, ...]
    sites: tuple[SiteScan, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "checkpoints": [
                {name: getattr(one, name) for name in ("path", "step", "read_keys", "read_bytes")}
                | {"not_finite": dict(one.not_finite), "other_keys": dict(one.other_keys)}
                for one in self.checkpoints
            ],
            "sites": [
                {"site": scanned.site.to_json()}
                | {
                    name: [{metric: array.tolist() for metric, array in values.items()} for values in of]
                    for name, of in (("standing", scanned.standing), ("changes", scanned.changes))
                }
                for scanned in self.sites
            ],
            "left_out": dict(self.left_out),
        }


def scan(
    checkpoints: str | Path | Sequence[str | Path],
    model: Model | None = None,
    *,
    args: Sequence[str] = (),
    prefix: str = "",
    progress: Progress = lambda done, of: None,
) -> Scan:
    """The spectra of each attention's ``Wq Wk^T`` and the state of each router in saved weights, and what moved between them.

    ``checkpoints``: one or several in their order, files or folders: safetensors (single or sharded), `torch.save`,
    `torch.distributed.checkpoint`. ``model``: a Hugging Face ``config.json`` or its folder, ``package.module:callable`` (called
    with ``args``), or ``(module, args, kwargs)``; None takes the config beside the first checkpoint. ``prefix``: which keys are
    meant where several models are in one checkpoint.

    Raises CheckpointError for what cannot be read or is of another model, ConfigError for a model that cannot be had.
    """
    paths = [Path(x) for x in ([checkpoints] if isinstance(checkpoints, str | Path) else checkpoints)]
    if not paths:
        raise ConfigError("scanning checkpoints: got none; give the path of one, or of several in their order")
    opened = [open_saved(path) for path in paths]
    module, coverage = _captured(_beside(paths[0]) if model is None else model, args)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    others, renamed, words = aliases(module), renaming(module), base_words(module)
    left_out = {
        s.site.id: NO_WEIGHTS for s in coverage if not _views(s.site) and s.site.kind in ("attention", "router")
    }
    sites = {status.site.id: status.site for status in coverage if _views(status.site)}
    needed = list(dict.fromkeys(name for site in sites.values() for name in _names(site)))
    readers = []
    for saved in opened:
        keys = Keys(saved.shapes, renamed, prefix, words)
        found, reasons = keys.find({name: others.get(name, ()) for name in needed})
        _check(saved, found, shapes)
        readers.append(_Reader(saved, found))
        for id_, site in sites.items():
            lacking = [reasons[name] for name in _names(site) if name in reasons]
            if lacking:
                left_out.setdefault(id_, f"{saved.path}: {lacking[0]}")
    kept = [site for id_, site in sites.items() if id_ not in left_out]
    if not kept:
        what = next(iter(left_out.values()), "it has no attention and no router whose weights are known")
        raise CheckpointError(f"scanning {paths[0]} as {_named(model)}: nothing can be read: {what}")
    scanned = []
    for done, site in enumerate(kept):
        progress(done, len(kept))
        scanned.append(_scanned(site, readers))
    progress(len(kept), len(kept))
    return Scan(tuple(reader.summary() for reader in readers), tuple(scanned), left_out)


class _Reader:
    """A checkpoint with the keys of the model's parameters; it counts what is not finite."""

    def __init__(self, saved: Saved, keys: Mapping[str, str]) -> None:
        self.saved, self.keys = saved, keys
        self.not_finite: dict[str, int] = {}

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The parameters of these names."""
        found = self.saved.tensors([self.keys[name] for name in names])
        tensors = {name: found[self.keys[name]] for name in names}
        for name, tensor in tensors.items():
            broken = tensor.numel() - int(torch.isfinite(tensor).sum())
            if broken:
                self.not_finite[name] = broken
        return tensors

    def summary(self) -> Scanned:
        path, read = self.saved.path, self.saved.read_keys
        other = {name: key for name, key in self.keys.items() if key != name and key in read}
        return Scanned(str(path), step_of(path), len(read), self.saved.read_bytes, self.not_finite, other)


def on_tensors(site: Site, tensors: Mapping[str, Tensor]) -> Site:
    """``site`` with views that read ``tensors``, by the names of the parameters; whoever calls holds them."""
    views: dict[str, Any] = {role: _on_tensors(view, tensors) for role, view in _views(site).items()}
    return replace(site, **views)


def _on_tensors(view: WeightView, tensors: Mapping[str, Tensor]) -> WeightView:
    return replace(view, parameters=tuple(weakref.ref(tensors[name]) for name in view.names))


def _scanned(site: Site, readers: Sequence[_Reader]) -> SiteScan:
    """Two checkpoints' weights of the site are in memory at a time."""
    states, changes = [], []
    spectra = Spectra(windows=(1,))
    for step, reader in enumerate(readers):
        tensors = reader.read(_names(site))
        now = on_tensors(site, tensors)
        states.append(_by_metric([*standing([now]), *RouterWeights().update(step, [now])]))
        changes.append(_by_metric(spectra.update(step, [now])))
    return SiteScan(site, tuple(states), tuple(changes[1:]))


def _by_metric(readings: Sequence[Reading]) -> Values:
    return {reading.metric: np.asarray(reading.values, np.float64) for reading in readings}


def _views(site: Site) -> dict[str, WeightView]:
    """The views that are read; of an attention both or none."""
    views = {role: view for role in ROLES if (view := getattr(site, role)) is not None}
    if site.kind == "attention" and ("q_weight" not in views or "k_weight" not in views):
        return {}
    return views


def _names(site: Site) -> list[str]:
    return list(dict.fromkeys(name for view in _views(site).values() for name in view.names))


def _captured(model: Model, args: Sequence[str]) -> tuple[torch.nn.Module, Coverage]:
    if isinstance(model, str | Path):
        return captured(str(model), args)
    module, *rest = model if isinstance(model, tuple) else (model,)
    if not isinstance(module, torch.nn.Module) or len(rest) not in (1, 2):
        raise ConfigError(
            f"scanning: model is {model!r}; give a config.json, package.module:callable or (module, args, kwargs)"
        )
    return module, survey(module, tuple(rest[0]), rest[1] if len(rest) == 2 else {})


def _beside(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        told = "give its model with --model: a config.json, or package.module:callable"
        raise ConfigError(f"scanning {path}: there is no config.json beside it; {told}")
    return str(folder / "config.json")


def _check(saved: Saved, keys: Mapping[str, str], shapes: Mapping[str, Shape]) -> None:
    wrong = [
        f"{key} is {list(saved.shapes[key])}, the model's {name} is {list(shapes[name])}"
        for name, key in keys.items()
        if saved.shapes[key] != shapes[name]
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"scanning {saved.path}: it is of another model: {wrong[0]}{more}; give the one it was saved from"
        )


def _named(model: Model | None) -> str:
    return (
        "the model of its config.json"
        if model is None
        else str(model)
        if isinstance(model, str | Path)
        else "this model"
    )
