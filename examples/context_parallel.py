"""Context parallelism with foreshock, on two CPU processes: each has some of the positions, and around attention all of some heads.

torchrun --standalone --nproc-per-node 2 examples/context_parallel.py
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn.functional import scaled_dot_product_attention

import foreshock

WIDTH, HEADS, POSITIONS, STEPS = 32, 4, 32, 10


def swap(x: torch.Tensor) -> torch.Tensor:
    """Block i of the first axis goes to rank i."""
    return all_to_all_single_autograd(x.contiguous(), None, None, distributed.group.WORLD)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ranks = distributed.get_world_size()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, S / ranks, H, h]`` -> ``[B, H / ranks, S, h]``."""
        return swap(x.unflatten(2, (self.ranks, -1)).movedim(2, 0)).permute(1, 3, 0, 2, 4).flatten(2, 3)

    def to_positions(self, y: torch.Tensor) -> torch.Tensor:
        """Back."""
        return swap(y.unflatten(2, (self.ranks, -1)).permute(2, 0, 3, 1, 4)).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.to_heads(linear(x).unflatten(-1, (HEADS, -1))) for linear in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(self.to_positions(y).flatten(2))


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    with foreshock.Watch(every=2, windows=(2, 4), inner="aot_eager") as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)  # one batch for all
        for _ in range(STEPS):
            x = torch.randn(2, POSITIONS, WIDTH).chunk(ranks, 1)[rank]
            compiled(x).square().mean().backward()
            for parameter in model.parameters():
                distributed.all_reduce(parameter.grad)
                parameter.grad /= ranks
            optimizer.step()
            optimizer.zero_grad()
    for turn in range(ranks):
        distributed.barrier()
        for site in watch.sites if turn == rank else ():
            first, of = site.facts["head_offset"], site.facts["heads_of"]
            norms = watch.series("attention/delta2_norm", site.id)[1]
            own = f"heads {first} to {first + site.heads - 1} of {of} were here"
            print(f"rank {rank}: {site.id}: {own}, {norms.shape} norms of all", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
