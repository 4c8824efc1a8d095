"""foreshock: early warning for large-model training, inserted by a `torch.compile` backend."""

from __future__ import annotations

from foreshock.checkpoints import CheckpointGuard
from foreshock.default import default_watch, instrumented
from foreshock.errors import AlarmRaised, ConfigError, ForeshockError, PatternError, RunError
from foreshock.reader import Run, open_run
from foreshock.records import Alarm, Coverage, Probe, Reading, Site, SiteStatus, WeightView
from foreshock.survey import sites
from foreshock.watch import Watch

__version__ = "0.1.0"

__all__ = [
    "Alarm",
    "AlarmRaised",
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
    "sites",
]
