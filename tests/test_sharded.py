"""FSDP2 and tensor parallelism on two processes: names, heads, laws and weight spectra, and training that stays as it is."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sharded_ranks import HEADS, JOBS, KV, LAYERS, STEPS
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.fx import Graph

from foreshock.monitors.ledger import details
from foreshock.patterns.sharded import Part, among_all, on_this_rank, part_of
from foreshock.records import Site, Stage

Job = list[dict[str, Any]]
SLOW = pytest.mark.slow
pytestmark = pytest.mark.timeout(1800)  # inductor compiles C++ on both ranks
EACH = [
    pytest.param(name, marks=[SLOW] * (job != "first"), id=f"{job}-{name}")
    for job, scenarios in JOBS.items()
    for name, scenario in scenarios.items()
    if scenario.way != "whole"
]
OTHERS = ("fsdp, bfloat16", "fsdp and tp")
FSDP = [entry for entry in EACH if "fsdp" in str(entry.values[0]) and str(entry.values[0]) not in OTHERS]
TP = [entry for entry in EACH if str(entry.values[0]) in ("tp", "fsdp and tp")]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``jobs(scenario)``: what each of two ranks found in the job that has it, launched when it is first asked for."""
    done: dict[str, tuple[Path, subprocess.CompletedProcess[str]]] = {}

    def run(name: str) -> Job:
        job = next(job for job, scenarios in JOBS.items() if name in scenarios and not name.startswith("whole"))
        if job not in done:
            out = tmp_path_factory.mktemp(job)
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command = [*torchrun, str(Path(__file__).with_name("sharded_ranks.py")), str(out), job]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            done[job] = out, subprocess.run(command, env=one_thread, capture_output=True, text=True, check=False)
        out, ended = done[job]
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]

    return run


@pytest.mark.parametrize("name", EACH)
def test_training_is_bitwise_the_same_and_nothing_fails(jobs: Any, name: str) -> None:
    for rank in jobs(name):
        assert rank[name]["bits"] == rank[name].get("plain", rank[name]["bits"])
        assert rank[name]["warnings"] == []
        assert name == "tp, no part taken out" or rank[name]["unmatched"] == []


