"""Curves and alerts in Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foreshock.monitors.sinks.optional import needed
from foreshock.monitors.sinks.queued import QueuedSink
from foreshock.monitors.sinks.selection import Selection
from foreshock.records import Alarm, Reading

STEP = "foreshock/step"


class WandbSink(QueuedSink):
    """Curves by `Point.name` over ``foreshock/step``, and each alarm as an alert; NaN and infinity as they are.

    With ``run`` (``wandb.run``, say) the numbers join the script's own rows: they never begin a row, for a row of ours would move
    the step that the script counts, and W&B drops what is logged at an earlier one. So the curves have a point a row of the
    script's; the run folder has all, and the counts of what was not finite lose none. Without ``run`` a run is begun with the
    first reading, ``wandb.init(project=project, **init)``, and finished in the end. ``metrics`` and ``each`` are those of
    `Selection`.
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        run: Any = None,
        metrics: Sequence[str] | None = None,
        each: bool = False,
        **init: Any,
    ) -> None:
        super().__init__()
        self.selection = Selection(metrics, each)
        self._library = needed("wandb", "WandbSink", "wandb")
        quiet = self._library.Settings(console="off")  # what the script prints is none of this run's
        self._init = {"project": project, "job_type": "foreshock", "reinit": "create_new", "settings": quiet, **init}
        self._run, self._is_own = run, run is None
        if (
            self._is_own
        ):  # its service ends at exit, the last to start first: it must outlive the watch that is made next
            self._library.setup()
        self._defined: set[str] = set()

    def _open(self) -> None:
        if self._is_own:
            self._run = self._library.init(**self._init)
        self._run.define_metric(STEP, hidden=True)

    def _send(self, step: int, readings: Sequence[Reading]) -> None:
        row = {point.name: point.value for point in self.selection.points(readings)}
        if not row:
            return
        for name in row.keys() - self._defined:
            self._run.define_metric(name, step_metric=STEP)
        self._defined |= row.keys()
        self._run.log(row | {STEP: step}, commit=self._is_own)

    def _tell(self, alarm: Alarm) -> None:
        levels = self._library.AlertLevel
        level = levels.ERROR if alarm.severity == "critical" else levels.WARN
        title = f"foreshock: {alarm.mechanism} at step {alarm.step}"
        told = "\n".join((f"{alarm.severity}, {alarm.since}: {alarm.message}", *alarm.evidence))
        self._run.alert(title=title, text=told, level=level, wait_duration=0)

    def _finish(self) -> None:
        if self._is_own:
            self._run.finish()
