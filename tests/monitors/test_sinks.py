"""What sinks write, read back with each library's own reader, and what a broken or slow one does to training: nothing."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loop import Loop, identical

from foreshock import Watch
from foreshock.errors import ConfigError, RunError
from foreshock.monitors.sinks import (
    ConsoleSink,
    JsonlSink,
    MlflowSink,
    PrometheusSink,
    QueuedSink,
    Sink,
    TensorBoardSink,
    WandbSink,
    named,
    queued,
    receivers,
)
from foreshock.monitors.sinks.selection import DEFAULT, JUDGED, Selection
from foreshock.records import Alarm, Reading

SITE = "attention:layers.0#2"
ALARM = Alarm(20, 10, SITE, "law/euler", 3.0, "< 1", "critical", "kernel", ("one", "two"), "it is off", head=2)


def readings(step: int) -> list[Reading]:
    """A number, a vector, a vector with NaN and infinity, and what nobody judges."""
    return [
        Reading("run/loss", None, np.array([1.0 + step])),
        Reading("attention/entropy_norm", SITE, np.array([0.5, 0.25, 0.75])),
        Reading("law/euler", SITE, np.array([1.0, np.nan, np.inf])),
        Reading("router/z", "router:gate", np.array([np.nan])),
        Reading("attention/q_rms", SITE, np.array([1.0, 2.0])),
    ]


EXPECTED = {
    "run/loss": 21.0,
    f"attention.entropy_norm/{SITE}/min": 0.25,
    f"attention.entropy_norm/{SITE}/mean": 0.5,
    f"law.euler/{SITE}/max": math.inf,
    "router.z/router:gate": math.nan,
    f"nonfinite/law.euler/{SITE}": 2.0,  # the infinity of each of the two steps; a residual that is NaN is not available
    f"missing/law.euler/{SITE}": 2.0,
    "nonfinite/router.z/router:gate": 2.0,
}


def feed(sink: Any) -> None:
    """Two steps, 10 and 20, and an alarm at the second."""
    for step in (10, 20):
        sink.readings(step, readings(step))
    sink.alarm(ALARM)
    sink.close()


def same(one: dict[str, float], other: dict[str, float]) -> None:
    assert one.keys() == other.keys()
    np.testing.assert_array_equal([one[key] for key in one], [other[key] for key in one])


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    feed(TensorBoardSink(tmp_path, histograms=True))
    written = events.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    tags = written.Tags()
    same({tag: written.Scalars(tag)[-1].value for tag in tags["scalars"]}, EXPECTED)
    assert [event.step for event in written.Scalars("run/loss")] == [10, 20]
    assert written.Histograms(f"attention.entropy_norm/{SITE}")[0].histogram_value.max == 0.75
    [told] = [event for tag in tags["tensors"] for event in written.Tensors(tag)]
    assert told.step == 20
    assert b"it is off" in told.tensor_proto.string_val[0]


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start in (0, 5):
        sink = TensorBoardSink(tmp_path, metrics=["run/*"])
        for step in range(start, 10):
            sink.readings(step, [Reading("run/loss", None, np.array([float(start)]))])
        sink.close()
        time.sleep(1.1)  # files are named, and read, by the second
    written = events.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in written.Scalars("run/loss")] == [
        *((step, 0.0) for step in range(5)),
        *((step, 5.0) for step in range(5, 10)),
    ]


def wandb_records(folder: Path) -> list[Any]:
    """The records of an offline run, once its last is there: W&B's service may still be writing when a run is finished."""
    for _ in range(100):
        records = list(parsed(folder))
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    return records


