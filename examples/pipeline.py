"""Pipeline parallelism with foreshock, on two CPU processes: each has half of the layers, under the names of the whole model.

torchrun --standalone --nproc-per-node 2 examples/pipeline.py
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import mse_loss, scaled_dot_product_attention

import foreshock

LAYERS, STEPS, MICROBATCHES = 4, 10, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (linear(x).unflatten(-1, (4, 8)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Block() for i in range(LAYERS)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = Model()
    for i in range(LAYERS):  # what is left keeps its name: layers.2 is layers.2 on the rank that has it
        if i * ranks // LAYERS != rank:
            del model.layers[str(i)]
    with foreshock.Watch(every=2, windows=(2, 4), inner="aot_eager") as watch:
        model.compile(backend=watch.backend)
        schedule = Schedule1F1B(PipelineStage(model, rank, ranks, torch.device("cpu")), MICROBATCHES, loss_fn=mse_loss)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        for _ in range(STEPS):
            x, target = torch.randn(2, 8, 16, 32)
            losses: list[torch.Tensor] = []
            if rank == 0:
                schedule.step(x)
            else:
                schedule.step(target=target, losses=losses)
                watch.log(loss=torch.stack(losses).mean())
            optimizer.step()
            optimizer.zero_grad()
    if rank == 0:  # which knows what all stages measured
        for status in watch.coverage:
            norms = watch.series("attention/delta2_norm", status.site.id)[1]
            print(f"{status.site.id}: {norms.shape} norms {' '.join(status.notes)}".rstrip(), flush=True)
        print(f"{len(watch.series('run/loss')[0])} losses", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
