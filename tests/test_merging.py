"""Several ranks watched as one run: `tests/merged.py` under torchrun, on gloo."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job, check, identical, same_as_parts, trains_alike
from merged import ASTRAY, BROKEN, KERNEL_STEPS, LONELY_STEPS, STEPS
from merged_models import DYING

from foreshock import open_run
from foreshock.ranks import ALONE
from foreshock.shards import LARGEST, is_literal, side_by_side, with_rank, without_rank, worst_ranks

EQUAL = ("ddp", "ddp, plain", "ddp, apart", "ddp, sampled", "fsdp", "fsdp, plain", "fsdp, apart", "tp", "tp, apart")
APART = ("sites", "stages", "idle", "probe", "mute", "broken", "late")
TURNED = ("full, plain", "full", "no gloo", "joined", "parted", "paced")
LAST = ("lonely, plain", "lonely")  # behind the latter ranks count their watches otherwise


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("alone"), 1, "ddp", "ddp, sampled", "fsdp", "tp")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("two"), 2, *EQUAL, *APART, *TURNED, *LAST)


@pytest.mark.parametrize("name", ["ddp", "ddp, sampled", "fsdp", "tp"])
def test_two_ranks_tell_what_one_process_tells_of_the_whole_batch(alone: Job, two: Job, name: str) -> None:
    check(alone, two, name, 2)
    assert two.told(name, 0)["sites"] == two.told(name, 1)["sites"]


def test_a_flush_is_two_reductions_and_layouts_are_agreed_when_there_is_news(two: Job) -> None:
    """Each agreement repeats its flush: at the first step, with the first spectra and bias, of either window."""
    told = two.told("ddp")
    assert told["flushes"] == STEPS + told["agreements"]
    assert told["agreements"] <= 6
    last = 1  # of what was logged behind the last sampled step
    assert two.told("ddp, sampled")["flushes"] == STEPS // 2 + last + two.told("ddp, sampled")["agreements"]


def test_ranks_with_parts_of_the_weights_say_the_same_of_their_sites(two: Job) -> None:
    """By which a job of thousands agrees as quickly as one of two. What is read of weights each tells of other sites."""
    assert {tuple(texts) for texts in two.told("ddp")["texts"]} == {(1, 1, 1)}
    assert {(sites, prints) for sites, _, prints in two.told("fsdp")["texts"]} == {(1, 1)}
    assert max(loose for _, loose, _ in two.told("fsdp")["texts"]) == 2


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp"])
def test_what_is_merged_is_what_the_ranks_measured(two: Job, name: str) -> None:
    same_as_parts(two, name, 2)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_training_is_bitwise_what_it_is_without_a_watch(two: Job, name: str) -> None:
    assert all(trains_alike(two.series(name, rank), two.series(f"{name}, plain", rank)) for rank in range(2))


def test_a_site_of_one_rank_is_known_on_all(two: Job) -> None:
    told = two.told("sites")
    assert list(told["sites"]) == ["attention:layers.0"]
    (note,) = told["sites"]["attention:layers.0"][2]
    assert note.startswith("on other ranks: rank 1 (")
    ours, theirs = two.series("sites", 0), two.series("sites", 1)
    assert len(ours["attention/q_rms|attention:layers.0|values"]) == STEPS
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours if key.startswith("attention/q_"))
    assert two.told("sites", 0)["warnings"] == two.told("sites", 1)["warnings"] == []


def test_other_weights_under_the_same_name_are_another_site(two: Job) -> None:
    for rank in range(2):
        series = two.series("stages", rank)
        first, second = (series[f"attention/q_rms|attention:layers.0{at}|values"] for at in ("", "@1"))
        assert len(first) == len(second) == STEPS
        assert not np.allclose(first, second)


def test_a_rank_without_a_forward_pass_takes_part(two: Job) -> None:
    rows = two.series("idle")["attention/q_rms|attention:layers.0|steps"]
    assert rows.tolist() == list(range(STEPS))
    assert two.told("idle", 0)["warnings"] == two.told("idle", 1)["warnings"] == []


def test_a_probe_that_fails_on_one_rank_holds_nobody_up(two: Job) -> None:
    series = two.series("probe")
    assert len(series["attention/q_rms|attention:layers.0|values"]) == STEPS
    assert two.told("probe", 0)["warnings"] == []
    assert any("probe `own`" in line for line in two.told("probe", 1)["warnings"])


def test_a_rank_that_cannot_say_what_it_has_takes_part_all_the_same(two: Job) -> None:
    """It cannot weigh once either, and a monitor records another size from a step on."""
    series, resized = two.series("mute"), "merging own/thing, which is left out: ConfigError: it is of another size"
    assert series["attention/q_rms|attention:layers.0|steps"].tolist() == list(range(STEPS))
    assert series["own/thing|None|steps"].tolist() == list(range(DYING))
    (line,) = two.told("mute")["warnings"]
    assert line.startswith(resized)
    told = two.told("mute", 1)
    assert {line.partition(":")[0] for line in told["warnings"]} == {
        "weighing what is merged",
        "describing what the ranks merge; this rank has no part in it for now",
    }
    norms = (two.series(name)["optim/grad_norm|None|values"] for name in ("mute", "probe"))
    assert np.allclose(*norms, rtol=1e-6)


def test_a_full_disk_of_the_rank_that_writes_loses_nothing(two: Job) -> None:
    """Training goes on on both, one warning is given, and what waited is written once there is room."""
    (warning,) = two.told("full")["warnings"]
    assert warning.startswith("writing to the store")
    assert "disk is full" in warning
    assert two.told("full", 1)["warnings"] == []
    for rank in (0, 1):
        assert two.series("full", rank)["attention/q_rms|attention:layers.0|steps"].tolist() == list(range(STEPS))
        assert trains_alike(two.series("full", rank), two.series("full, plain", rank))
    with open_run(two.out / "full") as run:
        assert run.series("attention/q_rms")[0].tolist() == list(range(STEPS))


def test_an_alarm_names_the_rank_and_comes_to_all_at_one_step(two: Job) -> None:
    first, second = two.told("broken", 0), two.told("broken", 1)
    assert first["alarms"] == second["alarms"]
    assert first["called"] == second["called"]
    alarm = first["alarms"][0]
    assert alarm["ranks"] == [1]
    assert alarm["site"] == "attention:layers.1"
    assert BROKEN <= alarm["step"] < KERNEL_STEPS
    assert "Worst on rank 1 (" in alarm["message"]
    assert first["stopped"] == second["stopped"] != []
    assert set(first["asked"]) <= set(first["called"])  # nobody asks the store for an alarm that all hear
    with open_run(two.out / "run") as run:  # rank 0 wrote for both
        assert [a.to_json() for a in run.alarms] == first["alarms"]
        assert run.steps.tolist() == list(range(KERNEL_STEPS))


def test_without_a_group_each_rank_watches_for_itself(two: Job) -> None:
    for rank in (0, 1):
        told = two.told("no gloo", rank)
        (warning,) = told["warnings"]
        assert warning == f"{ALONE}: RuntimeError: gloo is not built in"
        assert sorted(set(told["heard"])) == list(range(STEPS))
        with open_run(two.out / "alone" / f"rank{rank}") as run:
            assert run.steps.tolist() == list(range(STEPS))
            assert np.array_equal(run.series("attention/delta2_norm")[0], np.arange(2, STEPS, 2))
    assert not (two.out / "alone" / "run.sqlite").exists()
    first, second = (two.series("no gloo", rank)["attention/q_rms|attention:layers.0|values"] for rank in (0, 1))
    assert len(first) == len(second) == STEPS
    assert not np.allclose(first, second)


def test_a_watch_on_one_rank_alone_says_what_to_do_and_training_goes_on(two: Job) -> None:
    told = two.told("lonely")
    (warning,) = told["warnings"]
    assert warning.startswith(
        f"{ALONE}: ForeshockError: after 0.5 s not all 2 ranks had come to their watch; make it on "
    )
    assert two.told("lonely", 1)["warnings"] == []
    assert two.series("lonely")["attention/q_rms|attention:layers.0|steps"].tolist() == list(range(LONELY_STEPS))
    for rank in (0, 1):
        assert trains_alike(two.series("lonely", rank), two.series("lonely, plain", rank))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("joined", "of what each rank heard for itself, and now they are one run"),
        ("parted", "of one run, and now each is for itself"),
    ],
)
def test_a_state_of_ranks_that_were_watched_otherwise_loses_no_more_than_it_must(
    two: Job, name: str, told: str
) -> None:
    for rank in (0, 1):
        found, series = two.told(name, rank), two.series(name, rank)
        (line,) = found["warnings"]
        assert line.startswith(
            f"resuming at step {STEPS}: saved by 2 ranks, now 2; the state is {told}: detectors begin anew"
        )
        assert found["step"] == 2 * STEPS
        assert [alarm["step"] for alarm in found["alarms"]] == ([DYING] if name == "parted" or rank == 1 else [])
        merged = found["flushes"] is not None
        assert merged is (name == "joined")
        first = STEPS if merged else STEPS - 2  # what waited to be merged is this rank's own now
        assert series["attention/q_rms|attention:layers.0|steps"].tolist() == list(range(first, 2 * STEPS))
        assert series["attention/delta2_norm|attention:layers.0|steps"].tolist() == list(range(first, 2 * STEPS, 2))


def test_a_budget_goes_on_alike_on_ranks_that_have_no_state_of_their_own(two: Job) -> None:
    for rank in (0, 1):
        (line,) = [line for line in two.told("paced", rank)["warnings"] if "budget" not in line]
        assert line.startswith(f"resuming at step {STEPS}: saved by 1 rank, now 2; ")
        steps = two.series("paced", rank)["attention/q_rms|attention:layers.0|steps"]
        assert steps.tolist() == list(range(STEPS, 2 * STEPS, 4))


def test_a_rank_that_is_late_is_given_up_and_training_goes_on(two: Job) -> None:
    for rank in range(2):
        told = two.told("late", rank)
        (warning,) = told["warnings"]
        assert warning.startswith("merging what the ranks measured; this rank watches no more")
        assert told["step"] == STEPS
        assert told["reads"] == sorted(told["reads"])[: DYING + 2], "the optimizer is read no more"
        assert told["forward"] == STEPS - 1
        ((evaluations, sampled, _),) = told["sites"].values()
        assert (evaluations, sampled) == (STEPS, len(told["reads"]) + 1), "the plain graph runs from the next step on"
    assert list(two.series("late")["attention/q_rms|attention:layers.0|steps"])[:1] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp"])
def test_four_ranks_tell_what_one_process_tells_of_the_whole_batch(alone: Job, tmp_path: Path, name: str) -> None:
    job = Job(tmp_path / "job", 4, name, f"{name}, plain", f"{name}, apart")
    check(alone, job, name, 4)
    same_as_parts(job, name, 4)
    assert all(trains_alike(job.series(name, rank), job.series(f"{name}, plain", rank)) for rank in range(4))
    if name == "fsdp":
        assert {(sites, prints) for sites, _, prints in job.told(name)["texts"]} == {(1, 1)}


@pytest.mark.slow
def test_buckets_by_which_dynamo_splits_the_graph_and_a_group_that_is_given_make_no_difference(
    alone: Job, two: Job, tmp_path: Path
) -> None:
    job = Job(tmp_path / "job", 2, "ddp, buckets", "ddp, buckets, plain", "ddp, unsplit", "ddp, group")
    assert two.told("ddp")["graphs"] == job.told("ddp, unsplit")["graphs"] == job.told("ddp, group")["graphs"] == 1
    assert job.told("ddp, buckets")["graphs"] > 1
    check(alone, job, "ddp, buckets", 2, "ddp")
    for rank in range(2):
        expected = two.series("ddp", rank)
        assert trains_alike(job.series("ddp, buckets", rank), job.series("ddp, buckets, plain", rank))
        for name in ("ddp, unsplit", "ddp, group"):
            assert trains_alike(job.series(name, rank), expected)
            assert identical(job.series(name, rank), expected)


@pytest.mark.slow
def test_an_alarm_names_the_rank_that_alone_stands_apart(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", 4, "astray", "astray, all")
    for rank in range(4):
        one, every = job.told("astray", rank)["alarms"], job.told("astray, all", rank)["alarms"]
        assert one
        assert every
        assert all(alarm["step"] >= ASTRAY for alarm in (*one, *every))
        assert {tuple(alarm["ranks"]) for alarm in one} == {(2,)}
        assert all(alarm["message"].endswith(" alone stands apart.") for alarm in one)
        assert {tuple(alarm["ranks"]) for alarm in every} == {()}


@pytest.mark.slow
def test_the_example_names_the_rank_that_computes_wrong() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = Path(__file__).parents[1] / "examples" / "ddp.py"
    done = subprocess.run([*torchrun, example], capture_output=True, text=True, timeout=300, check=True)
    for rank in (0, 1):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"rank {rank}: ")]
        assert "(8, 'wrong softmax scale or mask', (1,))" in line
    assert "written for all ranks: 20 steps" in done.stdout


@pytest.mark.parametrize("rank", [0, 1, 65535])
def test_the_largest_says_whose_it_is(rank: int) -> None:
    values = np.array([0.0, 1e-30, 3.14159, np.inf, np.nan, LARGEST])
    told, ranks = without_rank(with_rank(values, rank))
    assert np.isnan(told[4])
    assert ranks[4] == -1
    assert (ranks[[0, 1, 2, 3, 5]] == rank).all()
    assert np.allclose(told[:3], values[:3], rtol=2**-35, atol=0)
    mine, other = with_rank(np.array([2.0]), 3), with_rank(np.array([1.0]), 60000)
    assert without_rank(np.maximum(mine, other))[1] == 3


def test_shards_stand_side_by_side() -> None:
    make: Callable[[float], dict[str, Any]] = lambda x: {  # noqa: E731
        "attention/q_rms": np.array([x, x + 1]),
        "attention/nonfinite": np.full(4, x),
        "attention/q_absmax": np.array([x]),
        "own/thing": np.array([x]),
    }
    found = side_by_side([(2, make(5.0)), (0, make(1.0))])
    assert found["attention/q_rms"].tolist() == [1, 2, 5, 6]
    assert found["attention/nonfinite"].tolist() == [6] * 4
    assert found["own/thing"].tolist() == [3]
    absent = side_by_side([(0, {}), (2, make(5.0))])["attention/q_rms"]
    assert np.isnan(absent[:2]).all()
    assert absent[2:].tolist() == [5, 6]


def test_the_rank_of_shards_is_that_of_the_largest() -> None:
    one = {
        "law/euler": (np.array([1.0, 9.0]), np.array([0, 4])),
        "attention/nonfinite": (np.array([0.0]), np.array([0])),
    }
    other = {
        "law/euler": (np.array([2.0, 3.0]), np.array([1, 1])),
        "attention/nonfinite": (np.array([2.0]), np.array([5])),
    }
    found = worst_ranks([(0, one), (2, other)])
    assert found["attention/nonfinite"].tolist() == [5]
    assert len(found["law/euler"]) in (2, 4)


def test_facts_that_another_rank_cannot_read_are_known() -> None:
    assert is_literal({"scale": 0.5, "layout": {"q": "BHSD"}, "causal": None})
    assert not is_literal({"size": torch.Size([2])})
