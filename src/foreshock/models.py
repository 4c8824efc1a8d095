"""Finds the model that a command names, without its weights: a callable of a module, or a Hugging Face config.

A model of a config is built on the meta device: no memory, no weights, and its graphs can be captured all the same.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from foreshock import _torch
from foreshock.errors import ConfigError
from foreshock.records import Coverage
from foreshock.survey import survey as model_survey
from foreshock.watch import Watch

BATCH, LENGTH = 2, 16
FRAMES, SAMPLES = 100, 16_000  # of audio, where a config does not say
MOST_PARAMETERS = 200_000_000  # of a model that is built with memory after all, when the meta device does not do
HINT = "give package.module:callable, where callable() returns (module, args, kwargs)"


@dataclass(frozen=True, slots=True)
class Example:
    """A module with the arguments of one forward pass."""

    module: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def is_meta(self) -> bool:
        """Whether it was built without memory."""
        return any(parameter.is_meta for parameter in self.module.parameters())


def is_model(target: str) -> bool:
    """Whether ``target`` names a model: a config, a folder with one, or ``package.module:callable``; not a script."""
    path = Path(target)
    return path.is_dir() or path.suffix == ".json" or (":" in target and not path.exists())


def examples(target: str, args: Sequence[str] = ()) -> Sequence[Callable[[], Example]]:
    """Ways to get a module and its inputs, the one to try first in front. Raises `ConfigError` for what names no model."""
    path = Path(target)
    if path.is_dir() or path.suffix == ".json":
        return _of_config(path)
    return [lambda: _called(target, args)]


def survey(target: str, args: Sequence[str], prepare: Callable[[Watch], None]) -> Coverage:
    """The ledger of one forward pass of the model that ``target`` names. Raises `ConfigError` if there is no way to run it."""
    return captured(target, args, prepare)[1]


def captured(
    target: str, args: Sequence[str] = (), prepare: Callable[[Watch], None] = lambda watch: None
) -> tuple[torch.nn.Module, Coverage]:
    """As `survey`, with the module, which the views of the ledger read as long as it is held."""
    failures: list[Exception] = []
    for example in examples(target, args):
        torch.compiler.reset()
        try:
            found = example()
            with _torch.constants_allowed() if found.is_meta() else nullcontext():
                return found.module, model_survey(found.module, found.args, found.kwargs, prepare)
        except ConfigError as error:
            failures.insert(0, error)
        except Exception as error:
            failures.append(error)
    if isinstance(failures[0], ConfigError):
        raise failures[0]
    what = str(failures[0]).strip().partition("\n")[0]
    raise ConfigError(f"running the model of {target}: {type(failures[0]).__name__}: {what}; {HINT}") from failures[0]


def _called(target: str, args: Sequence[str]) -> Example:
    name, _, attribute = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"looking for {target}: {error}; {HINT}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ConfigError(f"looking for {target}: it is {type(found).__name__}, not callable; {HINT}")
    made = found(*args)
    if isinstance(made, torch.nn.Module) and hasattr(made, "main_input_name"):
        return Example(made, (), _inputs(made, made.config, every=False, device="cpu"))
    parts = made if isinstance(made, tuple) else (made,)
    if not 2 <= len(parts) <= 3 or not isinstance(parts[0], torch.nn.Module):
        received = ", ".join(type(part).__name__ for part in parts)
        raise ConfigError(f"calling {target}: it returned ({received}); return (module, args, kwargs)")
    return Example(parts[0], tuple(parts[1]), parts[2] if len(parts) == 3 else {})


def _of_config(path: Path) -> Sequence[Callable[[], Example]]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"looking for a model at {path}: there is no {file}; {HINT}")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"building the model of {file}: transformers is not installed; pip install 'foreshock[hf]'"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(str(file))
    except Exception as error:
        raise ConfigError(f"reading {file}: {error}; {HINT}") from error
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    make = next(filter(None, named), transformers.AutoModel)

    def build(device: str, every: bool) -> Example:
        with torch.device(device):
            made = make._from_config(config) if hasattr(make, "_from_config") else make.from_config(config)
        return Example(made.train(), (), _inputs(made, config, every, device))

    def with_memory(every: bool) -> Example:
        size = sum(parameter.numel() for parameter in build("meta", every).module.parameters())
        if size > MOST_PARAMETERS:
            raise ConfigError(
                f"capturing {file}: it does not run on the meta device, and {size:,} parameters are too many"
            )
        return build("cpu", every)

    every = (False, True)
    return [functools.partial(build, "meta", way) for way in every] + [
        functools.partial(with_memory, way) for way in every
    ]


def _inputs(module: Any, config: Any, every: bool, device: str) -> dict[str, torch.Tensor]:
    """The main input of ``module``, or ``every`` one of its forward arguments that is understood."""
    takes = inspect.signature(module.forward).parameters
    wanted = [name for name in _KNOWN if name in takes and (every or name == module.main_input_name)]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        wanted.append("decoder_input_ids")
    if not wanted:
        known = ", ".join(_KNOWN)
        raise ConfigError(f"guessing the inputs of {type(module).__name__}: it takes none of {known}; {HINT}")
    with torch.device(device):
        return {name: (_KNOWN.get(name) or _tokens)(config) for name in wanted}


def _tokens(config: Any) -> torch.Tensor:
    return torch.ones(BATCH, LENGTH, dtype=torch.long)


def _pixels(config: Any) -> torch.Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return torch.zeros(BATCH, getattr(vision, "num_channels", 3), height, width)


def _features(config: Any) -> torch.Tensor:
    positions = getattr(config, "max_source_positions", None)
    frames = FRAMES if positions is None else 2 * positions
    return torch.zeros(BATCH, getattr(config, "num_mel_bins", 80), frames)


def _samples(config: Any) -> torch.Tensor:
    return torch.zeros(BATCH, SAMPLES)


_KNOWN: Mapping[str, Callable[[Any], torch.Tensor]] = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _samples,
}
