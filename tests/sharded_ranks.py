"""One rank of a small sharded job, for tests/test_sharded.py: ``python sharded_ranks.py OUT JOB``, under torchrun.

Scenarios train one float64 model sharded and watched, some sharded and not watched, and whole on each rank with gradients
averaged by hand. What each watch knew, and the bits of losses and parameters, go to ``OUT/rankN.json``.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

from foreshock import Watch, _torch

STEPS, EVERY, WINDOWS = 9, 2, (2, 4)
LAYERS, D, HEADS, KV, DIM, EXPERTS = 2, 16, 4, 2, 4, 4
RESUMED = 5  # steps after which a resumed scenario goes on with a new watch
HALF = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}


class Scenario(NamedTuple):
    way: str
    monitors: str = "default"
    inner: str = "aot_eager"
    options: Mapping[str, Any] = {}
    plain: bool = False  # also trained without a watch
    resumed: bool = False  # goes on with a new watch in mid-run
    alike: bool = False  # the ranks have the same batches: what is no data parallelism


KEPT: Mapping[str, Any] = {"reshard_after_forward": False}
HALF: Mapping[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
JOBS: dict[str, dict[str, Scenario]] = {
    "first": {
        "whole, alike": Scenario("whole", alike=True),
        "fsdp": Scenario("fsdp", plain=True, alike=True),
        "tp": Scenario("tp", "all", plain=True, alike=True),
    },
    "fsdp": {
        "whole": Scenario("whole"),
        "fsdp, resumed": Scenario("fsdp", resumed=True),
        "fsdp, kept": Scenario("fsdp", options=KEPT),
        "fsdp, no root": Scenario("fsdp, no root", "all"),
        "fsdp, compiled as a whole": Scenario("fsdp, compiled as a whole"),
        "fsdp, replicated": Scenario("fsdp, replicated"),
        "fsdp, bfloat16": Scenario("fsdp", options=HALF, plain=True),
    },
    "others": {
        "whole, alike": Scenario("whole", alike=True),
        "tp, no part taken out": Scenario("tp, no part taken out", plain=True, alike=True),
        "fsdp and tp": Scenario("fsdp and tp", plain=True, alike=True),
    },
    "inductor": {
        "whole, alike": Scenario("whole", alike=True),
        "fsdp, inductor": Scenario("fsdp", inner="inductor", plain=True, alike=True),
    },
}


class Block(nn.Module):
    """An attention with fewer key heads, and a router over experts that are all computed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, n * DIM, bias=False) for n in (HEADS, KV, KV, HEADS))
        self.router = nn.Linear(D, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, D, D) / 4)
        self.by_hand = False

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        if self.by_hand:
            k, v = (y.repeat_interleave(HEADS // KV, 1) for y in (k, v))
            return (torch.softmax(q @ k.transpose(2, 3) / DIM**0.5, -1) @ v).transpose(1, 2).flatten(2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.attention(x))
        scores = self.router(x).softmax(-1)
        top, chosen = scores.topk(2)
        gates = torch.zeros_like(scores).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        return x + torch.einsum("bsd,edf,bse->bsf", x, self.experts, gates)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def model_of(scenario: Scenario, backend: Any) -> nn.Module:
    """The same weights whatever the way they are sharded."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    way, model, ranks = scenario.way, Model().double(), distributed.get_world_size()
    if way == "whole":
        model.compile(backend=backend)
        return model
    if "tp" in way:
        mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "tp"))
        for layer in model.layers:
            layer.by_hand = way == "tp, no part taken out"
            plan: dict[str, Any] = {name: ColwiseParallel(use_local_output=not layer.by_hand) for name in "qkv"}
            parallelize_module(layer, mesh["tp"], plan | {"o": RowwiseParallel()})
        data = mesh["dp"]
    else:
        names = ("replicas", "shards") if way == "fsdp, replicated" else ("shards",)
        data = init_device_mesh("cpu", (ranks, 1)[: len(names)], mesh_dim_names=names)
    as_a_whole = "fsdp" not in way or way == "fsdp, compiled as a whole"
    for layer in model.layers if "fsdp" in way else ():
        if not as_a_whole:
            layer.compile(backend=backend)
        fully_shard(layer, mesh=data, **scenario.options)
    if "fsdp" in way and way != "fsdp, no root":
        fully_shard(model, mesh=data, **scenario.options)
    if as_a_whole:
        model.compile(backend=backend)
    return model


def train(model: nn.Module, scenario: Scenario, after: Callable[[int], None] = lambda steps: None) -> list[str]:
    """The bits of every loss and of this rank's parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    bits = []
    for step in range(STEPS):
        torch.manual_seed(100 * step + (0 if scenario.alike else distributed.get_rank()))
        loss = model(torch.randn(2, 6, D, dtype=torch.float64)).square().mean()
        loss.backward()
        for parameter in model.parameters() if scenario.way == "whole" and not scenario.alike else ():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        bits.append(float(loss.detach()).hex())
        after(step + 1)
    own = [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in model.parameters()]
    return [*bits, *(f"{zlib.crc32(p.numpy().tobytes()):x}" for p in own)]


def watched(scenario: Scenario) -> dict[str, Any]:
    def new() -> Watch:
        return Watch(
            every=EVERY,
            inner=scenario.inner,
            windows=WINDOWS,
            monitors=scenario.monitors,
            detectors=[],
            strict=True,
            merge=False,
        )

    watches = [new()]

    def backend(module: Any, inputs: Any) -> Any:
        return watches[-1].backend(module, inputs)

    def after(steps: int) -> None:
        if scenario.resumed and steps == RESUMED:
            state = watches[-1].state_dict()
            watches[-1].close()
            watches.append(new())
            watches[-1].load_state_dict(state)
            torch._dynamo.reset()

    model = model_of(scenario, backend)
    if scenario.way == "fsdp, no root":
        watches[0].bind(model)
    bits = train(model, scenario, after)
    for watch in watches:
        watch.close()
    first, *later = [known(watch) for watch in watches]
    for found in later:
        for metric, site in [(metric, site) for metric, sites in first["series"].items() for site in sites]:
            after_it = found["series"].setdefault(metric, {}).get(site, [[], []])
            joined = zip(first["series"][metric][site], after_it, strict=True)
            found["series"][metric][site] = [one + other for one, other in joined]
    return [first, *later][-1] | {"bits": bits}


def known(watch: Watch) -> dict[str, Any]:
    store, coverage = watch.collector.store, watch.coverage
    metrics = [metric for metric in watch.metrics() if metric.startswith(("attention/d", "router/", "law/", "optim/u"))]
    return {
        "sites": {status.site.id: _site(status) for status in coverage},
        "series": {m: {s: [x.tolist() for x in watch.series(m, s)] for s in store.sites_of(m)} for m in metrics},
        "unmatched": coverage.unmatched,
        "warnings": coverage.warnings,
    }


def _site(status: Any) -> dict[str, Any]:
    site = status.site
    views = [view for view in (site.q_weight, site.k_weight, site.weight) if view is not None]
    return {
        "model": site.model,
        "heads": (site.heads, site.kv_heads),
        "names": [name for view in views for name in view.names],
        "facts": {name: value for name, value in site.facts.items() if name.endswith(("_offset", "_of"))},
        "holding": [law for law, reason in status.laws.items() if not reason],
        "sampled": status.sampled,
        "notes": status.notes,
    }


def main(out: Path, job: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {}
    for name, scenario in JOBS[job].items():
        found[name] = watched(scenario)
        if scenario.plain:
            found[name]["plain"] = train(model_of(scenario, _torch.lookup_backend(scenario.inner)), scenario)
    (out / f"rank{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
