"""The watch of a process in which nobody makes one, and the backend over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foreshock.watch import Watch

_default: Watch | None = None


def default_watch() -> Watch:
    """The process-wide watch behind ``backend="foreshock"``, made on first use and closed at exit."""
    global _default
    if _default is None or _default.closed:
        _default = Watch()
    return _default


def instrumented(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
    """A `torch.compile` backend over the default watch: ``torch.compile(model, backend=foreshock.instrumented)``.

    ``mode`` and ``options`` of `torch.compile` go to the inner compiler. Raises `ConfigError` for a bad configuration.
    """
    return default_watch().backend(gm, example_inputs, **options)
