"""Lightning Fabric, the real one: a broken kernel in the file of its logger, a healthy loop without alarms."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger

import foreshock
from foreshock.integrations.fabric import connect

ALARM = foreshock.Alarm(20, 10, None, "run/loss", 3.0, "< 1", "critical", "a fault", (), "it is off")
pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:.*isinstance.treespec, LeafSpec.*")


@pytest.mark.parametrize("broken", [True, False])
def test_alarms_reach_the_loggers_file_and_the_state_the_checkpoint(
    example: Callable[[str], ModuleType], tmp_path: Path, broken: bool
) -> None:
    module = example("fabric_loop")
    watch = module.train(tmp_path, 30, 15 if broken else None)
    told = [(row["step"], row["foreshock/onset"], row["foreshock/critical"]) for row in module.logged(tmp_path)]
    assert told == ([("17", "15", "1.0")] if broken else [])
    with (tmp_path / "log" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    readings = [row["step"] for row in rows if row["foreshock/law/euler/attention:layers.0.attention/max"]]
    assert readings == (["2", "7", "12", "17"] if broken else ["2", "7", "12", "17", "22", "27"])
    assert watch.step == (17 if broken else 30)
    with foreshock.Watch() as resumed:
        Fabric(accelerator="cpu").load(tmp_path / "saved.ckpt", {"watch": resumed})
        assert resumed.step == watch.step


def test_behind_an_alarm_the_logger_saves(tmp_path: Path) -> None:
    """Its file is written every hundred steps otherwise, and a run that dies before leaves none."""
    fabric, file = (
        Fabric(accelerator="cpu", loggers=CSVLogger(tmp_path)),
        tmp_path / "lightning_logs/version_0/metrics.csv",
    )
    with foreshock.Watch() as watch:
        tell = connect(fabric, watch, metrics=["run/loss"])
        for sink in watch.collector.sinks:
            sink.readings(0, [foreshock.Reading("run/loss", None, np.array([math.nan]))])
        tell()
        assert not file.exists()
        watch.acting.hear(ALARM, step=20)
        tell()
    rows = list(csv.DictReader(file.open()))
    assert [row["foreshock/nonfinite/run/loss"] for row in rows] == ["1.0", ""]
    assert [row["foreshock/a fault"] for row in rows] == ["", "1.0"]
