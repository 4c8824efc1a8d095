"""One definition a metric: whatever is recorded is in the registry, whatever is in the registry is recorded, and the pages that are
written from it are fresh."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock import Watch
from foreshock.errors import ConfigError
from foreshock.monitors import METRICS, Metric, metric, register_metrics
from foreshock.monitors.mechanisms import TABLE, UNKNOWN
from foreshock.monitors.metrics import AXES, COSTS, MERGES, SOURCES
from foreshock.monitors.second_tier import DTYPES

ROOT = Path(__file__).parents[1]
WIDTH, HEADS, KV_HEADS, EXPERTS, TOP_K, TOKENS = 16, 4, 2, 6, 2, 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y(x).unflatten(-1, (-1, 8)).transpose(1, 2) for y in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH)
        self.register_buffer("bias", torch.linspace(-0.2, 0.3, EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        return torch.einsum("te,td,edf->tf", self.weights(self.gate(flat)), flat, self.up).view_as(x)

    def weights(self, logits: Tensor) -> Tensor:
        values, chosen = logits.softmax(-1).topk(TOP_K, -1)
        return torch.zeros_like(logits).scatter(-1, chosen, values)


class Biased(Experts):
    def weights(self, logits: Tensor) -> Tensor:
        scores = logits.sigmoid()
        chosen = (scores + self.bias).topk(TOP_K, -1)[1]
        return torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))


class ExpertChoice(Experts):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1).T.topk(8, dim=-1)
        made = torch.bmm(flat[chosen.reshape(-1)].view(EXPERTS, 8, WIDTH), self.up) * weights.unsqueeze(-1)
        return torch.zeros_like(flat).index_add(0, chosen.reshape(-1), made.reshape(-1, WIDTH)).view_as(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Attention(), Experts(), Biased(), ExpertChoice()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(functional.rms_norm(x, (WIDTH,)))
        return x


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    """A dense attention and three routers, all families, as many steps as the pooled estimates need."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model()
    with Watch(every=1, inner="eager", strict=True, windows=(1, 2), monitors="all").bind(model) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(10):
            loss = compiled(torch.randn(2, TOKENS // 2, WIDTH)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.log(loss=loss)
    yield watch
    torch._dynamo.reset()


def test_what_is_recorded_is_what_is_defined(watch: Watch) -> None:
    recorded = {name.partition("@")[0] for name in watch.metrics()}
    assert recorded == {entry.name for entry in METRICS}


def test_values_run_over_what_the_registry_says(watch: Watch) -> None:
    sizes = {"scalar": 1, "heads": HEADS, "kv_heads": KV_HEADS, "experts": EXPERTS, "q,k,v,out": 4, "largest first": 5}
    kinds = {site.id: site.kind for site in watch.sites}
    for name in watch.metrics():
        for site in watch.collector.store.sites_of(name):
            values = watch.series(name, site)[1]
            width = 1 if values.ndim == 1 else values.shape[1]
            axis, each = metric(name).axis, (4, 2) if kinds.get(site) == "attention" else (1, 1)
            tensors = each[0] * (len(DTYPES) if ", each by" in axis else 1)
            of_kind = each[1] if axis == "q,k or router" else tensors
            assert width == sizes.get(axis, of_kind), name
            assert np.isfinite(values[-1]).all(), name


def test_experts_are_one_series_and_not_one_key_each(watch: Watch) -> None:
    for name in ("router/load", "router/gate_mass"):
        routers = [site.id for site in watch.sites if site.kind == "router"]
        assert watch.collector.store.sites_of(name) == routers
        assert watch.series(name)[1].shape == (10, 3, EXPERTS)


def test_every_entry_says_all_there_is_to_say() -> None:
    assert len({entry.name for entry in METRICS}) == len(METRICS)
    for entry in METRICS:
        assert (entry.axis in AXES, entry.merge in MERGES, entry.cost in COSTS) == (True, True, True), entry.name
        assert entry.formula, entry.name
        assert entry.meaning.endswith("."), entry.name
        if entry.source.startswith("["):
            assert all(part in SOURCES for part in entry.source.split(", ")), entry.name


def test_a_cost_that_there_is_not_is_refused() -> None:
    entry = Metric("own/size", "size", "", "scalar", "mean", "own", "It grows.", cost="dear")
    with pytest.raises(ConfigError, match="registering the metric 'own/size': cost is 'dear'; give one of cheap, "):
        register_metrics(entry)


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_metrics_is_fresh(pages: ModuleType) -> None:
    assert (ROOT / "docs/metrics.md").read_text() == pages.metrics_page(), "docs/metrics.md is stale: make docs"
    assert (ROOT / "docs/mechanisms.md").read_text() == pages.mechanisms_page(), (
        "docs/mechanisms.md is stale: make docs"
    )


def test_every_mechanism_has_its_what_now() -> None:
    """A section each, of five parts, and none of anything else."""
    page = (ROOT / "docs/what_now.md").read_text()
    _, *sections = re.split(r"^## (?!Three checks)", page, flags=re.MULTILINE)
    assert sorted(text.partition("\n")[0].lower() for text in sections) == sorted(
        {row.mechanism for row in (*TABLE, UNKNOWN)}
    )
    parts = ("It means", "Check", "Do", "Or else", "False alarm")
    for text in sections:
        assert [text.count(f"**{part}:**") for part in parts] == [1] * 5, text


def test_the_table_in_the_readme_is_fresh(pages: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    assert pages.with_table(readme) == readme, "the table in README.md is stale: make docs"
    with pytest.raises(ValueError, match="the markers"):
        pages.with_table(readme.replace(pages.END, ""))
