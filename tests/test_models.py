"""Families as their library writes them: every attention and router is found, with its sizes and weights, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import EXPERTS, FAMILIES, FAST, HEAD_DIM, HEADS, TOP_K, Family, make, tokens

import foreshock
from foreshock import Coverage, Watch

NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs() -> dict[str, torch.Tensor]:
    return tokens(torch.Generator().manual_seed(1))


def train_once(model: torch.nn.Module, compiled: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    compiled(**inputs()).loss.backward()
    optimizer.step()


def check(family: Family, model: torch.nn.Module, coverage: Coverage) -> None:
    """The ledger holds exactly what ``family`` says, under exact parameter names."""
    assert coverage.unmatched == ()
    assert coverage.warnings == ()
    parameters = dict(model.named_parameters())
    statuses = {kind: [s for s in coverage if s.site.kind == kind] for kind in ("attention", "router")}
    assert len(coverage) == sum(map(len, statuses.values()))
    assert all(status.evaluations == 1 for status in coverage)
    assert not any(status.notes for status in coverage)

    sites = {status.site.name: status.site for status in statuses["attention"]}
    assert sorted(sites) == sorted(family.layer.format(layer) for layer in family.layers)
    for layer in family.layers:
        site = sites[family.layer.format(layer)]
        assert (site.heads, site.kv_heads, site.head_dim) == (HEADS, family.kv_heads, HEAD_DIM)
        assert site.q_weight is not None
        assert site.k_weight is not None
        assert (site.q_weight.names, site.k_weight.names) == family.weights(layer)
        for view, heads in ((site.q_weight, HEADS), (site.k_weight, family.kv_heads)):
            assert all(name in parameters for name in view.names)
            assert view.resolve() is parameters[view.names[0]]
            assert view.heads == heads
            assert view.read_by(HEADS) == tuple(head * heads // HEADS for head in range(HEADS))
            assert view.factor(heads - 1).shape == (model.config.hidden_size, HEAD_DIM)

    routers = {site.weight.names: site for site in (s.site for s in statuses["router"]) if site.weight is not None}
    assert len(routers) == len(statuses["router"])
    wanted = family.router
    assert (
        sorted(routers) == sorted((wanted.weight.format(layer),) for layer in wanted.layers) if wanted else not routers
    )
    for (name,), site in routers.items():
        assert wanted is not None
        assert site.weight is not None
        assert site.weight.resolve() is parameters[name]
        assert (site.experts, site.top_k, site.scoring) == (EXPERTS, TOP_K, wanted.scoring)


@pytest.mark.parametrize("name", NAMES)
def test_every_site_is_found(name: str) -> None:
    """In training without `Watch.bind`, and by `foreshock.sites`, which binds: the same ledger."""
    family, model = FAMILIES[name], make(name)
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        train_once(model, torch.compile(model, backend=watch.backend))
        trained = watch.coverage
        check(family, model, trained)
        assert all(status.sampled == 1 for status in trained)
        metrics = set(watch.metrics())
    wanted = {"law/key_shift", "attention/entropy"} | ({"router/entropy", "router/margin"} if family.router else set())
    assert wanted <= metrics

    torch._dynamo.reset()
    surveyed = foreshock.sites(model, **inputs())
    check(family, model, surveyed)
    assert [s.site for s in surveyed] == [s.site for s in trained]
    assert [(s.laws, s.notes, s.evaluations) for s in surveyed] == [(s.laws, s.notes, s.evaluations) for s in trained]
    assert surveyed.graph_breaks == trained.graph_breaks


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_layers_that_share_one_graph_are_told_apart(name: str) -> None:
    family, model = FAMILIES[name], make(name)
    with Watch(every=1, inner="eager", strict=True, detectors=[]).bind(model) as watch:
        for layer in model.model.layers:
            layer.compile(backend=watch.backend)
        train_once(model, model)
        check(family, model, watch.coverage)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "llama"])
def test_the_factors_are_the_projections_of_the_heads(name: str) -> None:
    """``q_h = x W_h`` and ``k_h = x W_h`` for a fused weight as much as for a separate one."""
    model = make(name).eval()
    coverage = foreshock.sites(model, **inputs())
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
