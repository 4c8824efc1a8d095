"""The ledger and the cost of a running job: told now and then beside its readings, by whom they concern, at no risk to the run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from loop import STEPS, Loop, identical

from foreshock import Watch, collector, memory, open_run


def counted(watch: Watch) -> list[int]:
    """The steps after which the ledger was made, as they come."""
    ledger, facts = watch.collector._told
    made: list[int] = []

    def told():
        made.append(watch.step)
        return ledger()

    watch.collector._told = told, facts
    return made


def test_a_running_job_can_be_read_before_it_is_flushed(one_thread, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(collector, "RECORDED", -1.0)
    seen = []

    def between(loop: Loop, step: int) -> None:
        if step == STEPS - 1:
            with open_run(tmp_path) as run:
                seen.append((len(run.sites), run.meta["cost"]["wall clock"]))

    with Watch(tmp_path, every=1, inner="aot_eager") as watch:
        Loop(watch.backend).run(between)
    ((sites, wall),) = seen
    assert sites == 2
    assert wall.endswith(" s")


def test_the_ledger_is_made_once_in_a_while(one_thread, monkeypatch, tmp_path: Path) -> None:
    now = [1000.0]
    monkeypatch.setattr(collector.time, "monotonic", lambda: now[0])

    def between(loop: Loop, step: int) -> None:
        now[0] += collector.RECORDED / 3

    with Watch(tmp_path, every=1, inner="aot_eager") as watch:
        made = counted(watch)
        Loop(watch.backend).run(between, steps=12)
        assert 2 <= len(made) <= 4, "of 12 steps that take four times as long as it is kept"
        assert all(late - early >= 3 for early, late in pairwise(made))


def test_steps_that_are_not_sampled_make_no_ledger(one_thread, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(collector, "RECORDED", -1.0)
    with Watch(tmp_path, every=4, inner="aot_eager") as watch:
        made = counted(watch)
        Loop(watch.backend).run(steps=9)
        assert 0 < len(made) <= 3


def test_a_rank_for_which_another_writes_makes_none(one_thread, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(collector, "RECORDED", -1.0)
    with Watch(tmp_path, every=1, inner="aot_eager") as watch:
        made = counted(watch)
        watch.collector.hush()
        Loop(watch.backend).run()
        assert made == []


def test_a_rank_for_which_another_writes_keeps_the_newest(one_thread, monkeypatch) -> None:
    monkeypatch.setattr(memory, "RECENT_BYTES", 1)
    with Watch(every=1, inner="aot_eager") as watch:
        watch.collector.hush()
        Loop(watch.backend).run()
        assert watch.series("attention/q_rms")[0].tolist() == [STEPS - 1]


def test_a_ledger_that_cannot_be_made_is_told_once_and_changes_nothing(
    one_thread, warnings_logged, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(collector, "RECORDED", -1.0)
    plain = Loop("aot_eager").run()

    def broken():
        raise ValueError("no ledger")

    with Watch(tmp_path, every=1, inner="aot_eager") as watch:
        watch.collector._told = broken, watch.collector._told[1]
        assert identical(Loop(watch.backend).run(), plain)
        watch.collector._told = (lambda: watch.coverage), watch.collector._told[1]
    (told,) = warnings_logged()
    assert "no ledger" in told
    with open_run(tmp_path) as run:
        assert len(run.steps) == STEPS


@pytest.mark.parametrize("now", [True, False])
def test_flushing_tells_it_at_once(one_thread, tmp_path: Path, now: bool) -> None:
    with Watch(tmp_path, every=1, inner="aot_eager") as watch:
        made = counted(watch)
        Loop(watch.backend).run(steps=2)
        before = len(made)
        watch.collector.record(now)
        assert len(made) == before + now
