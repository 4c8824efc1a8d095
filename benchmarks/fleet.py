"""What merging costs a large job: bytes, collectives and host time a flush, from 8 to 16,384 ranks.

    python benchmarks/fleet.py [--json FOLDER] [--latency SECONDS] [--bandwidth BYTES]

One attention and one router are measured in a real step; a model has so many of them. What a rank's host does in a flush (packing,
the merge, making metrics of the sums) is timed in a job of one rank, and all-reduces of vectors of that length between two and four
processes of this machine. What more ranks take is a model, not a measurement: a ring waits ``2 (n - 1)`` times for the latency of
a link and moves ``2 (n - 1) / n`` of the vector over it; a tree waits ``2 log2 n`` times and moves it twice. The defaults are of
Ethernet between hosts, 50 us and 1.25 GB/s.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from measuring import where, write
from rich.console import Console
from rich.table import Table
from torch import distributed, multiprocessing
from transformer import Decoder, Size

from foreshock import Watch
from foreshock.collector import Collector
from foreshock.merging import Merging
from foreshock.shards import Local

RANKS = (8, 64, 512, 4096, 16384)
LAYERS, EXPERTS, HEADS = (32, 64, 128), (0, 8, 64, 512), 32
REPEATS = 5


def measured(experts: int) -> Local:
    """What one layer leaves in one step, and the watch's own way to finish it."""
    size = Size(width=8 * HEADS, layers=1, heads=HEADS, hidden=16, experts=experts, chosen=min(2, experts or 2))
    torch._dynamo.reset()
    with Watch(every=1, inner="aot_eager", detectors=[]) as watch:
        model = Decoder(size, 32)
        torch.compile(model, backend=watch.backend)(torch.randint(256, (2, 32))).backward()
        return watch.collector.local(0)


def of_many(one: Local, layers: int) -> Local:
    """The same of as many layers."""
    sums = {
        replace(instance, site=replace(instance.site, id=f"{instance.site.id}.{layer}")): of
        for instance, of in one.sums.items()
        for layer in range(layers)
    }
    return Local(0, sums, {})


def flush(local: Local) -> tuple[int, float, int]:
    """Bytes, host seconds and collectives of a flush whose layout is agreed, in a job of one rank."""

    def fail(what: str, error: Exception) -> None:
        raise error

    probes = {instance.site.kind: instance.probes for instance in local.sums}
    finish = Collector.finished.__get__(_Quiet())
    merging = Merging(lambda kind: probes[kind], finish, fail=fail)
    merging.launch(local)
    merging.receive()
    taken = []
    before = merging.flushes
    for _ in range(REPEATS):
        start = time.perf_counter()
        merging.launch(local)
        merging.receive()
        taken.append(time.perf_counter() - start)
    return 8 * sum(merging._layout.sizes), min(taken), 2 * (merging.flushes - before) // REPEATS


class _Quiet:
    """As much of a collector as finishing takes."""

    def _guarded(self, what: str, work: Any, *args: Any) -> Any:
        return work(*args)


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
    parser.add_argument("--latency", type=float, default=50e-6)
    parser.add_argument("--bandwidth", type=float, default=1.25e9)
    parser.add_argument("--json", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, told = Console(width=120), []
    console.print(" ".join(f"{key} {value}" for key, value in where().items()))
    ones = {experts: measured(experts) for experts in EXPERTS}
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        table = Table("layers", "experts", "KiB a flush", "collectives", "host ms", *(f"{n} ranks, ms" for n in RANKS))
        for experts, one in ones.items():
            for layers in LAYERS:
                size, host, collectives = flush(of_many(one, layers))
                network = {
                    n: [1e3 * cost(size, n, options.latency, options.bandwidth) for cost in (ring, tree)] for n in RANKS
                }
                times = (f"{ring_:.0f} / {tree_:.0f}" for ring_, tree_ in network.values())
                table.add_row(
                    str(layers), str(experts), f"{size / 1024:.0f}", str(collectives), f"{1e3 * host:.1f}", *times
                )
                told.append({"layers": layers, "experts": experts, "bytes": size, "host": host, "network": network})
        distributed.destroy_process_group()
    console.print(table)
    console.print(
        "ranks: a ring / a tree, both all-reduces together; a model, see --help. They run beside the training."
    )
    middle = sorted(int(one["bytes"]) for one in told)[len(told) // 2]
    real = {n: reductions(middle // 16, n) for n in (2, 4)}
    shown = ", ".join(f"{n} processes {1e3 * seconds:.2f} ms" for n, seconds in real.items())
    console.print(f"measured here, one all-reduce of {middle // 2048} KiB: {shown}")
    write("fleet", {"flushes": told, "measured": real}, options.json)


def ring(size: int, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds of two all-reduces, of ``size`` bytes together."""
    return 2 * 2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * size / bandwidth


def tree(size: int, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds of two all-reduces, of ``size`` bytes together."""
    return 2 * 2 * math.log2(ranks) * latency + 2 * size / bandwidth


if __name__ == "__main__":
    main()
