"""FSDP2 with foreshock, on two CPU processes; the model and the loop know nothing of it.

torchrun --standalone --nproc-per-node 2 examples/fsdp.py
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import scaled_dot_product_attention

import foreshock


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (linear(x).unflatten(-1, (4, 8)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


def count(watch: foreshock.Watch, metric: str, site: str) -> int:
    """Readings of this rank; the spectra of a site are one rank's."""
    try:
        return len(watch.series(metric, site)[0])
    except foreshock.ConfigError:
        return 0


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)))
    with foreshock.Watch(every=2, windows=(2, 4), inner="aot_eager", merge=False) as watch:
        mesh = init_device_mesh("cpu", (ranks,))
        for block in model:
            block.compile(backend=watch.backend)  # one graph for all blocks
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(rank)
        for _ in range(10):
            model(torch.randn(2, 16, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for turn in range(ranks):
        distributed.barrier()
        for status in watch.coverage if turn == rank else ():
            site = status.site
            entropies, spectra = (count(watch, f"attention/{name}", site.id) for name in ("entropy", "delta2_norm"))
            print(
                f"rank {rank}: {site.id} ({site.q_weight.names[0]}): {entropies} entropies, {spectra} spectra",
                flush=True,
            )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
