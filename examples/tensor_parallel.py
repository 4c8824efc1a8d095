"""Tensor parallelism with foreshock, on two CPU processes; the model and the loop know nothing of it.

torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import scaled_dot_product_attention

import foreshock


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, 8)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(2)))
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model:
        plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    with foreshock.Watch(every=2, windows=(2, 4), inner="aot_eager", merge=False) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)  # every rank has the same batch
        for _ in range(10):
            compiled(torch.randn(2, 16, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for turn in range(ranks):
        distributed.barrier()
        for site in watch.sites if turn == rank else ():
            first, of = site.facts["head_offset"], site.facts["heads_of"]
            norms = watch.series("attention/delta2_norm", site.id)[1]
            print(
                f"rank {rank}: {site.id}: heads {first} to {first + site.heads - 1} of {of}, {norms.shape} norms",
                flush=True,
            )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
