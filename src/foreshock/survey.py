"""Say what would be watched in a model: one forward pass is captured, nothing is trained or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from foreshock.config import Settings
from foreshock.errors import ConfigError
from foreshock.records import Coverage, SiteStatus
from foreshock.watch import Watch


class _Survey(Watch):
    """Captures and counts, and never samples."""

    def is_sampled(self, step: int) -> bool:
        return False

    def _catch_up(self, wait: bool = True) -> None:
        """Nothing was sampled."""

    def _statuses(self) -> tuple[SiteStatus, ...]:
        return tuple(instance.status() for instance in self.instances)


def sites(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Coverage:
    """Capture one forward pass of ``model`` and say what would be watched; nothing is trained or written."""
    if not callable(model):
        raise ConfigError(
            f"looking for sites: received {type(model).__name__}; give a module and its forward arguments"
        )
    return survey(model, args, kwargs)


def survey(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    prepare: Callable[[Watch], None] = lambda watch: None,
) -> Coverage:
    """As `sites`; ``prepare(watch)`` is called before anything is captured."""
    with _Survey(settings=Settings(merge=False), inner="eager") as watch:
        prepare(watch)
        if isinstance(model, torch.nn.Module):
            watch.bind(model)
        torch.compile(model, backend=watch.backend)(*args, **kwargs)
        return watch.coverage
