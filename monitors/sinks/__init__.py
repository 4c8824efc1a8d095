"""Where alarms and readings go, besides the run folder. Libraries are imported by the sink that needs them, when it is made."""

from __future__ import annotations

from foreshock.monitors.sinks.console import ConsoleSink
from foreshock.monitors.sinks.jsonl import JsonlSink
from foreshock.monitors.sinks.mlflow import MlflowSink
from foreshock.monitors.sinks.names import named, receivers
from foreshock.monitors.sinks.prometheus import PrometheusSink
from foreshock.monitors.sinks.queued import QueuedSink
from foreshock.monitors.sinks.sink import Sink
from foreshock.monitors.sinks.tensorboard import TensorBoardSink
from foreshock.monitors.sinks.wandb import WandbSink

__all__ = [
    "ConsoleSink",
    "JsonlSink",
    "MlflowSink",
    "PrometheusSink",
    "QueuedSink",
    "Sink",
    "TensorBoardSink",
    "WandbSink",
    "named",
    "receivers",
]
