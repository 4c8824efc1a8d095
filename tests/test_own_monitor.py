"""The example of monitors runs and says what float64 says; own probes stand beside the built-in ones and change nothing there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from foreshock import Probe, Watch
from foreshock.monitors.router_probe import ROUTER
from foreshock.patterns import ANY, subgraph

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/own_monitor.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_monitor", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_monitor"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(example: ModuleType) -> Iterator[dict[bool, Watch]]:
    torch._dynamo.reset()
    yield {faulty: example.main(faulty) for faulty in (False, True)}
    torch._dynamo.reset()


def test_the_law_holds_in_a_correct_kernel_and_names_a_wrong_one(runs: dict[bool, Watch]) -> None:
    assert runs[False].series("law/value_euler")[1].max() < 2e-6
    assert runs[False].alarms == []
    assert runs[True].series("law/value_euler")[1].min() > 0.01
    assert runs[True].series("law/value_mass")[1].max() < 1e-5
    (alarm,) = runs[True].alarms
    assert (alarm.metric, alarm.mechanism, alarm.onset) == ("law/value_euler", "unknown", 0)


def test_own_series_are_the_true_values(example: ModuleType, one_thread: None) -> None:
    watch = example.main(steps=1)
    torch.manual_seed(0)
    model = example.Model().double()
    torch.manual_seed(0)
    model.load_state_dict(example.Model().state_dict())
    x = torch.randn(4, 16, 32).double()
    q = model.q(x).detach()
    kurtosis = q.pow(4).mean() / q.square().mean().square()
    assert watch.series("attention/q_kurtosis")[1].item() == pytest.approx(kurtosis.item(), rel=1e-5)


def test_the_bound_of_logits_is_that_of_the_whole_product(example: ModuleType, one_thread: None) -> None:
    watch = example.main(steps=2)
    model, site = example.Model(), watch.sites[0]
    assert site.q_weight is not None
    with Watch(every=1, inner="eager", patterns=[example.ATTEND], monitors=[example.LogitBound()]) as watch:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        torch.compile(model, backend=watch.backend)(torch.randn(2, 4, 32)).sum().backward()
        optimizer.step()
        got = watch.series("attention/logit_bound")[1][0]
    q, k = (y.weight.detach().double().view(4, 8, 32) for y in (model.q, model.k))
    expected = torch.linalg.matrix_norm(q.mT @ k, ord=2) * 32 * 8**-0.5
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_built_in_series_stay_what_they_are(example: ModuleType, runs: dict[bool, Watch], one_thread: None) -> None:
    torch.manual_seed(0)
    model = example.Model()
    with Watch(every=1, inner="eager", patterns=[example.ATTEND], detectors=[]).bind(model) as plain:
        compiled = torch.compile(model, backend=plain.backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(8):
            compiled(torch.randn(4, 16, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    own = {"attention/q_kurtosis", "attention/logit_bound", "law/value_euler"}
    assert {*runs[False].metrics()} == {*plain.metrics(), *own}
    for name in ("attention/entropy", "attention/sink_se", "law/hull", "attention/grad_q_norm"):
        np.testing.assert_allclose(runs[False].series(name)[1], plain.series(name)[1], rtol=1e-5, atol=1e-9)


def test_training_is_bitwise_the_same(example: ModuleType, one_thread: None) -> None:
    def train(watched: bool) -> tuple[list[float], list[torch.Tensor]]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, losses = example.Model(), []
        with Watch(
            every=1,
            inner="aot_eager",
            strict=True,
            patterns=[example.ATTEND],
            probes=[example.TAILS, example.VALUE_EULER],
            detectors=[],
        ) as watch:
            compiled = torch.compile(model, backend=watch.backend if watched else "aot_eager")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                loss = compiled(torch.randn(4, 16, 32)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            assert not watched or "law/value_euler" in watch.metrics()
        return losses, [p.detach().clone() for p in model.parameters()]

    (plain, before), (seen, after) = train(False), train(True)
    assert plain == seen
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _fails(*args: object) -> dict[str, torch.Tensor]:
    raise ValueError("no statistics today")


def _fails_late(facts, tensors, *args):
    """On real tensors alone: after the graph was rewritten."""
    if type(next(iter(tensors.values()))) is torch.Tensor:
        raise ValueError("no statistics today")
    return {"sum": next(iter(tensors.values())).sum()}


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("how", [_fails, _fails_late])
def test_a_probe_that_fails_leaves_the_built_in_one(example: ModuleType, one_thread: None, part: str, how) -> None:
    bad = Probe("bad", "attention", None, lambda facts, q: {"attention/bad": q["sum"]})
    model = example.Model()
    with Watch(
        every=1, inner="eager", patterns=[example.ATTEND], probes=[replace(bad, **{part: how})], detectors=[]
    ) as watch:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        torch.compile(model, backend=watch.backend)(torch.randn(2, 4, 32)).sum().backward()
        optimizer.step()
        (warning,) = watch.coverage.warnings
        assert "probe `bad`" in warning
        assert "no statistics today" in warning
        for name in ("attention/entropy", "law/key_shift", "attention/grad_k_norm", "law/hull"):
            assert np.isfinite(watch.series(name)[1]).all()
        if how is _fails_late:
            assert np.isnan(watch.series("attention/bad")[1]).all()
        else:
            assert "attention/bad" not in watch.metrics()


class Router(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(8, 4, bias=False)
        self.up = torch.nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, chosen = self.gate(x).softmax(-1).topk(2, -1)
        weights = torch.zeros(*x.shape[:-1], 4).scatter(-1, chosen, values)
        return torch.einsum("te,td,edf->tf", weights, x, self.up)


def _watched(model: torch.nn.Module, x: torch.Tensor, *probes: Probe, **options) -> Watch:
    with Watch(every=1, inner="eager", probes=probes, detectors=[], **options) as watch:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        torch.compile(model, backend=watch.backend)(x).square().sum().backward()
        optimizer.step()
    return watch


def test_several_probes_at_a_router(one_thread: None) -> None:
    """Each has quantities of its own, be their names the same."""
    mean = Probe(
        name="mean",
        kind="router",
        forward=lambda facts, t, rows: {"entropy": t["logits"].sum(), "tokens": t["logits"].new_ones(1) * 2},
        finish=lambda facts, q: {"router/logit_sum": q["entropy"]} if "entropy" in q else {},
        backward=lambda facts, t, g: {"grad": g["logits"].sum()},
    )
    largest = replace(
        mean,
        name="largest",
        forward=lambda facts, t, rows: {"entropy": t["logits"].amax()},
        finish=lambda facts, q: {"router/largest": q["entropy"]} if "entropy" in q else {},
        maxima=frozenset({"entropy"}),
    )
    model, x = Router(), torch.randn(12, 8)
    watch = _watched(model, x, mean, largest, strict=True)
    logits = model.gate(x).detach().double()
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean()
    assert watch.series("router/entropy")[1].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert watch.series("router/logit_sum")[1].item() == pytest.approx(logits.sum().item(), rel=1e-4)
    assert watch.series("router/largest")[1].item() == pytest.approx(logits.max().item(), rel=1e-5)


def test_a_probe_of_a_built_in_ones_name_takes_its_place(one_thread: None) -> None:
    own = replace(ROUTER, forward=lambda facts, t, rows: {"sum": t["logits"].sum()}, backward=None)
    own = replace(own, finish=lambda facts, q: {"router/logit_sum": q["sum"]})
    assert "router/entropy" not in (names := _watched(Router(), torch.randn(12, 8), own, strict=True).metrics())
    assert "router/logit_sum" in names


def test_a_metric_that_another_probe_has_is_told_and_left_out(one_thread: None) -> None:
    own = Probe(
        "own", "router", lambda facts, t, rows: {"sum": t["logits"].sum()}, lambda facts, q: {"router/z": q["sum"]}
    )
    model, x = Router(), torch.randn(12, 8)
    watch = _watched(model, x, own)
    (warning,) = watch.coverage.warnings
    assert "another probe records router/z there already" in warning
    z = model.gate(x).logsumexp(-1).square().mean().item()
    assert watch.series("router/z")[1].item() == pytest.approx(z, rel=1e-5)


@subgraph("scaled", tapped="x")
def scaled(x, *, factor=ANY):
    return {"out": torch.tanh(x) * factor}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_nothing_but_gradients_is_read(one_thread: None, inner: str) -> None:
    probe = Probe(
        "scaled",
        "scaled",
        None,
        lambda facts, q: {"scaled/grad": np.sqrt(q["square"])},
        lambda facts, t, g: {"square": g["x"].square().sum()},
    )
    weight, x = torch.nn.Parameter(torch.ones(3)), torch.randn(4, 3)
    with Watch(every=1, inner=inner, strict=True, patterns=[scaled], probes=[probe], detectors=[]) as watch:
        optimizer = torch.optim.SGD([weight], lr=0.0)
        torch.compile(lambda x: torch.tanh(x * weight) * 3.0, backend=watch.backend)(x).sum().backward()
        optimizer.step()
        expected = (3 * (1 - torch.tanh(x).square())).norm().item()
        assert watch.series("scaled/grad")[1].item() == pytest.approx(expected, rel=1e-5)


def test_the_page_shows_what_runs_and_each_part_is_short() -> None:
    blocks = [part.partition("```")[0] for part in (ROOT / "docs/monitors.md").read_text().split("```python\n")[1:]]
    assert len(blocks) == 3
    for block in blocks:
        lines = [line for line in block.splitlines() if not line.startswith(("import", "from"))]
        assert len([line for line in lines if line]) < 20
        assert "\n".join(lines).strip() in EXAMPLE.read_text()


def test_the_example_prints(example: ModuleType, runs: dict[bool, Watch], capsys: pytest.CaptureFixture[str]) -> None:
    example.show(runs[True])
    printed = capsys.readouterr().out
    assert "law/value_euler" in printed
    assert "unknown at Model" in printed
