"""A folder that is written again: a stretch that comes again is replaced, and another run is set aside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from resumed import most_records_of_a_step

import foreshock
from foreshock.records import Reading
from foreshock.store import RunStore


def _write(store: RunStore, steps: range, value: float, extra: int | None = None) -> None:
    for step in steps:
        store.write(
            step, [Reading("run/loss", None, np.array([value])), Reading("router/z", "r", np.array([step, value]))]
        )
        if step == extra:
            store.write(step, [Reading("router/late", "r", np.array([value]))])
    store.flush()


def _alarm(step: int) -> foreshock.Alarm:
    return foreshock.Alarm(step, step, None, "run/loss", 1.0, "less", "warning", "test", "low", (), "told")


@pytest.mark.parametrize("compacted", [False, True])
def test_a_stretch_is_discarded_with_the_first_flush_of_what_replaces_it(tmp_path: Path, compacted: bool) -> None:
    store = RunStore(tmp_path)
    for steps in (range(700), range(700, 760)) if compacted else (range(760),):
        _write(store, steps, 1.0, extra=740)
    for step in (10, 699, 700, 750):
        store.alarm(_alarm(step))
    store.meta(every=1)
    store.close()
    store = RunStore(tmp_path, anew=True)
    store.rewind(700)
    with foreshock.open_run(tmp_path) as run:
        assert run.steps.tolist() == list(range(760)), "until there is something in its place"
    _write(store, range(700, 710), 2.0)
    with foreshock.open_run(tmp_path) as run:
        assert run.steps.tolist() == list(range(710))
        assert run.series("run/loss")[1].tolist() == [1.0] * 700 + [2.0] * 10
        assert run.series("router/z")[1].tolist() == [[step, 1.0 + (step >= 700)] for step in range(710)]
        assert run.metrics() == ["router/z", "run/loss"], "what was there only in that stretch is gone"
        assert [alarm.step for alarm in run.alarms] == [10, 699]
        assert run.meta == {"every": 1}
        assert most_records_of_a_step(run) == 1
    store.close()
    assert not list(tmp_path.glob("earlier*"))


def test_another_run_in_the_folder_is_set_aside_whole(tmp_path: Path, warnings_logged) -> None:
    for number in range(3):
        store = RunStore(tmp_path, anew=True)
        store.meta(number=number)
        store.alarm(_alarm(number))
        reader = foreshock.open_run(tmp_path) if number else None
        _write(store, range(5 - number), float(number))
        if reader is not None:
            assert reader.series("run/loss")[1].tolist() == [number] * (5 - number), "a reader stays with the folder"
            reader.close()
        store.close()
    for number, folder in enumerate((tmp_path / "earlier-1", tmp_path / "earlier-2", tmp_path)):
        with foreshock.open_run(folder) as run:
            assert run.series("run/loss")[1].tolist() == [number] * (5 - number)
            assert run.meta == {"number": number}
            assert [alarm.step for alarm in run.alarms] == [number]
    assert len(warnings_logged()) == 2
    assert "holds another run" in warnings_logged()[0]


def test_a_watch_that_records_nothing_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    _write(store, range(4), 1.0)
    store.meta(steps=4)
    store.close()
    before = (tmp_path / "run.sqlite").read_bytes()
    with foreshock.Watch(tmp_path, inner="eager", strict=True) as watch:
        watch.state_dict()
        watch.flush()
    assert (tmp_path / "run.sqlite").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.sqlite"]


def test_a_rewind_that_could_not_be_written_is_made_up_for(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    _write(store, range(10), 1.0)
    store.close()
    store = RunStore(tmp_path, anew=True)
    store.rewind(5)
    store.write(5, [Reading("run/loss", None, np.array([2.0]))])
    (tmp_path / "run.sqlite").rename(tmp_path / "away")
    (tmp_path / "run.sqlite").mkdir()
    with pytest.raises(foreshock.ForeshockError):
        store.flush()
    (tmp_path / "run.sqlite").rmdir()
    (tmp_path / "away").rename(tmp_path / "run.sqlite")
    store.close()
    with foreshock.open_run(tmp_path) as run:
        assert run.series("run/loss")[1].tolist() == [1.0] * 5 + [2.0]
