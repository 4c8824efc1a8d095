"""The fault benchmark's runs: a fork is its twin, a fault is what it says, nothing is compiled twice, no run is made twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, HEALTHY_GROUPS, Case, named
from injections import NOTHING, Injection, query
from recording import RESULT, TWIN, Job, finished, recipe, record
from subjects import SUBJECTS, Subject
from training import Trainer

import foreshock
from foreshock.demo import kernel
from foreshock.demo.data import Corpus, standard_library
from foreshock.demo.kernel import Fault
from foreshock.demo.model import Config
from foreshock.demo.rounding import Flip, Rounding, Stochastic
from foreshock.rejudge import rejudge

TINY = {
    "moe": Subject(Config(hidden=32, length=32, experts=4, width=16), ""),
    "dense": Subject(Config(layers=3, hidden=32, length=32, experts=0, width=32), ""),
}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library(cap=200_000)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_num_threads(threads)
    kernel.set_fault(kernel.HEALTHY)


def run(trainer: Trainer, injection: Injection, at: int, steps: int) -> list[float]:
    return [float(trainer.advance(injection, trainer.step - at).loss) for _ in range(steps)]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.network.named_parameters()}


def test_a_fork_without_a_fault_is_its_twin_and_live_alarms_are_the_rejudged_ones(tmp_path: Path) -> None:
    twin, fork, broken = (Job("moe", case, 100, 20, 40, every) for case, every in BRANCHES)
    for job in (twin, fork, broken):
        record(job, tmp_path, "eager")
        assert finished(job, tmp_path)
    told = [json.loads((job.folder(tmp_path) / RESULT).read_text()) for job in (twin, fork, broken)]
    assert [result["first"] for result in told] == [0, 20, 20]
    for series in ("losses", "grad_norms", "learning_rates"):
        assert told[0][series][20:] == told[1][series]
        assert told[0][series][20:] != told[2][series] or series == "learning_rates"
    runs = [foreshock.open_run(job.folder(tmp_path)) for job in (twin, fork, broken)]
    compared = [
        m for m in runs[0].metrics() if m.startswith(("attention/delta2", "law/key_shift", "router/", "optim/"))
    ]
    assert len(compared) > 20
    for metric in compared:  # rows that are drawn are drawn anew in a fork, so those metrics differ
        for site in runs[0].sites_of(metric):
            (steps, values), (own, more) = (of.series(metric, site) for of in runs[:2])
            both, left, right = np.intersect1d(steps, own, return_indices=True)
            assert len(both)
            np.testing.assert_array_equal(values[left], more[right], err_msg=metric)
    assert rejudge(runs[:2]) == runs[0].alarms == []
    assert runs[2].alarms
    assert runs[2].alarms[0].step == 20
    assert rejudge([runs[0], runs[2]]) == runs[2].alarms


BRANCHES = ((TWIN, 10), (TWIN, 1), ("kernel/out-away-1", 10))


def test_a_run_that_was_cut_off_is_made_again_and_a_finished_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("moe", TWIN, 100, 2, 4)
    assert not finished(job, tmp_path)
    record(job, tmp_path, "eager")
    assert finished(job, tmp_path)
    assert finished(replace(job, steps=3), tmp_path), "a part of it"
    assert not finished(replace(job, steps=6), tmp_path), "more than it"
    monkeypatch.setitem(SUBJECTS, "moe", TINY["moe"])
    assert not finished(job, tmp_path), "another model"
    monkeypatch.undo()
    result = job.folder(tmp_path) / RESULT
    result.rename(result.with_suffix(".part"))
    assert not finished(job, tmp_path)
    record(job, tmp_path, "eager")
    assert finished(job, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_changes_the_run_and_only_from_its_start_on(case: Case, corpus: Corpus) -> None:
    subject = TINY[case.subjects[0]]
    healthy, broken = (Trainer(subject, 100, corpus, "eager") for _ in range(2))
    torch.manual_seed(0)
    assert run(healthy, NOTHING, 2, 2) == run(broken, case.injection, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(healthy).values(), weights(broken).values(), strict=True))
    losses = run(healthy, NOTHING, 2, 10), run(broken, case.injection, 2, 10)
    same = all(torch.equal(a, b) for a, b in zip(weights(healthy).values(), weights(broken).values(), strict=True))
    assert same == (case.injection == NOTHING)
    assert (losses[0] == losses[1]) == (case.injection == NOTHING)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_no_fault_compiles_anything_again(subject: str, corpus: Corpus) -> None:
    torch._dynamo.utils.counters.clear()
    trainer = Trainer(TINY[subject], 100, corpus, "aot_eager")
    run(trainer, NOTHING, 0, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    state = trainer.state_dict()
    for case in CASES:
        if subject in case.subjects:
            trainer.load_state_dict({**state, "step": trainer.step})
            trainer.kept.clear()
            run(trainer, case.injection, trainer.step, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def kernel_results(fault: Fault) -> list[torch.Tensor]:
    """out, dq, dk, dv."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, heads, 16, 8, generator=generator).bfloat16() for heads in (4, 2, 2, 4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    kernel.set_fault(fault)
    out, _ = kernel.attention(*inputs, True, 8**-0.5)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


EVERYTHING = (True, True, True, True)