def parsed(folder: Path) -> Iterator[Any]:
    """The records so far: a log as LevelDB's, in blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def wandb_rows(records: Sequence[Any]) -> list[dict[str, float]]:
    rows = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    flat = [{"/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in flat]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    return tmp_path


def test_wandb(offline: Path) -> None:
    feed(WandbSink("tests", dir=str(offline)))
    records = wandb_records(offline)
    rows = wandb_rows(records)
    assert [row.pop("foreshock/step") for row in rows] == [10, 20]
    same(rows[-1], EXPECTED)
    axes = {r.metric.name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert {axes[name] for name in EXPECTED} == {"foreshock/step"}
    [alert] = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.level) == ("foreshock: kernel at step 20", "ERROR")
    assert "it is off" in alert.text


LASTING = """
import time
from foreshock import Watch
from foreshock.monitors.sinks import WandbSink
from loop import Loop
watch = Watch(every=1, inner="eager", sinks=[WandbSink("tests")])
loop = Loop(watch.backend)
while not watch.collector.sinks[-1]._opened:  # W&B's own exit is registered by now, behind the watch's
    loop.step(loop.batch())
    time.sleep(0.05)
for _ in range(5):
    loop.step(loop.batch())
print(watch.step)
"""


@pytest.mark.slow
def test_wandb_hears_the_last_steps_of_a_script_that_just_ends(offline: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", LASTING], env=env, capture_output=True, text=True, check=True)
    rows = wandb_rows(wandb_records(offline))
    assert rows[-1]["foreshock/step"] == int(ran.stdout) - 1
    assert "Error" not in ran.stderr


def test_wandb_joins_a_run_without_moving_its_steps(offline: Path) -> None:
    """The script counts its own rows by epochs, far more slowly than we sample; none of them is dropped."""
    import wandb

    run = wandb.init(project="tests", dir=str(offline))
    sink = WandbSink(run=run, metrics=["run/*"])
    for epoch in range(3):
        run.log({"epoch/loss": epoch}, step=epoch)
        for step in range(10):
            loss = math.nan if step == 5 else step  # between two rows of the script, where W&B keeps the last
            sink.readings(10 * epoch + step, [Reading("run/loss", None, np.array([float(loss)]))])
            while sink._waiting:
                time.sleep(0.001)
    sink.close()
    run.finish()
    rows = wandb_rows(wandb_records(offline))
    assert [row["epoch/loss"] for row in rows] == [0, 1, 2]
    assert rows[-1]["foreshock/step"] == 29
    assert {row.get("run/loss", 9.0) for row in rows} == {9.0}
    assert rows[-1]["nonfinite/run/loss"] == 3.0


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr("foreshock.monitors.sinks.mlflow.AT_ONCE", 4)
    where = (tmp_path / "mlruns").as_uri()
    sink = MlflowSink(where)
    feed(sink)
    client = mlflow.MlflowClient(tracking_uri=where)
    run = client.get_run(sink.run_id)
    assert (run.info.status, run.data.tags["foreshock.alarms"]) == ("FINISHED", "1")
    assert run.data.tags["foreshock.last_alarm"] == "step 20: it is off"
    same(run.data.metrics, {name.replace("#", "-"): value for name, value in EXPECTED.items()})
    assert [metric.step for metric in client.get_metric_history(sink.run_id, "run/loss")] == [10, 20]
    page = Path(client.download_artifacts(sink.run_id, "foreshock/alarms.md", str(tmp_path))).read_text()
    assert page == "- step 20 (since about step 10) critical: it is off\n"


def test_mlflow_joins_the_active_run_and_leaves_it_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    try:
        with mlflow.start_run() as run:
            feed(MlflowSink())
            assert mlflow.MlflowClient().get_run(run.info.run_id).info.status == "RUNNING"
        assert mlflow.get_run(run.info.run_id).data.metrics["run/loss"] == 21.0
    finally:
        mlflow.set_tracking_uri("")


def test_prometheus() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    sink = PrometheusSink(0)
    for step in (10, 20):
        sink.readings(step, readings(step))
    sink.alarm(ALARM)
    sink.alarm(ALARM)
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
        families = list(parser.text_string_to_metric_families(answer.read().decode()))
    found = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
    assert found["foreshock_step",] == 20
    assert found["foreshock_run_loss", "", ""] == 21.0
    assert found["foreshock_attention_entropy_norm", SITE, "min"] == 0.25
    assert found["foreshock_law_euler", SITE, "max"] == math.inf
    assert math.isnan(found["foreshock_router_z", "", "router:gate"])
    counts = {key: value for key, value in found.items() if "nonfinite" in key[0] or "missing" in key[0]}
    assert counts == {
        ("foreshock_nonfinite_total", SITE, "law/euler"): 2,
        ("foreshock_nonfinite_total", "router/z", "router:gate"): 2,
        ("foreshock_missing_total", SITE, "law/euler"): 2,
    }
    assert found["foreshock_alarms_total", SITE, "critical", "kernel"] == 2
    assert found["foreshock_last_alarm_step", SITE, "critical", "kernel"] == 20
    sink.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10)


def test_prometheus_answers_this_machine_alone() -> None:
    pytest.importorskip("prometheus_client")
    sink = PrometheusSink(0)
    sink.readings(1, readings(1))
    assert sink._server.server_address[0] == "127.0.0.1"
    sink.close()


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "below" / "run.jsonl"
    feed(JsonlSink(path))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 30, "met')  # a process was killed there
    feed(JsonlSink(path, metrics=["run/*"]))
    lines = path.read_text().splitlines()
    assert len(lines) == 11 + 1 + 3
    rows = [json.loads(line) for line in [*lines[:11], *lines[12:]]]
    assert rows[2] == {"step": 10, "metric": "law/euler", "site": SITE, "values": [1.0, "nan", "inf"]}
    assert Alarm.from_json(rows[10]["alarm"]) == ALARM
    assert [row.get("metric") for row in rows[11:]] == ["run/loss", "run/loss", None]


def test_a_file_of_lines_is_whole_after_every_step(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "run.jsonl")
    for step in range(3):
        sink.readings(step, readings(step))
        until(lambda lines=5 * (step + 1): sink.path.exists() and sink.path.read_text().count("\n") == lines)
    sink.close()


def until(holds: Any) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_what_goes_out_by_default_is_what_is_judged() -> None:
    """And a user's own; a model of 32 layers with attention and router is some 800 curves."""
    selection = Selection()
    assert all(selection.wants(metric) for metric in JUDGED)
    assert selection.wants("mine/number")
    assert not selection.wants("attention/q_rms")
    assert not selection.wants("router/gate_mass")
    assert sum(len(folds) for folds in JUDGED.values()) <= 36
    assert len(set(DEFAULT)) == len(DEFAULT)


