"""One rank of a small distributed job, for tests/test_merging.py: ``python merged.py OUT SCENARIO ...``, torchrun's variables set.

Each scenario is a training of its own, with a watch of its own; its series, alarms and ledger go to ``OUT/SCENARIO.RANK.npz`` and
``.json``. In a job of one process a scenario trains on the whole batch that several ranks share. Models are float64: what jobs of
other sizes tell differs by how it was measured, in float32, and not by how the trainings drift apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from disks import refusing
from merged_models import DYING, Attention, D, Experts, Flash, Heard, Resizing, Stack, failing_once, refuse
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import foreshock.collector
import foreshock.merging
from foreshock import Watch
from foreshock.demo import kernel
from foreshock.exchange import exchange
from foreshock.meeting import PATIENCE
from foreshock.merging import Merging
from foreshock.monitors import Finding
from foreshock.records import Probe

BATCH, LENGTH, STEPS = 8, 16, 8
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
KERNEL_STEPS, BROKEN = 12, 6
LONELY_STEPS = PATIENCE + 4
ASTRAY_STEPS, ASTRAY, ASTRAY_EVERY = 480, 400, 10


TEXTS: list[list[int]] = []  # of each agreement, how many texts there were of sites, and of prints


def counted(*args: Any) -> Any:
    cards, found = exchange(*args)
    TEXTS.append([len(told) for told in found])
    return cards, found


foreshock.merging.exchange = counted


def inputs(seed: int = 1) -> Any:
    """Endlessly, batches of all ranks together."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(BATCH, LENGTH, D, generator=generator, dtype=torch.float64)


def batches() -> Any:
    """Endlessly, the share of this rank."""
    for x in inputs():
        yield x.chunk(WORLD)[RANK]


def watching(name: str, **options: Any) -> contextlib.AbstractContextManager[Watch | None]:
    """A watch, or none where the scenario is ``..., plain``: what a training is held against. ``..., apart``: not merged."""
    if name.endswith("plain"):
        return contextlib.nullcontext()
    options = {"every": 1, "windows": (2, 4), "strict": True, **options}
    return Watch(inner="aot_eager", merge=not name.endswith("apart"), **options)


def backend(watch: Watch | None) -> Any:
    return torch._dynamo.lookup_backend("aot_eager") if watch is None else watch.backend


def write(
    out: Path,
    name: str,
    watch: Watch | None,
    model: nn.Module | None = None,
    losses: Sequence[Tensor] = (),
    **more: Any,
) -> None:
    """What was trained (parameters, losses) and, if it was watched, what the watch knows."""
    trained = {
        f"trained|{key}": getattr(parameter.data, "full_tensor", lambda p=parameter: p.data)().numpy()
        for key, parameter in (model.named_parameters() if model is not None else ())
    }
    if losses:
        trained["trained|losses"] = torch.stack([loss.detach() for loss in losses]).numpy()
    if watch is None:
        np.savez(out / f"{name}.{RANK}.npz", **trained)
        return
    store = watch.collector.store
    arrays = {
        f"{metric}|{site}|{what}": values
        for metric in watch.metrics()
        for site in store.sites_of(metric)
        for what, values in zip(("steps", "values"), watch.series(metric, site), strict=True)
    }
    np.savez(out / f"{name}.{RANK}.npz", **arrays, **trained)
    merging = watch.collector.merging
    told = {
        "alarms": [alarm.to_json() for alarm in watch.alarms],
        "sites": {s.site.id: [s.evaluations, s.sampled, list(s.notes)] for s in watch.coverage},
        "warnings": watch.coverage.warnings,
        "flushes": merging and merging.flushes,
        "agreements": merging and merging.agreements,
        "texts": TEXTS.copy(),
        "step": watch.step,
        **more,
    }
    (out / f"{name}.{RANK}.json").write_text(json.dumps(told))
    TEXTS.clear()


