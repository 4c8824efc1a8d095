"""Curves and alarms in MLflow."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from typing import Any

from foreshock.monitors.sinks.optional import needed
from foreshock.monitors.sinks.queued import QueuedSink
from foreshock.monitors.sinks.selection import Selection
from foreshock.records import Alarm, Reading

AT_ONCE = 1000  # metrics that one request may carry
_REFUSED = re.compile(r"[^/\w.\- :]")  # characters that MLflow allows in no name


class MlflowSink(QueuedSink):
    """Metrics by `Point.name` (characters that MLflow refuses become "-"). Alarms: the tags ``foreshock.alarms`` (how many) and
    ``foreshock.last_alarm``, and all of them in the artifact ``foreshock/alarms.md``.

    They go to ``run_id``, else to the run that is active where the sink is made, else to a run of its own in ``experiment``,
    ended with the watch. NaN and infinity are sent as they are; a tracking server over SQL keeps infinity as the largest number.
    ``metrics`` and ``each`` are those of `Selection`.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str = "foreshock",
        run_id: str | None = None,
        metrics: Sequence[str] | None = None,
        each: bool = False,
    ) -> None:
        super().__init__()
        self.selection, self.experiment = Selection(metrics, each), experiment
        self._library = needed("mlflow", "MlflowSink", "mlflow")
        active = self._library.active_run() if run_id is None else None
        self.run_id = run_id if active is None else active.info.run_id
        self._is_own = self.run_id is None
        self._uri = tracking_uri
        self._client: Any = None
        self._alarms: list[Alarm] = []

    def _open(self) -> None:
        self._client = self._library.MlflowClient(tracking_uri=self._uri)
        if self.run_id is None:
            found = self._client.get_experiment_by_name(self.experiment)
            number = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
            self.run_id = self._client.create_run(number).info.run_id

    def _send(self, step: int, readings: Sequence[Reading]) -> None:
        now, make = int(time.time() * 1000), self._library.entities.Metric
        points = (make(_REFUSED.sub("-", p.name), p.value, now, step) for p in self.selection.points(readings))
        while part := list(itertools.islice(points, AT_ONCE)):
            self._client.log_batch(self.run_id, metrics=part)

    def _tell(self, alarm: Alarm) -> None:
        self._alarms.append(alarm)
        self._client.set_tag(self.run_id, "foreshock.alarms", str(len(self._alarms)))
        self._client.set_tag(self.run_id, "foreshock.last_alarm", f"step {alarm.step}: {alarm.message}")
        page = "\n".join(f"- step {a.step} ({a.since}) {a.severity}: {a.message}" for a in self._alarms)
        self._client.log_text(self.run_id, page + "\n", "foreshock/alarms.md")

    def _finish(self) -> None:
        if self._is_own and self.run_id is not None:
            self._client.set_terminated(self.run_id)
