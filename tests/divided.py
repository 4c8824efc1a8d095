"""One rank of a small job that divides a model among its ranks, for tests/test_divided.py: ``python divided.py OUT SCENARIO ...``.

As in tests/merged.py each scenario is a training of its own, and a job of one process trains the whole model on the whole batch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from merged import (
    BATCH,
    EXPERTS,
    HEADS,
    LENGTH,
    RANK,
    STEPS,
    WORLD,
    Attention,
    D,
    Experts,
    Stack,
    backend,
    batches,
    inputs,
    watching,
    write,
)
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import (
    all_gather_single_autograd,
    all_to_all_single,
    all_to_all_single_autograd,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional

MICROBATCHES, CHOSEN = 4, 2


class Plain(nn.Module):
    """A layer without a site."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x).relu()


class Part(nn.Module):
    """Some layers of a model, under the names that they have in it."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def square(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def pipeline(out: Path, name: str) -> None:
    """Stages in a row: ``gpipe``, ``1f1b``; ``..., bare``: the second has no site; ``..., plain``: not watched."""
    torch.manual_seed(0)
    kinds = (Attention, Plain, Plain, Plain) if "bare" in name else (Attention, Attention, Attention, Experts)
    layers = {str(number): kind() for number, kind in enumerate(kinds)}
    model = Part({key: layers[key] for key in list(layers)[len(layers) * RANK // WORLD :][: len(layers) // WORLD]})
    with watching(name) as watch:
        model.compile(backend=backend(watch))
        schedule: Any = None
        if WORLD > 1:
            stage = PipelineStage(model, RANK, WORLD, torch.device("cpu"))
            kind = Schedule1F1B if "1f1b" in name else ScheduleGPipe
            schedule = kind(stage, MICROBATCHES, loss_fn=square)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1.0), inputs()
        every: list[Tensor] = []
        for _ in range(STEPS):
            x, target = next(batch), next(batch)
            losses: list[Tensor] = []
            if schedule is None:
                for part, aim in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
                    losses.append(square(model(part), aim))
                    losses[-1].backward()
                for parameter in model.parameters():
                    parameter.grad /= MICROBATCHES
            elif RANK == 0:
                schedule.step(x)
            else:
                schedule.step(target=target, losses=losses)
            if losses and watch is not None:
                watch.log(loss=torch.stack(losses).mean())
            every += losses
            optimizer.step()
            optimizer.zero_grad()
    write(out, name, watch, model, every)


class LocalExperts(nn.Module):
    """Experts of which each rank has some; tokens travel to theirs and back. ``padded``: each expert has room for every token, so
    that all sizes are known; else ranks tell each other how many come."""

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(D, EXPERTS, bias=False)
        whole = torch.randn(EXPERTS, D, D) / D**0.5
        self.up = nn.Parameter(whole.chunk(WORLD)[RANK].clone())
        self.padded = padded

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        gates, chosen = self.gate(tokens).softmax(-1).topk(CHOSEN, -1)
        work = self.with_room if self.padded else self.as_they_come
        return x + work(tokens, gates, chosen).view_as(x)

    def with_room(self, tokens: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        picked = functional.one_hot(chosen, EXPERTS).to(tokens.dtype)  # [tokens, k, experts]
        sent = torch.einsum("tke,td->etd", picked, tokens)
        own = (
            exchanged(sent).unflatten(0, (WORLD, -1)).transpose(0, 1).flatten(1, 2)
        )  # [own experts, ranks * tokens, D]
        done = torch.bmm(own, self.up).relu().unflatten(1, (WORLD, -1)).transpose(0, 1).flatten(0, 1)
        return torch.einsum("tke,tk,etd->td", picked, gates, exchanged(done))

    def as_they_come(self, tokens: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        counts = functional.one_hot(chosen.flatten(), EXPERTS).sum(0)
        with torch.no_grad():
            coming = all_to_all_single(counts, None, None, distributed.group.WORLD) if WORLD > 1 else counts
            leave, come = (x.view(WORLD, -1).sum(1).tolist() for x in (counts, coming))
            expert = torch.arange(EXPERTS // WORLD).repeat(WORLD).repeat_interleave(coming)
        own = exchanged(tokens[order // CHOSEN], come, leave)
        done = exchanged(torch.einsum("td,tdf->tf", own, self.up[expert]).relu(), leave, come)
        weighted = done * gates.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, order // CHOSEN, weighted)


def exchanged(x: Tensor, come: list[int] | None = None, leave: list[int] | None = None) -> Tensor:
    return x if WORLD == 1 else all_to_all_single_autograd(x.contiguous(), come, leave, distributed.group.WORLD)


def experts(out: Path, name: str) -> None:
    """Data parallel but for the experts: ``experts``, ``experts, padded``, ``experts, plain``."""
    torch.manual_seed(0)
    model, losses = Stack(Attention(), LocalExperts("padded" in name)), []
    with watching(name) as watch:
        if watch is not None:
            watch.bind(model)
        run = torch.compile(model, backend=backend(watch))
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1.0), batches()
        for _ in range(STEPS):
            loss = run(next(batch)).square().mean()
            losses.append(loss)
            if watch is not None:
                watch.log(loss=loss)
            loss.backward()
            for key, parameter in model.named_parameters() if WORLD > 1 else ():
                if not key.endswith("up"):
                    distributed.all_reduce(parameter.grad)
                parameter.grad /= WORLD
            optimizer.step()
            optimizer.zero_grad()
    write(out, name, watch, model, losses)


class Context(Attention):
    """Attention over positions of which each rank has some. ``swaps``: ranks swap positions for heads and back; else each gathers
    the keys and values of all."""

    def __init__(self, swaps: bool) -> None:
        super().__init__()
        self.swaps = swaps

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)) for f in (self.q, self.k, self.v))
        y = self.of_some_heads(q, k, v) if self.swaps else self.of_some_positions(q, k, v)
        return x + self.out(y.flatten(2))

    def of_some_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def to_heads(x: Tensor) -> Tensor:  # [B, S/ranks, H, h] -> [B, H/ranks, S, h]
            return exchanged(x.unflatten(2, (WORLD, -1)).movedim(2, 0)).permute(1, 3, 0, 2, 4).flatten(2, 3)

        y = functional.scaled_dot_product_attention(to_heads(q), to_heads(k), to_heads(v), is_causal=True)
        return exchanged(y.unflatten(2, (WORLD, -1)).permute(2, 0, 3, 1, 4)).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def of_some_positions(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        first, own = RANK * q.shape[2], q.shape[2]
        if WORLD > 1:
            k, v = (all_gather_single_autograd(x.contiguous(), 2, distributed.group.WORLD) for x in (k, v))
        mask = torch.arange(own)[:, None] + first >= torch.arange(own * WORLD)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def context(out: Path, name: str) -> None:
    """Each rank has some of the positions: ``swap``, ``swap, plain``, ``gather``."""
    torch.manual_seed(0)
    model, losses = Stack(*(Context("swap" in name) for _ in range(2))), []
    with watching(name) as watch:
        run = torch.compile(model, backend=backend(watch))
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1.0), inputs()
        for _ in range(STEPS):
            loss = run(next(batch).chunk(WORLD, 1)[RANK]).square().mean()
            losses.append(loss)
            if watch is not None:
                watch.log(loss=loss)
            loss.backward()
            for parameter in model.parameters() if WORLD > 1 else ():
                distributed.all_reduce(parameter.grad)
                parameter.grad /= WORLD
            optimizer.step()
            optimizer.zero_grad()
    write(out, name, watch, model, losses)


class Normed(Attention):
    """With a norm in front, of whose tokens ranks have some (sequence parallel)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, D // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def sequence(out: Path, name: str) -> None:
    """Tensor parallel in attention, and between attentions each rank has some of the positions."""
    torch.manual_seed(0)
    model = Stack(Normed(), Normed())
    if WORLD > 1:
        mesh, own = init_device_mesh("cpu", (WORLD,)), Shard(1)
        plan = {"norm": SequenceParallel(), "out": RowwiseParallel(output_layouts=own)}
        for layer in model.layers:
            parallelize_module(layer, mesh, plan | dict.fromkeys("qkv", ColwiseParallel(input_layouts=own)))
    with watching(name) as watch:
        run = torch.compile(model, backend=backend(watch))
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1.0), inputs()
        for _ in range(STEPS):
            x = next(batch).chunk(WORLD, 1)[RANK]
            (run(x).square().sum() / (BATCH * LENGTH * D)).backward()
            optimizer.step()
            optimizer.zero_grad()
    write(out, name, watch)


