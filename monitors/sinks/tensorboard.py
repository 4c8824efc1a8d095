"""Curves, distributions and alarms in TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.monitors.sinks.optional import needed
from foreshock.monitors.sinks.queued import QueuedSink
from foreshock.monitors.sinks.selection import Point, Selection
from foreshock.records import Alarm, Reading

FLUSH = 10  # seconds


class TensorBoardSink(QueuedSink):
    """Scalars by `Point.name`, and alarms as text under ``alarms``; NaN and infinity as they are.

    ``histograms``: of a vector over heads or experts also the distribution of its finite entries. ``metrics`` and ``each`` are
    those of `Selection`. In a folder that holds later steps of the same run, as after a resume, TensorBoard hides these.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] = "runs/tensorboard",
        *,
        metrics: Sequence[str] | None = None,
        each: bool = False,
        histograms: bool = False,
    ) -> None:
        super().__init__()
        self.folder, self.histograms = Path(folder), histograms
        self.selection = Selection(metrics, each)
        self._library = needed("torch.utils.tensorboard", "TensorBoardSink", "tensorboard")
        self._writer: Any = None

    def _send(self, step: int, readings: Sequence[Reading]) -> None:
        writer = self._writer_from(step)
        for point in self.selection.points(readings):
            writer.add_scalar(point.name, point.value, step)
        for reading in readings if self.histograms else ():
            if reading.values.size > 1 and self.selection.wants(reading.metric):
                finite = reading.values[np.isfinite(reading.values)]
                if finite.size:
                    writer.add_histogram(Point(reading.metric, reading.site, "", 0.0).name, finite, step)

    def _tell(self, alarm: Alarm) -> None:
        writer = self._writer_from(alarm.step)
        told = "\n".join(f"- {line}" for line in alarm.evidence)
        writer.add_text("alarms", f"**{alarm.severity}**, {alarm.since}: {alarm.message}\n\n{told}", alarm.step)
        writer.flush()

    def _writer_from(self, step: int) -> Any:
        """The writer; it is made with the first step, from which on older events of this folder are hidden."""
        if self._writer is None:
            self._writer = self._library.SummaryWriter(str(self.folder), purge_step=step, flush_secs=FLUSH)
        return self._writer

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def __str__(self) -> str:
        return f"TensorBoardSink({str(self.folder)!r})"
