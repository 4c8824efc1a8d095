"""One rank of a small distributed job, for tests/test_merging.py: ``python merged.py OUT SCENARIO ...``, torchrun's variables set.

Each scenario is a training of its own, with a watch of its own; its series, alarms and ledger go to ``OUT/SCENARIO.RANK.npz`` and
``.json``. In a job of one process a scenario trains on the whole batch that several ranks share. Models are float64: what jobs of
other sizes tell differs by how it was measured, in float32, and not by how the trainings drift apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import foreshock.ranks
from foreshock import Watch
from foreshock.demo import kernel
from foreshock.monitors import Finding
from foreshock.records import Probe

D, HEADS, EXPERTS, BATCH, LENGTH, STEPS = 32, 4, 4, 8, 16, 8
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
KERNEL_STEPS, BROKEN, DYING = 12, 6, 3
ASTRAY_STEPS, ASTRAY, ASTRAY_EVERY = 480, 400, 10


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, D // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Flash(Attention):
    """With the demo's kernel, which can be broken."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).bfloat16() for f in (self.q, self.k, self.v))
        y, _ = kernel.attention(q, k, v, True, (D // HEADS) ** -0.5)
        return x + self.out(y.to(x.dtype).transpose(1, 2).flatten(2))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, EXPERTS, bias=False), nn.Parameter(torch.randn(EXPERTS, D, D) / D**0.5)

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.einsum("bsd,edf->bsef", x, self.up).relu()
        y = y.gather(2, chosen[..., None].expand(*chosen.shape, D))
        return x + (y * gates[..., None]).sum(2)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


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
        "step": watch.step,
        **more,
    }
    (out / f"{name}.{RANK}.json").write_text(json.dumps(told))


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
    which rank 1 runs nothing, ``probe`` one that fails on rank 1, ``late`` lets it sleep."""
    foreshock.ranks.TIMEOUT = 5.0 if name == "late" else 60.0
    torch.manual_seed(RANK if name == "stages" else 0)
    model = Stack(Attention())

    def finish(facts: Any, sums: Any) -> dict[str, Any]:
        if RANK == 1:
            raise ValueError("no")
        return {"own/size": sums["size"]}

    probe = Probe("own", "attention", lambda facts, x, rows: {"size": x["q"].square().sum()}, finish)
    with Watch(every=1, inner="aot_eager", windows=(2,), probes=[probe] if name == "probe" else ()) as watch:
        run = model if name == "sites" and RANK == 0 else torch.compile(model, backend=watch.backend)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-2), batches()
        for step in range(STEPS):
            if name == "late" and RANK == 1 and step == DYING:
                time.sleep(12)
            x = next(batch)
            if not (name == "idle" and RANK == 1 and step % 2):
                run(x).square().mean().backward()
            if name in ("idle", "probe"):
                average(model)
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
    with Watch(
        out / "run", every=1, inner="aot_eager", on_alarm=lambda alarm: called.append(watch.step), strict=True
    ) as watch:
        run = torch.compile(DistributedDataParallel(model), backend=watch.backend)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-2), batches()
        for step in range(KERNEL_STEPS):
            if step == BROKEN and RANK == WORLD - 1:
                kernel.set_fault(kernel.Fault(diagonal=1, layer=1, layers=2))
            run(next(batch)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    kernel.set_fault(kernel.HEALTHY)
    write(out, name, watch, called=called)


class Heard:
    """A sink that keeps the steps of which it heard."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def readings(self, step: int, readings: Any) -> None:
        self.steps.append(step)

    def alarm(self, alarm: Any) -> None: ...

    def close(self) -> None: ...


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
            (shared,), ((own,),) = (
                watch.state_dict()["shared"],
                [x for key, x in watch.state_dict().items() if "rank" in key],
            )
        state = {"shared": ({**shared, "ranks": 1},), "rank0": (own,)}
        own["parts"]["pace"] = dict.fromkeys(own["parts"]["pace"], 4)
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
    **dict.fromkeys(("joined", "parted"), turned),
    "broken": broken,
    **dict.fromkeys(("tp", "tp, plain", "tp, apart"), tensor_parallel),
    **dict.fromkeys(("sites", "stages", "idle", "probe", "late"), apart),
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
