"""Families as their library writes them: every attention and router is found, with its sizes and weights, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from family import HEAD_DIM, HEADS, HIDDEN
from models import DECOYS, FAMILIES, FAST, SLOW, Family, make

import foreshock
from foreshock import Coverage, Watch

QUICK = {*FAST, "mamba2", "rwkv"}


def names(families: Mapping[str, Family]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(name: str) -> dict[str, Any]:
    return FAMILIES[name].inputs(torch.Generator().manual_seed(1))


def loss_and_gradients(name: str, model: torch.nn.Module, run: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """Of one forward and backward pass, with the dropout of its seed."""
    torch.manual_seed(1)
    loss = run(**inputs(name)).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(mine: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == wanted.keys()
    for what, value in wanted.items():
        torch.testing.assert_close(mine[what], value, msg=lambda text, what=what: f"{what}: {text}")


def check(family: Family, model: torch.nn.Module, coverage: Coverage) -> None:
    """The ledger holds exactly what ``family`` says, under exact parameter names."""
    assert coverage.unmatched == ()
    assert coverage.warnings == ()
    parameters = dict(model.named_parameters())
    statuses = {kind: [s for s in coverage if s.site.kind == kind] for kind in ("attention", "router")}
    assert len(coverage) == sum(map(len, statuses.values()))
    assert all(status.evaluations == family.runs for status in coverage)
    assert not any(status.notes for status in coverage)

    sites = {status.site.name: status.site for status in statuses["attention"]}
    wanted = family.weights()
    assert sorted(status.site.name for status in statuses["attention"]) == sorted(wanted)
    for name, site in sites.items():
        assert (site.heads, site.kv_heads) == (HEADS, family.kv_heads)
        assert (site.head_dim, site.value_dim) == (family.head_dim, family.value_dim)
        assert {key: getattr(site, key) for key in family.facts} == family.facts
        assert site.q_weight is not None
        assert site.k_weight is not None
        assert (site.q_weight.names, site.k_weight.names) == wanted[name]
        for view, heads in ((site.q_weight, HEADS), (site.k_weight, family.kv_heads)):
            assert all(parameter in parameters for parameter in view.names)
            assert view.resolve() is parameters[view.names[0]]
            assert view.heads == heads
            assert view.read_by(HEADS) == tuple(head * heads // HEADS for head in range(HEADS))
            assert view.factor(heads - 1).shape == (HIDDEN, family.width)

    router = family.router
    found = [status.site for status in statuses["router"]]
    assert sorted(site.weight.names for site in found) == [(name,) for name in (router.names() if router else ())]
    for site in found:
        assert router is not None
        assert site.weight.resolve() is parameters[site.weight.names[0]]
        assert (site.experts, site.top_k, site.scoring) == (router.experts, router.top_k, router.scoring)
        assert {key: getattr(site, key) for key in router.facts} == router.facts


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("name", names(FAST | SLOW))
def test_every_site_is_found(name: str) -> None:
    """In training without `Watch.bind`, and by `foreshock.sites`, which binds; the gradients are those of eager training."""
    family, model = FAMILIES[name], make(name)
    eager = loss_and_gradients(name, model, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer.zero_grad()
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        if family.breaks:
            watch.bind(model)
        mine = loss_and_gradients(name, model, torch.compile(model, backend=watch.backend))
        optimizer.step()
        trained = watch.coverage
        check(family, model, trained)
        assert all(status.sampled == family.runs for status in trained)
        assert watch.alarms == []
        metrics = set(watch.metrics())
    assert_close(mine, eager)
    laws = {law for status in trained for law, reason in status.laws.items() if not reason}
    routed = {"router/entropy", "router/margin"} if family.router else set()
    assert {"attention/entropy", *laws - {"law/bias"}, *routed} <= metrics  # that law takes many steps

    torch._dynamo.reset()
    surveyed = foreshock.sites(model, **inputs(name))
    check(family, model, surveyed)
    assert [s.site for s in surveyed] == [s.site for s in trained]
    assert [(s.laws, s.notes, s.evaluations) for s in surveyed] == [(s.laws, s.notes, s.evaluations) for s in trained]
    assert surveyed.graph_breaks == trained.graph_breaks


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("name", names(DECOYS))
def test_where_there_is_neither_nothing_is_found(name: str) -> None:
    model = make(name)
    eager = loss_and_gradients(name, model, model)
    model.zero_grad()
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        assert_close(loss_and_gradients(name, model, torch.compile(model, backend=watch.backend)), eager)
        assert (list(watch.coverage), watch.coverage.unmatched, watch.coverage.warnings) == ([], (), ())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_layers_that_share_one_graph_are_told_apart(name: str) -> None:
    family, model = FAMILIES[name], make(name)
    with Watch(every=1, inner="eager", strict=True, detectors=[]).bind(model) as watch:
        for layer in model.model.layers:
            layer.compile(backend=watch.backend)
        model(**inputs(name)).loss.backward()
        torch.optim.SGD(model.parameters(), lr=1e-2).step()
        check(family, model, watch.coverage)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "llama"])
def test_the_factors_are_the_projections_of_the_heads(name: str) -> None:
    """``q_h = x W_h`` and ``k_h = x W_h`` for a fused weight as much as for a separate one."""
    model = make(name).eval()
    coverage = foreshock.sites(model, **inputs(name))
    site = next(status.site for status in coverage if status.site.kind == "attention")
    x = torch.randn(3, HEADS * HEAD_DIM)
    attention = model.get_submodule(site.name)
    if name == "gpt2":
        q, k, _ = (attention.c_attn(x) - attention.c_attn.bias).split(HEADS * HEAD_DIM, -1)
    elif name == "gpt_neox":
        qkv = attention.query_key_value(x) - attention.query_key_value.bias
        q, k, _ = (part.flatten(1) for part in qkv.view(3, HEADS, 3 * HEAD_DIM).chunk(3, -1))
    elif name == "phi3":
        q, k, _ = attention.qkv_proj(x).split([HEADS * HEAD_DIM, 2 * HEAD_DIM, 2 * HEAD_DIM], -1)
    else:
        q, k = attention.q_proj(x), attention.k_proj(x)
    assert site.q_weight is not None
    assert site.k_weight is not None
    for view, whole in ((site.q_weight, q), (site.k_weight, k)):
        for head in range(view.heads):
            projected = whole[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
            torch.testing.assert_close(x @ view.factor(head), projected.detach())