@pytest.mark.parametrize("name", EACH)
def test_every_layer_is_a_site_under_its_full_name(jobs: Any, name: str) -> None:
    own = name != "tp, no part taken out"
    for rank in jobs(name):
        sites = rank[name]["sites"]
        weights = [site["names"] for site in sites.values()]
        assert [f"attention:layers.{i}" in sites for i in range(LAYERS)] == [own] * LAYERS
        for i in range(LAYERS):
            assert [f"layers.{i}.router.weight"] in weights
            assert ([f"layers.{i}.q.weight", f"layers.{i}.k.weight"] in weights) is own
        assert len(sites) == (1 + own) * LAYERS
        assert {site["model"] for site in sites.values()} == {"Block" if "fsdp" in name else "Model"}
        assert all(site["sampled"] == (STEPS + 1) // 2 or "resumed" in name for site in sites.values())
        for site, whole in _whole(rank, name)["sites"].items():
            assert site not in sites or sites[site]["holding"] == whole["holding"]


def _whole(rank: dict[str, Any], name: str) -> dict[str, Any]:
    """What the whole model reads on the same batches."""
    alike = next(scenarios[name].alike for scenarios in JOBS.values() if name in scenarios)
    return rank["whole, alike" if alike else "whole"]


def _are(found: Any, whole: Any, at: int | None = None) -> bool:
    """Whether readings of the first steps are those of a whole model; ``at``: the heads of this rank of two."""
    expected = np.array(whole)[: len(found)]
    return np.allclose(found, expected if at is None else np.split(expected, 2, axis=1)[at], rtol=1e-6, atol=0)


def _spectra(found: dict[str, Any]) -> dict[tuple[str, str], list[Any]]:
    told = ("attention/d", "optim/update_ratio")
    series = {metric: sites for metric, sites in found["series"].items() if metric.startswith(told)}
    return {(metric, site): values for metric, sites in series.items() for site, values in sites.items()}


@pytest.mark.parametrize("name", FSDP)
def test_the_ranks_together_read_what_a_whole_model_reads_but_after_the_last_step(jobs: Any, name: str) -> None:
    """A site is read by one of the ranks that hold its weights between them; what no call follows is not read."""
    ranks = jobs(name)
    expected = _spectra(_whole(ranks[0], name))
    found = [_spectra(rank[name]) for rank in ranks]
    assert not found[0].keys() & found[1].keys()
    assert found[0].keys() | found[1].keys() == expected.keys()
    for key, (steps, values) in (found[0] | found[1]).items():
        assert steps == [step for step in expected[key][0] if step < STEPS - 1]
        assert _are(values, expected[key][1])


@pytest.mark.parametrize("name", FSDP)
def test_router_weights_are_read_in_turns_too(jobs: Any, name: str) -> None:
    ranks = jobs(name)
    for metric in ("router/similarity", "router/effective_rank", "router/row_norm_max"):
        found = [
            (at, site, series) for at, rank in enumerate(ranks) for site, series in rank[name]["series"][metric].items()
        ]
        assert sorted((at, site) for at, site, _ in found) == [(i, f"router:layers.{i}.router") for i in range(LAYERS)]
        for _, site, (steps, values) in found:
            whole = _whole(ranks[0], name)["series"][metric][site.removesuffix(".router")]
            assert steps == whole[0][:-1]
            assert _are(values, whole[1])


@pytest.mark.parametrize("name", FSDP)
def test_the_ledger_says_where_weights_are_read(jobs: Any, name: str) -> None:
    told = "sharded over 2 ranks and whole in calls alone: each site's weights are read on one of them"
    aside = "no adam, experts, gradients, updates: the optimizer has shares of the weights (DTensor)"
    for rank in jobs(name):
        for site in rank[name]["sites"].values():
            assert site["notes"] == [told, *[aside] * (name == "fsdp, no root")]


@SLOW
def test_weights_that_are_gathered_in_16_bits_are_read_so_and_said_to_be(jobs: Any) -> None:
    name = "fsdp, bfloat16"
    for rank in jobs(name):
        assert _spectra(rank[name])
        for site in rank[name]["sites"].values():
            assert site["notes"][1:] == ["gathered in bfloat16: updates below 2^-9 of a weight are not seen"]


@pytest.mark.parametrize("name", TP)
def test_a_rank_measures_its_own_heads_and_says_which_of_the_model_they_are(jobs: Any, name: str) -> None:
    for at, rank in enumerate(jobs(name)):
        found, expected = rank[name], _spectra(_whole(rank, name))
        place = {"head_offset": at * HEADS // 2, "heads_of": HEADS, "kv_head_offset": at * KV // 2, "kv_heads_of": KV}
        for layer in range(LAYERS):
            site = found["sites"][f"attention:layers.{layer}"]
            assert site["heads"] == [HEADS // 2, KV // 2]
            assert site["facts"] == place
        assert _spectra(found).keys() == expected.keys()
        for key, (steps, values) in _spectra(found).items():
            last = STEPS - 1 if "fsdp" in name else STEPS
            assert steps == [step for step in expected[key][0] if step < last]
            # The ratio is over all heads: of a rank's alone it is another number.
            assert key[0] == "optim/update_ratio" or _are(values, expected[key][1], at)


@SLOW
def test_tensors_that_stay_laid_out_over_ranks_are_left_out_with_the_reason(jobs: Any) -> None:
    name = "tp, no part taken out"
    for rank in jobs(name):
        assert len(rank[name]["unmatched"]) == LAYERS
        assert all("laid out over ranks (DTensor)" in line for line in rank[name]["unmatched"])


# -- without a job -----------------------------------------------------------------------------------------------------


def _node(whole: tuple[int, ...], mesh: tuple[int, ...], at: tuple[int, ...], placements: Any) -> Any:
    """A placeholder whose value looks like a `DTensor` on rank ``at`` of ``mesh``."""

    class Laid(torch.Tensor):
        pass

    fake = torch.empty(whole, device="meta").as_subclass(Laid)
    fake.placements = placements
    fake.device_mesh = SimpleNamespace(shape=mesh, get_coordinate=lambda: list(at))
    node = Graph().placeholder("weight")
    node.meta["example_value"] = fake
    return node


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12])
@pytest.mark.parametrize(
    "placements", [(Shard(0), Shard(1)), (Shard(0), Shard(0)), (Replicate(), Shard(-1)), (Replicate(), Replicate())]
)
def test_parts_are_cut_as_torch_cuts_them(size: int, placements: Any) -> None:
    mesh, whole = (2, 3), (size, 5)
    held = torch.zeros(whole)
    for at in np.ndindex(*mesh):
        part = part_of(_node(whole, mesh, at, placements))
        normal = tuple(Shard(p.dim % 2) if isinstance(p, Shard) else p for p in placements)
        shape, start = _compute_local_shape_and_global_offset(whole, mesh, list(at), normal)
        assert isinstance(part, Part)
        assert part.sizes == tuple(shape)
        assert 0 in shape or part.start == tuple(start)
        held[tuple(slice(a, a + n) for a, n in zip(part.start, part.sizes, strict=True))] += 1
    copies = math.prod(ranks for ranks, placement in zip(mesh, placements, strict=True) if placement == Replicate())
    assert bool((held == copies).all())


def test_what_is_no_part_by_itself_is_told() -> None:
    assert "laid out over ranks as" in str(part_of(_node((4, 4), (2,), (0,), (Partial(),))))


def test_positions_move_to_this_ranks_part_or_the_reason_is_told() -> None:
    stage = Stage(np.arange(4, 8).reshape(2, 2), (0,), (0, 1))
    own = on_this_rank(stage, _node((8, 3), (2,), (1,), (Shard(0),)), ())
    assert isinstance(own, Stage)
    assert own.index.tolist() == [[0, 1], [2, 3]]
    assert on_this_rank(stage, _node((8, 3), (2,), (1,), (Replicate(),)), ()).index.tolist() == stage.index.tolist()
    assert "on another rank" in str(on_this_rank(stage, _node((8, 3), (2,), (0,), (Shard(0),)), ()))
    assert "a part of each row" in str(on_this_rank(stage, _node((8, 4), (2,), (1,), (Shard(1),)), ()))


@pytest.mark.parametrize(
    ("rows", "ranks", "at", "pieces", "expected"),
    [
        (8, 2, 1, 2, (2, 4)),
        (8, 4, 3, 1, (3, 4)),
        (8, 1, 0, 4, (0, 4)),
        (10, 4, 1, 2, None),
        (9, 2, 1, 4, (5, 9)),
        (9, 2, 0, 2, None),
    ],
)
def test_which_of_the_whole_models_heads_a_rank_has(rows: int, ranks: int, at: int, pieces: int, expected: Any) -> None:
    assert among_all(_node((rows, 3), (ranks,), (at,), (Shard(0),)), (0,), pieces) == expected


# -- the examples of docs/fsdp.md and docs/tensor_parallel.md --------------------------------------------------------------


@SLOW
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "fsdp",
            [
                "rank 0: attention:0 (0.q.weight): 5 entropies, 4 spectra",
                "rank 1: attention:0 (0.q.weight): 5 entropies, 0 spectra",
            ],
        ),
        ("tensor_parallel", ["rank 1: attention:0: heads 2 to 3 of 4, (4, 2) norms"]),
    ],
)
def test_examples_print_what_their_pages_show(name: str, lines: list[str]) -> None:
    root = Path(__file__).parents[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command, one_thread = [*torchrun, str(root / f"examples/{name}.py")], os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    page = (root / f"docs/{name}.md").read_text()
    for line in lines:
        assert line in ended.stdout
        assert line in page


@pytest.mark.parametrize(
    ("facts", "said"),
    [({"head_offset": 2, "heads_of": 4}, "heads 2 to 3 of 4"), ({"head_offset": 0, "heads_of": 2}, ""), ({}, "")],
)
def test_the_ledger_says_which_heads_a_rank_has(facts: dict[str, int], said: str) -> None:
    site = Site("a", "a", "attention", "sdpa", heads=2, kv_heads=1, head_dim=4, causal=True, facts=facts)
    assert details(site) == ", ".join(filter(None, ("causal", said)))