def test_each_entry_and_globs() -> None:
    points = Selection(["attention/*"], each=True).points(readings(1))
    assert [(point.metric, point.part, point.value) for point in points] == [
        *(("attention/entropy_norm", str(i), value) for i, value in enumerate((0.5, 0.25, 0.75))),
        ("attention/q_rms", "0", 1.0),
        ("attention/q_rms", "1", 2.0),
    ]
    folded = [point.part for point in Selection(["attention/q_rms"]).points(readings(1))]
    assert folded == ["min", "mean", "max"]
    with pytest.raises(ConfigError, match="give a list"):
        Selection("law/*")


# -- by name -----------------------------------------------------------------------------------------------------------


def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client")
    monkeypatch.setenv("FORESHOCK_SINKS", f"jsonl:{tmp_path / 'a.jsonl'}, prometheus:0")
    with Watch(sinks=[f"jsonl:{tmp_path / 'b.jsonl'}"], every=1, inner="eager", strict=True) as watch:
        kinds = [type(sink) for sink in watch.collector.sinks]
        assert kinds == [ConsoleSink, JsonlSink, PrometheusSink, JsonlSink]
        watch.log(loss=1.0)
        Loop(watch.backend).run(steps=2)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text() != ""
    monkeypatch.setenv("RANK", "3")
    assert str(named("jsonl:a-{rank}.jsonl")) == "JsonlSink('a-3.jsonl')"


