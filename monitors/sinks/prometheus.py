"""The newest values and the count of alarms, for Prometheus to scrape."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from foreshock.errors import ForeshockError
from foreshock.monitors.metrics import metric
from foreshock.monitors.sinks.optional import needed
from foreshock.monitors.sinks.selection import Point, Selection
from foreshock.monitors.sinks.tally import COUNTS, MISSING, NONFINITE
from foreshock.records import Alarm, Reading

PORT = 9844
_COUNTED = {
    NONFINITE: "numbers so far that were infinite, or NaN where they must be finite",
    MISSING: "NaN so far, not available",
}


class PrometheusSink:
    """``http://127.0.0.1:9844/metrics``: a gauge a metric (``foreshock_attention_entropy_norm{site, part}``), ``foreshock_step``,
    and ``foreshock_alarms_total{mechanism, severity, site}`` with ``foreshock_last_alarm_step``. Values are the newest; what was
    not finite between two scrapes stays in ``foreshock_nonfinite_total{metric, site}`` and ``foreshock_missing_total``.

    It answers this machine alone unless ``address`` says otherwise: nobody is asked who they are. The port is taken with the
    first reading; 0 takes a free one, which ``port`` then says. ``metrics`` and ``each`` are those of `Selection`.
    """

    def __init__(
        self,
        port: int = PORT,
        address: str = "127.0.0.1",
        *,
        metrics: Sequence[str] | None = None,
        each: bool = False,
    ) -> None:
        self._library = needed("prometheus_client", "PrometheusSink", "prometheus")
        self._core = needed("prometheus_client.core", "PrometheusSink", "prometheus")
        self.port, self.address = port, address
        self.selection = Selection(metrics, each)
        self._lock = threading.Lock()  # scrapes come from the server's threads
        self._step = 0
        self._points: dict[tuple[str, str | None, str], Point] = {}
        self._alarms: Counter[tuple[str, str, str]] = Counter()
        self._last: dict[tuple[str, str, str], int] = {}
        self._server: Any = None

    def readings(self, step: int, readings: Sequence[Reading]) -> None:
        """Show these values from now on."""
        points = list(self.selection.points(readings))
        with self._lock:
            self._step = max(self._step, step)
            self._points |= {(point.metric, point.site, point.part): point for point in points}
        self._serve()

    def alarm(self, alarm: Alarm) -> None:
        """Count ``alarm``."""
        key = alarm.mechanism, alarm.severity, alarm.site or ""
        with self._lock:
            self._alarms[key] += 1
            self._last[key] = alarm.step
        self._serve()

    def close(self) -> None:
        """Give the port back."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def collect(self) -> Iterable[Any]:
        """What Prometheus's registry asks for at each scrape."""
        core = self._core
        with self._lock:
            points, step, alarms, last = list(self._points.values()), self._step, dict(self._alarms), dict(self._last)
        families: dict[str, Any] = {
            part: core.CounterMetricFamily(f"foreshock_{part}", told, labels=("metric", "site"))
            for part, told in _COUNTED.items()
        }
        for point in points:
            if point.part in COUNTS:
                families[point.part].add_metric((point.metric, point.site or ""), point.value)
                continue
            name = _name(point.metric)
            if name not in families:
                families[name] = core.GaugeMetricFamily(name, _formula(point.metric), labels=("site", "part"))
            families[name].add_metric((point.site or "", point.part), point.value)
        yield core.GaugeMetricFamily("foreshock_step", "the newest sampled optimizer step", value=step)
        yield from families.values()
        labels = ("mechanism", "severity", "site")
        counted = core.CounterMetricFamily("foreshock_alarms", "alarms so far", labels=labels)
        newest = core.GaugeMetricFamily("foreshock_last_alarm_step", "step of the newest such alarm", labels=labels)
        for key, count in alarms.items():
            counted.add_metric(key, count)
            newest.add_metric(key, last[key])
        yield counted
        yield newest

    def _serve(self) -> None:
        if self._server is None:
            registry = self._library.CollectorRegistry(auto_describe=False)
            registry.register(self)
            self._server, _ = self._library.start_http_server(self.port, self.address, registry)
            self.port = self._server.server_port


def _name(name: str) -> str:
    return "foreshock_" + re.sub(r"\W", "_", name)


def _formula(name: str) -> str:
    try:
        return metric(name).formula
    except ForeshockError:
        return name
