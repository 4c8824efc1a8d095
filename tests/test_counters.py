"""What Dynamo and the compile caches count: no break, recompile or cache bypass more than without foreshock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, tokens
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import foreshock
from foreshock import Watch

pytestmark = pytest.mark.usefixtures("one_thread")

Counts = dict[str, dict[str, int]]


def train(name: str, backend: Any, lengths: Sequence[int], **options: Any) -> Any:
    """One optimizer step for each sequence length."""
    torch.manual_seed(0)
    model = FAMILIES[name].make(num_hidden_layers=1).train()
    compiled = torch.compile(model, backend=backend, **options)
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=1e-2), torch.Generator().manual_seed(1)
    for length in lengths:
        compiled(**tokens(generator, length)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def counted(section: Sequence[str], work: Callable[[], Any]) -> Counts:
    torch._dynamo.reset()
    counters.clear()
    work()
    return {name: dict(counters[name]) for name in section}


SHAPES = {
    "static": ([16] * 4, {}),
    "second-length": ([16, 16, 24, 24, 9], {}),
    "dynamic": ([16, 24, 9, 16], {"dynamic": True}),
}


QUICK = {("llama", "static"), ("llama", "second-length"), ("gpt2", "static"), ("olmoe", "dynamic")}
CASES = [
    pytest.param(name, shapes, marks=() if (name, shapes) in QUICK else pytest.mark.slow)
    for name in ("llama", "gpt2", "olmoe")
    for shapes in SHAPES
]


@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_dynamo_counts_the_same(name: str, shapes: str) -> None:
    """GPT-2 has graph breaks of its own."""
    lengths, options = SHAPES[shapes]
    sections = ("frames", "stats", "graph_break", "unimplemented", "recompiles", "recompile_limit")
    plain = counted(sections, lambda: train(name, "aot_eager", lengths, **options))
    if plain["graph_break"]:  # the library's own: it warns once a process, in frames that later runs do not have
        plain = counted(sections, lambda: train(name, "aot_eager", lengths, **options))
    counters.clear()
    with Watch(every=2, inner="aot_eager", strict=True, detectors=[]) as watch:
        watched = counted(sections, lambda: train(name, watch.backend, lengths, **options))
        assert len(watch.coverage.graph_breaks) == sum(plain["graph_break"].values())
    assert watched == plain
    assert plain["stats"]["unique_graphs"] > 0
    (site, *_) = watch.sites
    assert watch.series("law/key_shift", site.id)[0].tolist() == list(range(0, len(lengths), 2))


def cache_counts(name: str) -> dict[str, dict[str, int]]:
    """Two sampled steps and one plain one of a small language model under inductor."""
    with Watch(every=2, strict=True, detectors=[]) as watch:
        found = counted(("aot_autograd", "inductor"), lambda: train(name, watch.backend, [16] * 3))
        assert watch.series("law/key_shift")[0].tolist() == [0, 2]
    return found


def is_warm(found: Counts) -> bool:
    aot, inductor = found["aot_autograd"], found["inductor"]
    return aot.get("autograd_cache_hit") == 2 and not {
        *(name for name in aot if "miss" in name or "bypass" in name),
        *(name for name in inductor if "cache_miss" in name or "cache_bypass" in name),
    }


def test_both_compile_caches_serve_both_variants() -> None:
    with fresh_cache():
        cold, warm = cache_counts("llama"), cache_counts("llama")
    assert cold["aot_autograd"].get("autograd_cache_miss") == 2
    assert "autograd_cache_bypass" not in cold["aot_autograd"]
    assert not [name for name in cold["inductor"] if "bypass" in name]
    assert is_warm(warm), warm


SCRIPT = """
import json, sys
from test_counters import cache_counts
json.dump(cache_counts("olmoe"), sys.stdout)
"""


@pytest.mark.slow
def test_a_second_process_starts_warm(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    outputs = [
        subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=500).stdout
        for _ in range(2)
    ]
    cold, warm = (json.loads(output) for output in outputs)
    assert cold["aot_autograd"].get("autograd_cache_miss") == 2
    assert is_warm(warm), warm


@dataclass
class Counting:
    """An inner compiler that compiles nothing and counts the calls of every graph it was given."""

    probed: list[bool] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        index = len(self.probed)
        self.probed.append(any("foreshock" in node.meta for node in gm.graph.nodes))
        self.calls.append(0)

        def run(*args: Any) -> Any:
            self.calls[index] += 1
            return gm(*args)

        return run

    def by_variant(self) -> dict[str, list[int]]:
        return {
            name: [calls for calls, found in zip(self.calls, self.probed, strict=True) if found is wanted]
            for name, wanted in (("probed", True), ("plain", False))
        }


def test_unsampled_steps_run_the_plain_graph() -> None:
    inner = Counting()
    with Watch(every=3, inner=inner, strict=True, detectors=[]) as watch:
        train("llama", watch.backend, [16] * 7)
    assert inner.by_variant() == {"probed": [3], "plain": [4]}


def test_sampling_every_step_compiles_one_variant() -> None:
    inner = Counting()
    with Watch(every=1, inner=inner, strict=True, detectors=[]) as watch:
        train("llama", watch.backend, [16] * 4)
    assert inner.by_variant() == {"probed": [4], "plain": []}


def test_a_variant_waits_until_it_is_needed() -> None:
    inner = Counting()
    with Watch(every=5, inner=inner, strict=True, detectors=[]) as watch:
        train("llama", watch.backend, [16])
        assert inner.by_variant() == {"probed": [1], "plain": []}


def test_a_closed_watch_runs_the_plain_graph() -> None:
    inner = Counting()
    watch = Watch(every=1, inner=inner, strict=True, detectors=[])
    torch.manual_seed(0)
    model = FAMILIES["llama"].make(num_hidden_layers=1)
    compiled = torch.compile(model, backend=watch.backend)
    batch = tokens(torch.Generator().manual_seed(1))
    compiled(**batch).loss.backward()
    watch.close()
    compiled(**batch).loss.backward()
    assert inner.by_variant() == {"probed": [1], "plain": [1]}


def test_a_survey_samples_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Counting()
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "eager", inner)
    torch.manual_seed(0)
    coverage = foreshock.sites(FAMILIES["llama"].make(), **tokens(torch.Generator().manual_seed(1)))
    assert [status.sampled for status in coverage] == [0, 0]
    assert inner.by_variant() == {"probed": [], "plain": [1]}