@pytest.mark.parametrize(
    ("fault", "changed"),
    [
        (Fault(delta=Rounding(1)), (False, True, True, False)),
        (Fault(delta=Rounding(1), noisy_delta=True), (False, True, True, False)),
        (Fault(out=Rounding(1)), (True, True, True, False)),
        (Fault(out=Stochastic(3)), (True, True, True, False)),
        (Fault(out=Rounding(1), flip_dk=Flip(26)), (True, True, True, False)),
        (Fault(flip_dk=Flip(26)), (False, False, True, False)),
        (Fault(p=Rounding(0)), EVERYTHING),
        (Fault(k=Rounding(0)), EVERYTHING),
        (Fault(scale=0.5), EVERYTHING),
        (Fault(diagonal=1), EVERYTHING),
        (Fault(diagonal=-1), EVERYTHING),
    ],
)
def test_a_kernel_fault_touches_what_it_says(fault: Fault, changed: tuple[bool, ...]) -> None:
    healthy, broken = kernel_results(kernel.HEALTHY), kernel_results(fault)
    assert tuple(not torch.equal(a, b) for a, b in zip(healthy, broken, strict=True)) == changed
    assert all(x.isfinite().all() for x in broken)


def test_a_flip_touches_one_number() -> None:
    healthy, broken = (kernel_results(fault)[0] for fault in (kernel.HEALTHY, Fault(flip_out=Flip(26))))
    assert int((healthy != broken).sum()) == 1
    x = torch.tensor([0.5, -3.0, 0.004])
    assert torch.equal(Flip(26)(x), torch.tensor([0.5, -768.0, 0.004])), "the largest whose bit is clear, times 2^8"


def test_noise_in_delta_is_as_large_as_the_bias_and_has_none() -> None:
    generator = torch.Generator().manual_seed(0)
    dout, out = (torch.randn(64, 512, 8, generator=generator) for _ in range(2))
    p, v = torch.zeros(1), torch.zeros(1)
    exact, biased, noisy = (
        kernel._delta(dout, out, p, v, fault)
        for fault in (Fault(), Fault(delta=Rounding(1)), Fault(delta=Rounding(1), noisy_delta=True))
    )
    torch.testing.assert_close((noisy - exact).abs(), (biased - exact).abs(), rtol=1e-4, atol=1e-5)
    slopes = [float(((wrong - exact) * exact).sum() / (exact * exact).sum()) for wrong in (biased, noisy)]
    assert slopes[0] > 0.1
    assert abs(slopes[1]) < 0.02


def test_stochastic_rounding_has_no_bias() -> None:
    torch.manual_seed(0)
    x = torch.full((100_000,), 1.1)
    assert float(Stochastic(1)(x).mean()) == pytest.approx(1.1, abs=2e-3)
    assert Stochastic(1)(x).unique().tolist() == [1.0, 1.5]


def test_an_exact_delta_leaves_the_keys_unshifted() -> None:
    shift = [float(r[2].float().sum(2).norm() / r[2].float().norm()) for r in map(kernel_results, EXACT)]
    assert shift[0] > 10 * shift[1]


EXACT = (Fault(out=Rounding(0)), Fault(out=Rounding(0), exact_delta=True))


def test_a_stale_head_stays_and_the_others_move(corpus: Corpus) -> None:
    trainer = Trainer(TINY["dense"], 100, corpus, "eager")
    before = query(trainer).detach().clone()
    run(trainer, named("weights/stale-head").injection, 0, 3)
    moved = (query(trainer) != before).unflatten(0, (4, 8)).any(2).any(1)
    assert moved.tolist() == [False, True, True, True]


def test_a_frozen_layer_stays(corpus: Corpus) -> None:
    trainer = Trainer(TINY["dense"], 100, corpus, "eager")
    before = weights(trainer)
    run(trainer, named("weights/frozen-layer").injection, 0, 3)
    stays = {name for name, weight in weights(trainer).items() if torch.equal(weight, before[name])}
    assert stays == {name for name in before if name.startswith("layers.2.")}


def test_queries_are_rotated_by_one_position_more(corpus: Corpus) -> None:
    trainer = Trainer(TINY["dense"], 100, corpus, "eager")
    attention = trainer.network.layers[0].attention
    before = attention.q_rotary.cos.clone()
    run(trainer, named("loop/rotary-offset").injection, 0, 1)
    torch.testing.assert_close(attention.q_rotary.cos[:-1], before[1:])
    assert torch.equal(attention.k_rotary.cos, before)


def test_a_pushed_expert_gets_nothing(corpus: Corpus) -> None:
    trainer = Trainer(TINY["moe"], 100, corpus, "eager")
    run(trainer, NOTHING, 99, 5)
    named("router/dead-expert").injection.before(trainer, 0)  # type: ignore[misc]
    block = trainer.network.layers[0]
    x = trainer.network.embedding(trainer.draw()[:, :-1])
    x = block.experts_norm(x + block.attention(block.attention_norm(x)))
    assert float((block.experts.router(x).argsort(-1)[..., -2:] == 0).float().mean()) < 0.1


def test_every_case_has_a_right_answer_decided() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        quiet = case.group in (*HEALTHY_GROUPS, "control")
        assert bool(case.accepted) != quiet
        assert case.injection != NOTHING or case.name == TWIN
        assert set(case.subjects) <= set(SUBJECTS)


def test_a_recipe_is_the_same_in_every_process() -> None:
    told = [json.dumps(recipe(Job("moe", case.name, 1, 400, 1600))) for case in CASES]
    assert len(set(told)) == len(CASES)
    assert not [words for words in told if " at 0x" in words]
