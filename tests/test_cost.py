"""What watching costs, as far as it can be counted: kernels, nodes, breaks, recompiles, bytes and operations, never time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, tokens
from test_counters import counted
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache
from torch.fx import GraphModule

from foreshock import Watch
from foreshock.records import Reading
from foreshock.store import RunStore
from foreshock.tables import FILE

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = {"llama": 19, "olmoe": 61}  # one attention; one attention and one router: torch 2.13, CPU


def kernels(name: str, watch: Watch | None, layers: int) -> int:
    """How many loops inductor wrote for one step."""
    torch._dynamo.reset()
    metrics.reset()
    torch.manual_seed(0)
    model = FAMILIES[name].make(num_hidden_layers=layers).train()
    compiled = torch.compile(model, backend="inductor" if watch is None else watch.backend)
    compiled(**tokens(torch.Generator().manual_seed(1))).loss.backward()
    return int(metrics.generated_kernel_count)


@pytest.mark.parametrize("name", list(KERNELS))
def test_a_site_adds_so_many_kernels(name: str) -> None:
    """Beyond those of the plain graph; a number that grows is a fusion that was lost."""
    with fresh_cache(), Watch(every=1, strict=True, detectors=[]) as watch:
        assert kernels(name, watch, 1) - kernels(name, None, 1) == KERNELS[name]


def inserted(name: str, layers: int) -> dict[tuple[str, str], int]:
    """Nodes that passes wrote, by pass and site."""
    found: dict[tuple[str, str], int] = {}

    def inner(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            mark = node.meta.get("foreshock")
            if mark:
                key = (mark["pass"], mark["site"])
                found[key] = found.get(key, 0) + 1
        return module.forward

    torch._dynamo.reset()
    with Watch(every=1, inner=inner, strict=True, detectors=[]) as watch:
        model = FAMILIES[name].make(num_hidden_layers=layers).train()
        torch.compile(model, backend=watch.backend)(**tokens(torch.Generator().manual_seed(1)))
    return found


def test_a_site_adds_so_many_nodes() -> None:
    """Of an attention one read, a tap of three operands with its carriers, and what leaves behind the kernel; of a router one read
    and a tap of one tensor. Of a graph two inputs, one split of the slot with a piece a site, one packed output."""
    found = inserted("olmoe", 2)
    attention = {"insert_reads": 1, "insert_taps": 7}
    router = {"insert_reads": 1, "insert_taps": 2}
    graph = {("pipeline", ""): 2, ("insert_taps", ""): 1 + 4, ("pack", ""): 1}
    sites = {
        f"model.layers.{i}.{name}": of for i in (0, 1) for name, of in (("self_attn", attention), ("mlp.gate", router))
    }
    assert found == graph | {(written_by, site): n for site, of in sites.items() for written_by, n in of.items()}


def test_matching_and_rewriting_visit_a_node_a_bounded_number_of_times() -> None:
    """Python calls within `patterns` and `passes`, of eight layers over two: at most in proportion."""

    def calls(layers: int) -> int:
        count = 0

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call" and "foreshock" in frame.f_globals.get("__name__", "")

        def inner(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            return module.forward

        torch._dynamo.reset()
        model = FAMILIES["llama"].make(num_hidden_layers=layers).train()
        with Watch(every=1, inner=inner, strict=True, detectors=[]) as watch:
            backend = watch.backend

            def counting(module: GraphModule, inputs: list[Any]) -> Any:
                sys.setprofile(profile)
                try:
                    return backend(module, inputs)
                finally:
                    sys.setprofile(None)

            torch.compile(model, backend=counting)(**tokens(torch.Generator().manual_seed(1)))
        return count

    assert calls(8) <= 4.2 * calls(2)


def test_a_graph_has_no_break_or_recompile_more() -> None:
    """Sampled and plain steps in turns, under inductor."""

    def train(backend: Any) -> None:
        torch.manual_seed(0)
        model = FAMILIES["llama"].make(num_hidden_layers=1).train()
        compiled, optimizer = torch.compile(model, backend=backend), torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(4):
            compiled(**tokens(torch.Generator().manual_seed(1))).loss.backward()
            optimizer.step()

    sections = ("frames", "stats", "graph_break", "recompiles")
    plain = counted(sections, lambda: train("aot_eager"))
    with Watch(every=2, inner="aot_eager", strict=True, detectors=[]) as watch:
        assert counted(sections, lambda: train(watch.backend)) == plain


def test_a_number_takes_four_bytes_and_little_more(tmp_path: Path) -> None:
    """Noise, which packs worst: 64 series of 8 numbers. The newest 256 records lie unpacked, once: growth is counted."""
    store, random, sizes = RunStore(tmp_path), np.random.default_rng(0), []
    for step in range(4096):
        numbers = random.standard_normal((64, 8))
        store.write(step, [Reading(f"metric/{i % 8}", f"site{i // 8}", row) for i, row in enumerate(numbers)])
        if step % 128 == 127:
            store.flush()
        if step in (2047, 4095):
            store.close()
            sizes.append((tmp_path / FILE).stat().st_size)
    assert (sizes[1] - sizes[0]) / (2048 * 64 * 8) <= 1.05 * 4


def test_a_new_series_costs_the_same_beside_many(tmp_path: Path) -> None:
    """Steps of SQLite's machine for the first record of 2,000 series, over those of 200."""

    def operations(series: int) -> int:
        count, store = 0, RunStore(tmp_path / str(series))

        def progress() -> int:
            nonlocal count
            count += 1
            return 0

        store._writable().set_progress_handler(progress, 100)
        store.write(0, [Reading(f"metric/{i}", "site", np.zeros(1)) for i in range(series)])
        store.flush()
        store._writable().set_progress_handler(None, 0)
        store.close()
        return count

    assert operations(2000) <= 11 * operations(200)
