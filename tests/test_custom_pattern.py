"""The example of extension runs, and what it adds goes the whole way: ledger, series, report, alarms."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import foreshock
from foreshock.errors import ConfigError
from foreshock.monitors import Metric, family, metric, register_metrics
from foreshock.monitors.report import write_report
from foreshock.patterns import ANY, subgraph

EXAMPLE = Path(__file__).parents[1] / "examples/custom_pattern.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("custom_pattern", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_pattern"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[foreshock.Watch, Path]:
    torch._dynamo.reset()
    path = tmp_path_factory.mktemp("custom") / "run"
    return example.main(str(path), steps=4), path


def test_every_site_is_in_the_ledger(run: tuple[foreshock.Watch, Path]) -> None:
    found = [(status.site.kind, status.site.name, status.sampled) for status in run[0].coverage]
    assert sorted(found) == [
        ("attention", "parts.0", 4),
        ("gated", "parts.2", 4),
        *(("norm", f"norms.{i}", 4) for i in range(3)),
        ("router", "parts.1", 4),
    ]
    assert run[0].coverage.warnings == run[0].coverage.unmatched == ()


def test_facts_and_weights_of_an_own_kind(run: tuple[foreshock.Watch, Path]) -> None:
    site = next(site for site in run[0].sites if site.kind == "norm")
    assert dict(site.facts) == {"eps": 1e-6, "channels": 32}
    assert site.weights["weight_weight"].names == ("norms.0.weight",)
    gated = next(site for site in run[0].sites if site.kind == "gated")
    assert gated.facts["cap"] == pytest.approx(20.0)


def test_described_kernels_are_judged_like_known_ones(run: tuple[foreshock.Watch, Path]) -> None:
    watch = run[0]
    attention = next(status for status in watch.coverage if status.site.kind == "attention")
    assert all(reason == "" for reason in attention.laws.values())
    for law in ("law/key_shift", "law/value_mass", "law/euler"):
        assert watch.series(law)[1].max() < 1e-4
    router = next(site for site in watch.sites if site.kind == "router")
    assert (router.experts, router.top_k, router.scoring) == (4, 2, "softmax")


def test_series_are_the_true_values(example: ModuleType, one_thread: None) -> None:
    norm, x = example.Norm(), torch.randn(3, 5, 32, requires_grad=True)
    with foreshock.Watch(
        every=1, inner="eager", strict=True, patterns=[example.rms_norm], probes=[example.NORM]
    ) as watch:
        optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
        compiled = torch.compile(norm, backend=watch.backend)
        compiled(x).square().sum().backward()
        optimizer.step()
        expected = x.detach().square().mean().sqrt().item()
        assert watch.series("norm/input_rms")[1].item() == pytest.approx(expected, rel=1e-6)
        assert x.grad is not None
        assert watch.series("norm/grad_norm")[1].item() == pytest.approx(x.grad.norm().item(), rel=1e-6)


def test_a_stored_run_and_its_report_show_the_own_kind(run: tuple[foreshock.Watch, Path], tmp_path: Path) -> None:
    stored = foreshock.open_run(run[1])
    assert {site.kind for site in stored.sites} == {"attention", "router", "gated", "norm"}
    page = write_report(stored, tmp_path / "report.html").read_text()
    assert "norm/input_rms" in page
    assert "the residual stream runs away" in page
    assert "norm sites" in page
    assert "channels 32" in page


def test_an_own_metric_is_judged(example: ModuleType) -> None:
    torch._dynamo.reset()
    norm, x = example.Norm(), torch.randn(3, 5, 32, requires_grad=True)
    with foreshock.Watch(
        every=1, inner="eager", patterns=[example.rms_norm], probes=[example.NORM], detectors=example.DETECTORS
    ) as watch:
        optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
        compiled = torch.compile(norm, backend=watch.backend)
        for step in range(3):
            compiled(x if step < 2 else x * float("nan")).sum().backward()
            optimizer.step()
        (alarm,) = watch.alarms
    assert (alarm.metric, alarm.mechanism, alarm.step) == ("norm/nonfinite", "non-finite values", 2)
    assert alarm.site == watch.sites[0].id


def test_families_chosen_by_name_keep_an_own_kind(example: ModuleType) -> None:
    torch._dynamo.reset()
    norm = example.Norm()
    with foreshock.Watch(
        every=1, inner="eager", monitors=["laws"], patterns=[example.rms_norm], probes=[example.NORM]
    ) as watch:
        compiled = torch.compile(norm, backend=watch.backend)
        optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
        compiled(torch.randn(2, 3, 32, requires_grad=True)).sum().backward()
        optimizer.step()
        assert "norm/input_rms" in watch.metrics()


def test_training_is_bitwise_the_same(example: ModuleType, one_thread: None) -> None:
    def train(watched: bool) -> tuple[list[float], list[torch.Tensor]]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, losses = example.Model(), []
        options = {"patterns": [example.ATTEND, example.ROUTE, example.gated_product, example.rms_norm]}
        with foreshock.Watch(
            every=1, inner="aot_eager", strict=True, probes=[example.GATED, example.NORM], **options
        ) as watch:
            compiled = torch.compile(model, backend=watch.backend if watched else "aot_eager")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                tokens = torch.randint(example.VOCABULARY, (2, 8))
                loss = torch.nn.functional.cross_entropy(compiled(tokens).flatten(0, 1), tokens.flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            assert len(watch.sites) == (6 if watched else 0)
        return losses, [p.detach().clone() for p in model.parameters()]

    (plain, before), (seen, after) = train(False), train(True)
    assert plain == seen
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@subgraph("attention", facts={"causal": False})
def shown(q, k, v, *, scale=ANY):
    return torch.softmax(q @ k.transpose(-2, -1) * scale, -1) @ v


def test_an_attention_shown_as_a_function_is_measured_like_a_known_one(one_thread: None) -> None:
    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    weight = torch.nn.Parameter(torch.ones(()))

    def attend(q, k, v):
        return torch.matmul((torch.matmul(q, k.mT) / 2.0).softmax(-1), v) * weight

    with foreshock.Watch(every=1, inner="eager", strict=True, patterns=[shown]) as watch:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        torch.compile(attend, backend=watch.backend)(q, k, v).square().sum().backward()
        optimizer.step()
        assert [site.pattern for site in watch.sites] == ["shown"]
        for law in ("law/key_shift", "law/value_mass", "law/euler"):
            assert watch.series(law)[1].max() < 1e-5
        assert watch.series("attention/shadow_rms")[1].max() < 1e-5
        assert q.grad is not None
        by_head = q.grad.square().sum((0, 2, 3)).sqrt().numpy()
        np.testing.assert_allclose(watch.series("attention/grad_q_norm")[1][0], by_head, rtol=1e-5)


def test_a_kind_without_a_probe_is_named_in_the_ledger() -> None:
    torch._dynamo.reset()

    @subgraph("spike")
    def spike(x):
        return x.exp().sin()

    with foreshock.Watch(every=1, inner="eager", patterns=[spike]) as watch:
        torch.compile(lambda x: x.exp().sin(), backend=watch.backend)(torch.randn(3))
        (line,) = watch.coverage.unmatched
    assert "no probe measures sites of kind `spike`" in line


def test_metrics_of_an_own_kind_are_registered_once() -> None:
    entry = Metric("whale/size", "size", "", "scalar", "mean", "own", "It grows.")
    register_metrics(entry)
    assert metric("whale/size") is entry
    assert family("whale/size") == "whale"
    with pytest.raises(ConfigError, match="give a kind and a name"):
        register_metrics(Metric("whale", "size", "", "scalar", "mean", "own", "It grows."))
    with pytest.raises(ConfigError, match="it is built in"):
        register_metrics(Metric("router/entropy", "size", "", "scalar", "mean", "own", "It grows."))


def test_the_example_prints(
    example: ModuleType, run: tuple[foreshock.Watch, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    example.show(run[0])
    printed = capsys.readouterr().out
    assert "norms.2" in printed
    assert "gated/saturated at gated:parts.2" in printed
    assert np.isfinite(run[0].series("norm/input_rms", run[0].sites[0].id)[1]).all()
