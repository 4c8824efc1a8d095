"""What merging costs a large job: bytes, collectives and host time, from 8 to 16,384 ranks.

    python benchmarks/fleet.py [--json FOLDER] [--latency SECONDS] [--bandwidth BYTES]

A layer with 32 heads (and a router) is trained for 51 steps in a job of one rank; what it then has to tell, with all that is read
beside its sites (spectra of both windows, router weights, the loss, the squares of gradients), is told by as many layers in a job
that is simulated: `foreshock.merging` runs as it is, its collectives are counted, and other ranks' answers are made up. So bytes,
collectives and the host's time are counted and measured, the last as the processor's, the least of some.

What the network takes is a model, with a latency of 50 us a message and 1.25 GB/s (Ethernet between hosts): an all-reduce of ``b``
bytes as a ring ``2 (n - 1) latency + 2 (n - 1) / n b / bandwidth`` (gloo's way), as a tree ``2 log2 n latency + 2 b / bandwidth``;
an all-gather as a ring, a broadcast as a tree. All-reduces between two and four processes of this machine are measured beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from measuring import where, write
from rich.console import Console
from rich.table import Table
from simulated import Simulated
from torch import distributed, multiprocessing
from transformer import Decoder, Size

from foreshock import Watch
from foreshock.gradients import WHOLE
from foreshock.merging import Merging
from foreshock.monitors.spectra import in_turn
from foreshock.shards import Local

RANKS = (8, 64, 512, 4096, 16384)
LAYERS, EXPERTS, HEADS = (32, 64, 128), (0, 8, 64, 512), 32
STAGES = 8
EVERY, STEPS = 10, 51  # steps: up to the first at which both windows of the spectra are full
REPEATS = 5
_PRINT = re.compile(r'"print": "\w+"')  # of a site's weights


@dataclass(frozen=True)
class Layer:
    """What one layer has to tell at the last step, and the watch and the model of it, which finish and describe it."""

    local: Local
    watch: Watch
    model: torch.nn.Module


def trained(experts: int, heads: int = HEADS) -> Layer:
    """One layer, watched as a job of one rank is that is one of several."""
    size = Size(width=8 * heads, layers=1, heads=heads, hidden=16, experts=experts, chosen=min(2, experts or 2))
    told: list[Local] = []
    launch = Merging.launch

    def spied(merging: Merging, local: Local) -> None:
        told.append(local)
        launch(merging, local)

    torch._dynamo.reset()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("foreshock.ranks.is_shared", return_value=True),
        mock.patch.object(Merging, "launch", spied),
    ):
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        with Watch(every=EVERY, inner="eager", detectors=[], strict=True) as watch:
            model = Decoder(size, 32)
            optimizer = torch.optim.AdamW(model.parameters())
            run = torch.compile(model, backend=watch.backend)
            for _ in range(STEPS):
                loss = run(torch.randint(256, (2, 32)))
                loss.backward()
                watch.log(loss=loss)
                optimizer.step()
                optimizer.zero_grad()
        distributed.destroy_process_group()
    return Layer(max(told, key=lambda local: len(local.loose)), watch, model)


def of_many(one: Local, layers: int, first: int = 0) -> Local:
    """The same of as many layers, from ``first`` on. Sites take turns to have their spectra read, within the steps of a sample."""
    sums, loose = {}, {key: values for key, values in one.loose.items() if key[1] is None}
    names = {(None, layer): None for layer in range(layers)}
    for instance, of in one.sums.items():
        for layer in range(first, first + layers):
            site = replace(instance.site, id=f"{instance.site.id}.{layer}")
            sums[replace(instance, site=site)] = of
            names[instance.site.id, layer] = site.id
    for (metric, site_, _), values in one.loose.items():
        if site_ is not None:
            for layer in range(first, first + layers):
                loose[metric, names[site_, layer], layer % EVERY if in_turn(metric) else 0] = values
    for key, values in one.loose.items():
        if key[0] == WHOLE:
            loose[key] = np.tile(values, layers)
    return Local(0, sums, loose)


def merging_of(layer: Layer, local: Local) -> Merging:
    """Of a rank that has ``local`` to tell."""

    def fail(what: str, error: Exception) -> None:
        raise error

    probes = {instance.site.kind: instance.probes for instance in local.sums}
    parameters = next(len(values) for key, values in local.loose.items() if key[0] == WHOLE)
    prints = [f"{at:016x}" for at in range(parameters)]
    return Merging(lambda kind: probes[kind], layer.watch.collector.finished, fail=fail, prints=lambda: prints)


def flush(layer: Layer, local: Local, ranks: int) -> tuple[list[tuple[str, int]], float]:
    """Collectives of a flush whose layout is agreed, with their bytes, and the host's seconds."""
    with Simulated(ranks).running() as job:
        merging = merging_of(layer, local)
        merging.launch(local)
        merging.receive()
        job.calls.clear()

        def once() -> None:
            merging.launch(local)
            merging.receive()

        taken = least(once)
    return job.calls[: len(job.calls) // REPEATS], taken


def agreement(
    layer: Layer, layers: int, ranks: int, stages: int = 1, sharded: bool = False
) -> tuple[list[tuple[str, int]], float]:
    """The same of agreeing on a layout among ``ranks`` of a pipeline of so many ``stages``. ``sharded``: those of a stage hold its
    weights between them (FSDP2), and take the sites in turns to read what no probe does."""
    share, described = layers // stages, list[tuple[str, str, str]]()
    with Simulated(ranks).running():
        for stage in reversed(range(stages)):
            merging = merging_of(layer, local := of_many(layer.local, share, stage * share))
            merging.launch(local)
            described.insert(0, merging._description())

    @cache
    def of_place(stage: int, place: int) -> tuple[tuple[str, str, str], int]:
        """Of the rank at a place of a stage's turns, whose first alone tells prints of weights."""
        sites, loose, prints = described[stage]
        keys = json.loads(loose)
        names = {name: at for at, name in enumerate(dict.fromkeys(name for _, name, *_ in keys if name is not None))}
        mine = [key for key in keys if key[1] is None or names[key[1]] % (ranks // stages) == place]
        return (sites if place == 0 else _PRINT.sub('"print": null', sites), json.dumps(mine), prints), 1 + stage

    def told(rank: int) -> tuple[tuple[str, str, str], int]:
        stage = rank * stages // ranks
        return of_place(stage, min(rank - stage * ranks // stages, 2 * layers)) if sharded else (described[stage], 0)

    mine = {tuple(key[:-1]) for key in json.loads(told(0)[0][1])}
    merging._sizes = {key: size for key, size in merging._sizes.items() if key in mine}
    with Simulated(ranks, told).running() as job:
        taken = least(merging._agree, 1)
    return job.calls, taken - job.seconds


def least(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Seconds of the processor."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


@dataclass(frozen=True)
class Network:
    """Seconds a message and bytes a second."""

    latency: float = 50e-6
    bandwidth: float = 1.25e9

    def ring(self, size: int, ranks: int) -> float:
        """Seconds of an all-reduce."""
        return 2 * (ranks - 1) * self.latency + 2 * (ranks - 1) / ranks * size / self.bandwidth

    def tree(self, size: int, ranks: int) -> float:
        """Seconds of an all-reduce."""
        return 2 * math.log2(ranks) * self.latency + 2 * size / self.bandwidth

    def gather(self, size: int, ranks: int) -> float:
        return (ranks - 1) * (self.latency + size / self.bandwidth)

    def broadcast(self, size: int, ranks: int) -> float:
        return math.log2(ranks) * (self.latency + size / self.bandwidth)


def flushes(console: Console, layers_of: dict[int, Layer], network: Network) -> list[dict[str, Any]]:
    """The table of flushes. Every rank has every site, as under data parallelism: of a pipeline's ranks each packs a part."""
    title = "a flush: network as a ring / a tree, both all-reduces, a model"
    table = Table(
        "layers", "experts", "KiB", "collectives", "host ms", *(f"{n:,} ranks, ms" for n in RANKS), title=title
    )
    told = []
    for experts, layer in layers_of.items():
        for layers in LAYERS:
            calls, host = flush(layer, of_many(layer.local, layers), RANKS[-1])
            size = sum(nbytes for _, nbytes in calls)
            took = {
                n: [1e3 * sum(of(nbytes, n) for _, nbytes in calls) for of in (network.ring, network.tree)]
                for n in RANKS
            }
            cells = (f"{ring:.0f} / {tree:.1f}" for ring, tree in took.values())
            table.add_row(str(layers), str(experts), f"{size / 1024:.0f}", str(len(calls)), f"{1e3 * host:.1f}", *cells)
            told.append({"layers": layers, "experts": experts, "calls": calls, "host": host, "network": took})
    console.print(table)
    return told


def agreements(console: Console, layer: Layer, network: Network) -> list[dict[str, Any]]:
    """The table of layouts being agreed: at the first samples, and after a recompilation."""
    title = "a layout agreed; network a model"
    table = Table("layers", "ranks", "stages", "weights", "KiB", "collectives", "host s", "network s", title=title)
    told = []
    kinds = [(n, 1, sharded) for sharded in (False, True) for n in RANKS]
    kinds += [(RANKS[-1], STAGES, sharded) for sharded in (False, True)]
    for layers in (LAYERS[0], LAYERS[-1]):
        for ranks, stages, sharded in kinds:
            calls, host = agreement(layer, layers, ranks, stages, sharded)
            size = sum(nbytes for name, nbytes in calls if name == "broadcast")
            took = sum(getattr(network, name.removeprefix("all_"))(nbytes, ranks) for name, nbytes in calls)
            weights = "sharded" if sharded else "whole"
            row = str(layers), f"{ranks:,}", str(stages), weights, f"{size / 1024:.0f}", str(len(calls))
            table.add_row(*row, f"{host:.3f}", f"{took:.3f}")
            told.append(
                {"layers": layers, "ranks": ranks, "stages": stages, "sharded": sharded, "host": host, "network": took}
                | {"calls": calls}
            )
    console.print(table)
    return told


def reductions(numbers: int, ranks: int) -> float:
    """Seconds of one all-reduce between processes of this machine, the least of some."""
    with tempfile.TemporaryDirectory() as folder:
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(_reduce, (ranks, folder, numbers, queue), nprocs=ranks)
        found: float = queue.get()
        return found


def _reduce(rank: int, ranks: int, folder: str, numbers: int, queue: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    vector, taken = torch.zeros(numbers, dtype=torch.float64), []
    for _ in range(10 * REPEATS):
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce(vector)
        taken.append(time.perf_counter() - start)
    if rank == 0:
        queue.put(min(taken))
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=Network.latency)
    parser.add_argument("--bandwidth", type=float, default=Network.bandwidth)
    parser.add_argument("--json", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, network = Console(width=140), Network(options.latency, options.bandwidth)
    console.print(" ".join(f"{key} {value}" for key, value in where().items()))
    layers_of = {experts: trained(experts) for experts in EXPERTS}
    told = flushes(console, layers_of, network)
    agreed = agreements(console, layers_of[8], network)
    middle = sorted(sum(nbytes for _, nbytes in one["calls"]) for one in told)[len(told) // 2]
    real = {n: reductions(middle // 16, n) for n in (2, 4)}
    shown = ", ".join(f"{n} processes {1e3 * seconds:.2f} ms" for n, seconds in real.items())
    console.print(f"measured here, one all-reduce of {middle // 2048} KiB: {shown}")
    write("fleet", {"flushes": told, "agreements": agreed, "measured": real}, options.json)


if __name__ == "__main__":
    main()
