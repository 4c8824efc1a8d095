"""What a framework's log is told: alarms and chosen readings, as flat names with numbers and words."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from foreshock.monitors.sinks.selection import folded
from foreshock.monitors.sinks.tally import Tally
from foreshock.records import Alarm, Reading
from foreshock.watch import Watch

Entry = dict[str, float | str]


class Entries:
    """Listens to ``watch``, and keeps what it says until the framework asks.

    ``metrics``: names of metrics or patterns of them (``law/*``) whose last reading is kept; of heads and experts the mean and
    the largest, and of what was not finite, also before the last reading, a count (`Tally`). Alarms are those that act: each
    fault once (docs/acting.md). Of ranks that are merged each hears them, at one step; readings come to the rank that writes the
    run.
    """

    def __init__(self, watch: Watch, metrics: Sequence[str] = ()) -> None:
        self.watch, self._metrics = watch, tuple(metrics)
        self._alarms: list[Alarm] = []
        self._readings: dict[str, float] = {}
        self._told = 0
        self._tally = Tally()
        watch.acting.row = (*watch.acting.row, self._alarms.append)
        watch.collector.sinks.append(self)

    def alarms(self) -> list[Entry]:
        """One entry for each alarm since the last call. ``foreshock/alarms`` counts them."""
        heard = list(self._alarms)
        del self._alarms[: len(heard)]
        self._told += len(heard)
        return [_entry(alarm, self._told - len(heard) + i + 1) for i, alarm in enumerate(heard)]

    def readings(self, step: int, readings: Sequence[Reading]) -> None:
        """As a sink of the watch."""
        for reading in readings:
            if any(fnmatchcase(reading.metric, pattern) for pattern in self._metrics):
                counts = {_name(part, reading): float(n) for part, n in self._tally.add(reading).items()}
                self._readings |= _numbers(reading) | counts

    def latest(self) -> Entry:
        """The chosen readings that came since the last call."""
        latest: Entry = dict(self._readings)
        self._readings.clear()
        return latest

    def alarm(self, alarm: Alarm) -> None:
        """As a sink it would hear every alarm; what acts is enough for a log."""

    def close(self) -> None:
        """Nothing is held open."""


def numbers(entry: Entry) -> dict[str, float]:
    """``entry`` for a log that takes no words."""
    return {name: value for name, value in entry.items() if not isinstance(value, str)}


def _entry(alarm: Alarm, count: int) -> Entry:
    return {
        "foreshock/alarms": count,
        f"foreshock/{alarm.mechanism}": 1.0,  # the name, for logs that take no words
        "foreshock/onset": alarm.onset,
        "foreshock/step": alarm.step,
        "foreshock/critical": float(alarm.severity == "critical"),
        "foreshock/mechanism": alarm.mechanism,
        "foreshock/site": alarm.site or "",
        "foreshock/message": " ".join(alarm.message.split()),
    }


def _numbers(reading: Reading) -> dict[str, float]:
    if len(reading.values) == 1:
        return {_name("", reading): float(reading.values[0])}
    return {f"{_name('', reading)}/{fold}": folded(fold, reading.values) for fold in ("mean", "max")}


def _name(group: str, reading: Reading) -> str:
    return "/".join(filter(None, ("foreshock", group, reading.metric, reading.site)))
