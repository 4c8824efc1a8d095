"""foreshock: early warning for large-model training, inserted by a `torch.compile` backend.

Names are imported when they are first asked for, so that the command line answers without importing torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock.checkpoints import CheckpointGuard
    from foreshock.default import default_watch, instrumented
    from foreshock.errors import AlarmRaised, CheckpointError, ConfigError, ForeshockError, PatternError, RunError
    from foreshock.reader import Run, open_run
    from foreshock.records import Alarm, Coverage, Probe, Reading, Site, SiteStatus, WeightView
    from foreshock.scanning import scan
    from foreshock.survey import sites
    from foreshock.watch import Watch

__version__ = "0.1.0"

__all__ = [
    "Alarm",
    "AlarmRaised",
    "CheckpointError",
    "CheckpointGuard",
    "ConfigError",
    "Coverage",
    "ForeshockError",
    "PatternError",
    "Probe",
    "Reading",
    "Run",
    "RunError",
    "Site",
    "SiteStatus",
    "Watch",
    "WeightView",
    "default_watch",
    "instrumented",
    "open_run",
    "scan",
    "sites",
]
_FROM = {
    "checkpoints": ("CheckpointGuard",),
    "default": ("default_watch", "instrumented"),
    "errors": ("AlarmRaised", "CheckpointError", "ConfigError", "ForeshockError", "PatternError", "RunError"),
    "reader": ("Run", "open_run"),
    "records": ("Alarm", "Coverage", "Probe", "Reading", "Site", "SiteStatus", "WeightView"),
    "scanning": ("scan",),
    "survey": ("sites",),
    "watch": ("Watch",),
}
_MODULES = {name: module for module, names in _FROM.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(importlib.import_module(f"foreshock.{_MODULES[name]}"), name)
        globals()[name] = found
        return found
    if not name.startswith("__") and importlib.util.find_spec(f"foreshock.{name}") is not None:
        return importlib.import_module(f"foreshock.{name}")
    raise AttributeError(f"module 'foreshock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