def sharded_parts(out: Path, name: str) -> None:
    """FSDP2 around tensor parallelism, which the norms take no part in."""
    torch.manual_seed(0)
    model, share = Stack(Normed(), Normed()), slice(None)
    if WORLD > 1:
        mesh = init_device_mesh("cpu", (WORLD // 2, 2), mesh_dim_names=("dp", "tp"))
        share = slice(RANK // 2, None, WORLD // 2)
        plan = {**dict.fromkeys("qkv", ColwiseParallel()), "out": RowwiseParallel()}
        for layer in model.layers:
            parallelize_module(layer, mesh["tp"], plan)
    with watching(name) as watch:
        watch.bind(model)
        for layer in model.layers:
            layer.compile(backend=backend(watch))
            if WORLD > 1:
                fully_shard(layer, mesh=mesh["dp"])
        if WORLD > 1:
            fully_shard(model, mesh=mesh["dp"])
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1.0), inputs()
        for _ in range(STEPS):
            model(next(batch)[share]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    write(out, name, watch)


def from_zero(out: Path, name: str) -> None:
    """Two stages that count their layers from zero, trained each by itself, whose weights the ranks of a stage share:
    ``zero, fsdp`` and ``zero, tp``; ``..., apart``: not merged. ``replicas, tp``: no stages, but copies of one model."""
    mesh = init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("stages", "parts"))
    stage, parts = RANK // (WORLD // 2), mesh["parts"]
    torch.manual_seed(stage if "zero" in name else 0)
    model = Stack(Attention(), Attention())
    with watching(name) as watch:
        for layer in model.layers:
            if "tp" in name:
                plan = {**dict.fromkeys("qkv", ColwiseParallel()), "out": RowwiseParallel()}
                parallelize_module(layer, parts, plan)
            else:
                layer.compile(backend=backend(watch))
                fully_shard(layer, mesh=parts)
        if "tp" in name:
            model.compile(backend=backend(watch))
        else:
            fully_shard(model, mesh=parts)
        optimizer, batch = torch.optim.SGD(model.parameters(), lr=1.0), inputs(stage)
        for _ in range(STEPS):
            model(next(batch)).square().mean().backward()
            for parameter in model.parameters() if "replicas" in name else ():
                distributed.all_reduce(parameter.grad.to_local(), group=mesh["stages"].get_group())
                parameter.grad /= 2
            optimizer.step()
            optimizer.zero_grad()
    write(out, name, watch)


SCENARIOS: dict[str, Callable[[Path, str], None]] = {
    **dict.fromkeys(("experts", "experts, padded", "experts, plain"), experts),
    **dict.fromkeys(("swap", "swap, plain", "gather"), context),
    "sequence": sequence,
    "fsdp and tp": sharded_parts,
    **dict.fromkeys(("zero, fsdp", "zero, tp", "zero, fsdp, apart", "replicas, tp"), from_zero),
    **dict.fromkeys(("gpipe", "gpipe, plain", "gpipe, bare", "1f1b"), pipeline),
}


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    if WORLD > 1:
        distributed.init_process_group("gloo")
    for name in names:
        torch._dynamo.reset()
        SCENARIOS[name](out, name)
    if WORLD > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