def parallel(out: Path, name: str) -> None:
    """Data parallel: ``ddp``, and ``fsdp``, where each layer is compiled by itself. ``ddp, buckets``: the gradients of an attention
    fill a bucket, and by buckets Dynamo splits the graph; ``ddp, unsplit``: not so. ``ddp, group``: the group is given."""
    sharded, layer = name.startswith("fsdp"), 4 * D * D * 8  # bytes
    small = "buckets" in name or "unsplit" in name
    buckets = {"bucket_cap_mb": layer / 2**20} if small else {}
    distributed._DEFAULT_FIRST_BUCKET_BYTES = layer if small else 2**20  # the first must be no larger than others
    torch._dynamo.config.optimize_ddp = "unsplit" not in name
    torch.manual_seed(0)
    model, graphs, losses = Stack(Attention(), Experts(), Attention()), [], []
    group = distributed.new_group(backend="gloo") if name.endswith("group") else None
    with watching(name, every=2 if "sampled" in name else 1, strict=not sharded, group=group) as watch:

        def compiler(module: Any, x: Any) -> Any:
            graphs.append(module)
            return backend(watch)(module, x)

        run: nn.Module = model
        if sharded:
            for part in model.layers:
                fully_shard(part)
                part.compile(backend=compiler)
            fully_shard(model)
        else:
            run = torch.compile(DistributedDataParallel(model, **buckets) if WORLD > 1 else model, backend=compiler)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1.0), batches()
        for _ in range(STEPS):
            loss = run(next(batch)).square().mean()
            if watch is not None:
                watch.log(loss=loss)
            losses.append(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch._dynamo.config.optimize_ddp = True
    write(out, name, watch, model, losses, graphs=len(graphs))


def tensor_parallel(out: Path, name: str) -> None:
    """Each rank has some of the heads, and the whole batch."""
    torch.manual_seed(0)
    model, losses = Stack(Attention(), Attention()), []
    if WORLD > 1:
        mesh = init_device_mesh("cpu", (WORLD,))
        plan = {**dict.fromkeys("qkv", ColwiseParallel()), "out": RowwiseParallel()}
        for layer in model.layers:
            parallelize_module(layer, mesh, plan)
    with watching(name) as watch:
        run = torch.compile(model, backend=backend(watch))
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1.0), inputs()
        for _ in range(STEPS):
            losses.append(run(next(batch)).square().mean())
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    write(out, name, watch, model, losses)


def apart(out: Path, name: str) -> None:
    """Ranks that train by themselves: ``sites`` has none on rank 0, ``stages`` other layers under the same name, ``idle`` steps in
    which rank 1 runs nothing (and rank 0 asks for its optimizer's state), ``probe`` one that fails on rank 1,
    ``late`` lets it sleep, in ``mute`` it cannot say what it has, nor weigh once."""
    torch.manual_seed(RANK if name == "stages" else 0)
    model = Stack(Attention())

    def finish(facts: Any, sums: Any) -> dict[str, Any]:
        if RANK == 1:
            raise ValueError("no")
        return {"own/size": sums["size"]}

    probe = Probe("own", "attention", lambda facts, x, rows: {"size": x["q"].square().sum()}, finish)
    reads: list[int] = []
    most, description = foreshock.collector.MOST_SAMPLES, Merging._description
    probes, timeout = [probe] if name == "probe" else (), 5.0 if name == "late" else None
    monitors = ["default", Resizing()] if name == "mute" else None
    with Watch(
        every=1, inner="aot_eager", windows=(2,), probes=probes, merge_timeout=timeout, monitors=monitors
    ) as watch:
        if name == "late":
            foreshock.collector.MOST_SAMPLES = 5
            read, watch.collector.optimizer = watch.collector.optimizer, lambda *x: (reads.append(x[0]), read(*x))
        if name == "mute" and RANK == 1:
            watch.ranks._weigh = failing_once(watch.ranks._weigh)
            Merging._description = refuse
        run = model if name == "sites" and RANK == 0 else torch.compile(model, backend=watch.backend)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-2), batches()
        for step in range(STEPS):
            if name == "late" and RANK == 1 and step == DYING:
                time.sleep(12)
            x = next(batch)
            if name == "late":
                watch.log(loss=1.0, tokens=step)
            if not (name == "idle" and RANK == 1 and step % 2):
                run(x).square().mean().backward()
            if name in ("idle", "probe", "mute") or (name == "late" and step < DYING):
                average(model)
            optimizer.step()
            optimizer.zero_grad()
            if name == "idle" and RANK == 0:
                get_optimizer_state_dict(model, optimizer)
    foreshock.collector.MOST_SAMPLES, Merging._description = most, description
    write(out, name, watch, model, reads=reads, forward=watch.clock.forward_step)


