"""Sinks by name, as settings and ``FORESHOCK_SINKS`` spell them: ``tensorboard:runs/tb, prometheus:9844``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from foreshock.errors import ConfigError
from foreshock.monitors.sinks.console import ConsoleSink
from foreshock.monitors.sinks.jsonl import JsonlSink
from foreshock.monitors.sinks.mlflow import MlflowSink
from foreshock.monitors.sinks.prometheus import PrometheusSink
from foreshock.monitors.sinks.tensorboard import TensorBoardSink
from foreshock.monitors.sinks.wandb import WandbSink


def _prometheus(where: str = "") -> PrometheusSink:
    address, _, port = where.rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"making the sink prometheus:{where}: give a port, or ADDRESS:PORT")
    return PrometheusSink(int(port), address or "127.0.0.1")


MAKERS: dict[str, Callable[..., Any]] = {
    "tensorboard": TensorBoardSink,  # :FOLDER
    "wandb": WandbSink,  # :PROJECT
    "mlflow": MlflowSink,  # :TRACKING URI
    "prometheus": lambda where=None: PrometheusSink() if where is None else _prometheus(where),  # :PORT
    "jsonl": JsonlSink,  # :FILE
}


def problem(spec: str) -> str:
    """What is wrong with ``spec``, or nothing."""
    name = spec.partition(":")[0]
    return "" if name in MAKERS else f"names {spec!r}; there are {', '.join(f'{known}[:WHERE]' for known in MAKERS)}"


def named(spec: str) -> Any:
    """The sink that ``spec`` names. Raises ConfigError for a name that is none, or a library that is not installed."""
    if wrong := problem(spec):
        raise ConfigError(f"making a sink: it {wrong}")
    name, _, where = spec.partition(":")
    return MAKERS[name](where.strip()) if where.strip() else MAKERS[name]()


def receivers(*sinks: Iterable[Any]) -> list[Any]:
    """The console, and each of ``sinks``, made where it is a name."""
    given = [sink for row in sinks for sink in ([row] if isinstance(row, str) else row)]
    return [ConsoleSink(), *(named(sink) if isinstance(sink, str) else sink for sink in given)]
