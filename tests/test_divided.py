"""Models that ranks divide among themselves: `tests/divided.py` under torchrun, on gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from divided import CHOSEN, MICROBATCHES
from jobs import Job, check, trains_alike
from merged import BATCH, LENGTH, STEPS
from merged_models import HEADS

from foreshock.kin import alike, families

ALONE = ("gpipe", "experts", "swap")
ALONE_TOO = ("experts, padded", "gather", "sequence")
TOGETHER = ("gpipe", "gpipe, plain", "gpipe, bare", "experts", "experts, plain", "swap", "swap, plain")
FROM_ZERO = ("zero, fsdp", "zero, fsdp, apart")
TOGETHER_TOO = ("1f1b", "experts, padded", "gather", "sequence")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("alone"), 1, *ALONE, script="divided.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("two"), 2, *TOGETHER, script="divided.py")


# -- pipeline parallel -------------------------------------------------------------------------------------------------


def test_stages_tell_what_one_process_tells_of_the_whole_model(alone: Job, two: Job) -> None:
    check(alone, two, "gpipe", 2)
    for rank in (0, 1):
        sites = two.told("gpipe", rank)["sites"]
        stages = [["attention:layers.0", "attention:layers.1"], ["attention:layers.2", "router:layers.3"]]
        assert list(sites) == stages[rank] + stages[1 - rank]
        own, others = [sites[one] for one in stages[rank]], [sites[one] for one in stages[1 - rank]]
        assert [one[:2] for one in own] == [[1 + MICROBATCHES * STEPS] * 2] * 2  # and one to learn the shapes
        assert [one[:2] for one in others] == [[STEPS] * 2] * 2
        assert all(notes[0].startswith(f"on other ranks: rank {1 - rank} (") for _, _, notes in others)


@pytest.mark.parametrize("name", ["gpipe", "experts", "swap"])
def test_training_is_not_changed(two: Job, name: str) -> None:
    for rank in (0, 1):
        assert trains_alike(two.series(name, rank), two.series(f"{name}, plain", rank))


def test_a_stage_without_a_site_holds_nobody_up(two: Job) -> None:
    for rank in (0, 1):
        told = two.told("gpipe, bare", rank)
        assert (list(told["sites"]), told["warnings"], told["step"]) == (["attention:layers.0"], [], STEPS)
        assert len(two.series("gpipe, bare", rank)["attention/q_rms|attention:layers.0|values"]) == STEPS


@pytest.mark.slow
def test_sharded_stages_that_count_from_zero_are_kept_apart(tmp_path: Path) -> None:
    """Each site is told as the stage tells it that was not merged."""
    two = Job(tmp_path / "two", 2, *FROM_ZERO, script="divided.py")
    for rank in (0, 1):
        assert set(two.told("zero, fsdp", rank)["sites"]) == names(1)
        assert two.told("zero, fsdp", rank)["warnings"] == []
        told = two.series("zero, fsdp", rank)
        for stage, at in ((0, ""), (1, "@1")):
            for key, values in two.series("zero, fsdp, apart", stage).items():
                metric, site, what = key.split("|")
                if site != "None" and not metric.startswith("law/bias"):
                    assert np.allclose(told[f"{metric}|{site}{at}|{what}"], values, rtol=1e-6, equal_nan=True), key


def names(second: int) -> set[str]:
    """Of the sites of two stages, of which ``second`` is the first rank of the second."""
    return {f"attention:layers.{layer}{at}" for layer in (0, 1) for at in ("", f"@{second}")}


@pytest.mark.slow
def test_each_parameter_counts_once_in_the_norm_of_fsdp_and_tensor_parallel_gradients(tmp_path: Path) -> None:
    whole = Job(tmp_path / "alone", 1, "fsdp and tp", script="divided.py").series("fsdp and tp")
    job = Job(tmp_path / "four", 4, "fsdp and tp", script="divided.py")
    for rank in range(4):
        for key in ("optim/grad_norm|None|values", "attention/q_rms|attention:layers.1|values"):
            assert np.allclose(job.series("fsdp and tp", rank)[key], whole[key], rtol=1e-6, atol=0), key


@pytest.mark.parametrize(
    ("told", "spans", "expected"),
    [
        ([("x", 0, [0, 1])], ["", ""], [[0, 1]]),  # copies
        ([("x", 0, [0, 2]), ("y", 0, [1])], ["", "", ""], [[0, 2], [1]]),  # stages
        ([(None, 0, [0, 1, 2, 3])], ["a", "a", "b", "b"], [[0, 1], [2, 3]]),  # stages under FSDP2, which tell the same
        ([("x", 0, [0, 2]), (None, 0, [1, 3])], ["a", "a", "b", "b"], [[0, 1, 2, 3]]),  # copies
        ([("x", 0, [0]), ("y", 0, [2]), (None, 0, [1, 3])], ["a", "a", "b", "b"], [[0, 1], [2, 3]]),  # others
        (
            [("x", 4, [0]), ("y", 4, [1]), ("u", 4, [2]), ("v", 4, [3])],
            ["a", "a", "b", "b"],
            [[0, 1], [2, 3]],
        ),  # and TP
        ([("x", 4, [0, 2]), ("y", 4, [1, 3])], ["a", "a", "b", "b"], [[0, 1, 2, 3]]),  # copies under TP
        ([("x", 4, [0]), ("y", 4, [1])], ["", ""], [[0, 1]]),  # parts that nothing but their place tells
        ([(None, 0, [0, 1])], ["", ""], [[0, 1]]),  # no weights
    ],
)
def test_which_ranks_have_one_site(told: list[Any], spans: list[str], expected: list[list[int]]) -> None:
    groups = [(known, whole, alike(ranks, [span.encode() for span in spans])) for known, whole, ranks in told]
    assert [sorted(rank for group in of for rank in group.ranks) for of in families(groups)] == expected


@pytest.mark.slow
def test_what_ranks_share_tells_stages_from_copies(tmp_path: Path) -> None:
    job = Job(tmp_path / "four", 4, "zero, fsdp", "zero, tp", "replicas, tp", script="divided.py")
    for rank in range(4):
        for name in ("zero, fsdp", "zero, tp"):
            assert set(job.told(name, rank)["sites"]) == names(2)
            series = job.series(name, rank)
            first, second = (series[f"attention/q_rms|attention:layers.0{at}|values"] for at in ("", "@2"))
            assert first.shape == second.shape == (STEPS, HEADS)
            assert not np.allclose(first, second)
        assert set(job.told("replicas, tp", rank)["sites"]) == {"attention:layers.0", "attention:layers.1"}
        assert job.series("replicas, tp", rank)["attention/q_rms|attention:layers.0|values"].shape == (STEPS, HEADS)


# -- experts on several ranks ------------------------------------------------------------------------------------------


def test_tokens_that_travel_to_their_experts_are_counted_exactly(alone: Job, two: Job) -> None:
    check(alone, two, "experts", 2)
    for rank in (0, 1):
        assert list(two.told("experts", rank)["sites"]) == ["attention:layers.0", "router:layers.1.gate"]
        load = two.series("experts", rank)["router/load|router:layers.1.gate|values"]
        tokens = load * BATCH * LENGTH * CHOSEN
        assert np.allclose(tokens, tokens.round(), atol=1e-3)
        assert np.array_equal(tokens.round().sum(1), np.full(STEPS, BATCH * LENGTH * CHOSEN))


# -- positions on several ranks ----------------------------------------------------------------------------------------


def test_heads_that_were_swapped_for_positions_stand_side_by_side(alone: Job, two: Job) -> None:
    check(alone, two, "swap", 2)
    for rank in (0, 1):
        sites = two.told("swap", rank)["sites"]
        assert sites == {f"attention:layers.{at}": [STEPS, STEPS, []] for at in (0, 1)}
        assert two.series("swap", rank)["attention/delta2_norm|attention:layers.0|values"].shape[1] == HEADS


@pytest.mark.slow
def test_other_schedules_and_ways_of_exchange(alone: Job, tmp_path: Path) -> None:
    whole = Job(tmp_path / "alone", 1, *ALONE_TOO, script="divided.py")
    job = Job(tmp_path / "two", 2, *TOGETHER_TOO, script="divided.py")
    check(alone, job, "1f1b", 2, "gpipe")
    check(whole, job, "experts, padded", 2)
    check(
        whole, job, "sequence", 2, but=("optim/grad_norm",)
    )  # that of the norm's weight is a sum on its way (`Partial`)
    # A rank's gradients of keys and values that all gathered are of its own queries alone, and other calls round otherwise.
    of_all = "grad_k_norm", "grad_v_norm", "grad_absmax", "law/euler_gain", "law/key_gain", "law/bias"
    check(whole, job, "gather", 2, but=of_all)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experts", "swap"])
def test_four_ranks_tell_what_one_process_tells_of_the_whole_model(alone: Job, tmp_path: Path, name: str) -> None:
    """Not of stages of one layer each: there no layers take turns with their weights, as they do in the whole model."""
    job = Job(tmp_path / "four", 4, name, f"{name}, plain", script="divided.py")
    check(alone, job, name, 4)
    assert all(trains_alike(job.series(name, rank), job.series(f"{name}, plain", rank)) for rank in range(4))


# -- the examples of docs/pipeline.md, docs/expert_parallel.md and docs/context_parallel.md --------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lines"), [("pipeline", 5), ("expert_parallel", 2), ("context_parallel", 2)])
def test_examples_print_what_their_pages_show(name: str, lines: int) -> None:
    root = Path(__file__).parents[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command, one_thread = [*torchrun, str(root / f"examples/{name}.py")], os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = [line.replace(socket.gethostname(), "host") for line in ended.stdout.splitlines()]
    page = (root / f"docs/{name}.md").read_text()
    assert sum(line in page for line in said) >= lines