@pytest.mark.parametrize(
    ("spec", "told"),
    [("tensorbord", "names 'tensorbord'"), ("prometheus:here", "give a port"), ("", "names ''")],
)
def test_a_wrong_name(spec: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        named(spec)


def test_a_wrong_name_in_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORESHOCK_SINKS", "jsonl,prometeus:9")
    with pytest.raises(ConfigError, match="FORESHOCK_SINKS: sinks names 'prometeus:9'"):
        Watch()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "prometheus"])
def test_a_missing_library_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in list(sys.modules):
        if module.split(".")[0] in (name, f"{name}_client") or module.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}_client", None)
    with pytest.raises(ConfigError, match=rf"pip install 'foreshock\[{name}\]'"):
        named(name)


def test_all_are_sinks() -> None:
    assert isinstance(JsonlSink(), Sink)
    assert [type(sink) for sink in receivers("jsonl")] == [ConsoleSink, JsonlSink]


# -- beside training ---------------------------------------------------------------------------------------------------


class Slow(QueuedSink):
    """Waits to be let go at its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.seen = threading.Event(), []

    def _send(self, step: int, readings: Sequence[Reading]) -> None:
        self.go.wait(60)
        self.seen.append(step)

    def _tell(self, alarm: Alarm) -> None:
        self.seen.append(alarm)


class Failing(Slow):
    def _send(self, step: int, readings: Sequence[Reading]) -> None:
        super()._send(step, readings)
        raise OSError(f"no network at {step}")


@pytest.mark.parametrize("kind", [Slow, Failing])
def test_training_neither_waits_nor_changes(kind: type[Slow], caplog: pytest.LogCaptureFixture) -> None:
    plain = Loop("aot_eager").run()
    sink = kind()
    with caplog.at_level(logging.WARNING, "foreshock"), Watch(every=1, inner="aot_eager", sinks=[sink]) as watch:
        watched = Loop(watch.backend).run()
        watch.flush()
        assert sink.seen == []  # all six steps were trained and worked off while the sink stood still
        sink.go.set()
    assert identical(plain, watched)
    assert sink.seen == list(range(6))
    told = [record.message for record in caplog.records if "no network" in record.message]
    assert len(told) == (kind is Failing)
    assert bool(watch.coverage.warnings) == (kind is Failing)


def test_more_than_it_can_take_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued, "MOST_WAITING", 4)
    sink = Slow()
    sink.readings(0, [])
    until(lambda: not sink._waiting)
    broken = [Reading("run/loss", None, np.array([math.nan]))]
    for step in range(1, 5):
        sink.readings(step, broken)
    sink.alarm(ALARM)
    with pytest.raises(RunError, match="the readings of 1 steps were left out"):
        sink.readings(5, [])
    sink.go.set()
    sink.close()
    assert sink.seen == [0, 2, 3, 4, ALARM, 5]
    assert [point.value for point in sink.selection.points(broken)][1:] == [2.0]  # that of step 1, and this one


def test_closing_does_not_wait_for_ever() -> None:
    sink = Slow()
    sink.patience = 0.05
    sink.readings(0, [])
    sink.readings(1, [])
    with pytest.raises(RunError, match=r"not done after 0.05 s; 1 entries"):
        sink.close()
    sink.go.set()


def test_nothing_is_opened_where_another_rank_speaks(tmp_path: Path) -> None:
    sinks = [JsonlSink(tmp_path / "a.jsonl"), TensorBoardSink(tmp_path / "tb")]
    for sink in sinks:
        sink.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_and_lines_say_the_same(tmp_path: Path) -> None:
    with Watch(tmp_path / "run", every=1, inner="eager", sinks=[JsonlSink(tmp_path / "run.jsonl")]) as watch:
        Loop(watch.backend).run(steps=3)
        steps, values = watch.series("attention/q_rms")
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    found = {row["step"]: row["values"] for row in rows if row["metric"] == "attention/q_rms"}
    assert list(found) == steps.tolist()
    np.testing.assert_array_equal(list(found.values()), values)