def lonely(out: Path, name: str) -> None:
    """Rank 0 alone has a watch, or none has: ``lonely``; ``lonely, plain``. Training makes another group behind it."""
    torch.manual_seed(0)
    model, watched = Stack(Attention()), RANK == 0 and not name.endswith("plain")
    with Watch(out / "lonely", every=1, inner="aot_eager", windows=(2,), merge_timeout=0.5) as watch:
        backend = watch.backend if watched else "aot_eager"
        run = torch.compile(DistributedDataParallel(model), backend=backend)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-2), batches()
        if not watched:
            watch.close()
        for _ in range(LONELY_STEPS):
            run(next(batch)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    distributed.barrier(distributed.new_group(backend="gloo"))
    write(out, name, watch, model)


def full(out: Path, name: str) -> None:
    """The disk of rank 0 is full for some steps; with ``full, plain`` nobody watches."""
    torch.manual_seed(0)
    model, watched = Stack(Attention()), not name.endswith("plain")
    with refusing() as disk, Watch(out / name, every=1, inner="aot_eager", windows=(2,)) as watch:
        run = torch.compile(DistributedDataParallel(model), backend=watch.backend if watched else "aot_eager")
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-2), batches()
        if not watched:
            watch.close()
        for step in range(STEPS):
            is_full = RANK == 0 and DYING <= step < STEPS - 1
            disk.error = sqlite3.OperationalError("database or disk is full") if is_full else None
            run(next(batch)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    write(out, name, watch, model)


def average(model: nn.Module) -> None:
    """Of the gradients over ranks, zero where a rank has none."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        distributed.all_reduce(parameter.grad)


def broken(out: Path, name: str) -> None:
    """A kernel that goes wrong on the last rank alone."""
    torch.manual_seed(0)
    model = Stack(Flash(), Flash())
    called: list[int] = []
    asked: list[int] = []
    stopped: list[int] = []
    row = ["stop", lambda alarm: called.append(watch.step)]
    with Watch(out / "run", every=1, inner="aot_eager", on_alarm=row, strict=True) as watch:
        assert watch.acting._agreement is not None
        ask = watch.acting._agreement._ask
        watch.acting._agreement._ask = lambda step: (asked.append(step), ask(step))
        run = torch.compile(DistributedDataParallel(model), backend=watch.backend)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-2), batches()
        for step in range(KERNEL_STEPS):
            if step == BROKEN and RANK == WORLD - 1:
                kernel.set_fault(kernel.Fault(diagonal=1, layer=1, layers=2))
            run(next(batch)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if watch.stop_requested:
                stopped.append(watch.step)
    kernel.set_fault(kernel.HEALTHY)
    write(out, name, watch, called=called, asked=asked, stopped=stopped)


def without_gloo(out: Path, name: str) -> None:
    """The watch cannot make a group of its own."""

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("gloo is not built in")

    made, distributed.new_group = distributed.new_group, refuse
    torch.manual_seed(0)
    model, heard = Stack(Attention()), Heard()
    with Watch(out / "alone", every=1, inner="aot_eager", windows=(2,), sinks=[heard]) as watch:
        run = torch.compile(DistributedDataParallel(model), backend=watch.backend)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-2), batches()
        for _ in range(STEPS):
            run(next(batch)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.state_dict()  # packs what the step measured, for whoever may merge it
    distributed.new_group = made
    write(out, name, watch, heard=heard.steps)


class Finds:
    """Finds something at step `DYING`, on every rank, or for itself on rank 1 alone."""

    def __init__(self, everywhere: bool) -> None:
        self.everywhere = everywhere

    def update(self, step: int, readings: Any, sites: Any) -> list[Finding]:
        if step != DYING or not (self.everywhere or RANK == 1):
            return []
        return [Finding(step, step, next(iter(sites)), "attention/nonfinite", float("nan"), "none", +1, 10.0, 0)]


def turned(out: Path, name: str) -> None:
    """Each rank watches for itself, and after a resume they are one run: ``joined``; the other way round: ``parted``."""
    torch.manual_seed(0)
    model, state = Stack(Attention()), None
    optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-2), batches()
    for merge in (name == "parted", name == "joined"):
        torch._dynamo.reset()
        finds = [Finds(merge)] if state is None else []
        with Watch(every=1, inner="aot_eager", windows=(2, 4), merge=merge, detectors=finds) as watch:
            if state is not None:
                watch.load_state_dict(state)
            run = torch.compile(DistributedDataParallel(model), backend=watch.backend)
            for _ in range(STEPS):
                run(next(batch)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            state = watch.state_dict()
    write(out, name, watch)


def paced(out: Path, name: str) -> None:
    """Ranks go on from the state of a single process whose budget had made its samples four times rarer."""
    torch.manual_seed(0)
    model, state = Stack(Attention()), None
    optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-2), batches()
    for _ in range(2):
        torch._dynamo.reset()
        with Watch(every=1, budget=0.5, inner="aot_eager", windows=(2,)) as watch:
            if state is not None:
                watch.load_state_dict(state)
            run = torch.compile(DistributedDataParallel(model), backend=watch.backend)
            for _ in range(STEPS):
                run(next(batch)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            saved = watch.state_dict()
        (shared,), (own,) = saved["shared"], saved[f"rank{RANK}"]
        state = {"shared": ({**shared, "ranks": 1, "untold": []},), "rank0": (own,)}
        shared["parts"]["pace"] = dict.fromkeys(shared["parts"]["pace"], 4)
    write(out, name, watch)


def astray(out: Path, name: str) -> None:
    """From a step on the inputs of one rank are far too large, or those of all ranks: ``astray``; ``astray, all``."""
    torch.manual_seed(0)
    model = Stack(Attention(), Attention())
    with Watch(every=ASTRAY_EVERY, inner="aot_eager", strict=True) as watch:
        run = torch.compile(DistributedDataParallel(model), backend=watch.backend)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-3), batches()
        for step in range(ASTRAY_STEPS):
            x = next(batch)
            if step >= ASTRAY and ("all" in name or RANK == 2):
                x = 3 * x
            loss = (run(x) - x).square().mean()
            watch.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    write(out, name, watch)


SCENARIOS = {
    **dict.fromkeys(("astray", "astray, all"), astray),
    "paced": paced,
    "no gloo": without_gloo,
    **dict.fromkeys(("full", "full, plain"), full),
    **dict.fromkeys(("lonely", "lonely, plain"), lonely),
    **dict.fromkeys(("joined", "parted"), turned),
    "broken": broken,
    **dict.fromkeys(("tp", "tp, plain", "tp, apart"), tensor_parallel),
    **dict.fromkeys(("sites", "stages", "idle", "probe", "late", "mute"), apart),
}


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    if WORLD > 1 or any(name.startswith("fsdp") for name in names):
        distributed.init_process_group("gloo")
    for name in names:
        torch._dynamo.reset()
        SCENARIOS.get(name, parallel)(out, name)
    if WORLD > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    os._exit(0)  # where a rank was given up, torchrun's own teardown would wait


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
