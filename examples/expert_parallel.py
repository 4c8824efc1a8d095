"""Expert parallelism with foreshock, on two CPU processes: tokens travel to the rank that has their expert, and back.

torchrun --standalone --nproc-per-node 2 examples/expert_parallel.py
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd

import foreshock

WIDTH, EXPERTS, CHOSEN, STEPS = 32, 8, 2, 10


class Experts(nn.Module):
    """A router that every rank has, and this rank's share of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks = distributed.get_world_size()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        every = torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5
        self.weight = nn.Parameter(every.chunk(self.ranks)[distributed.get_rank()].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        gates, chosen = self.gate(tokens).softmax(-1).topk(CHOSEN, -1)
        order = chosen.flatten().argsort(stable=True)  # by expert, and so by rank
        leaving = nn.functional.one_hot(chosen.flatten(), EXPERTS).sum(0)
        coming = all_to_all_single(leaving, None, None, distributed.group.WORLD)
        sizes = [counts.view(self.ranks, -1).sum(1).tolist() for counts in (coming, leaving)]
        own = all_to_all_single_autograd(tokens[order // CHOSEN], *sizes, distributed.group.WORLD)
        expert = torch.arange(EXPERTS // self.ranks).repeat(self.ranks).repeat_interleave(coming)
        done = torch.einsum("td,tdf->tf", own, self.weight[expert]).relu()
        back = all_to_all_single_autograd(done, *reversed(sizes), distributed.group.WORLD)
        mixed = torch.zeros_like(tokens).index_add(0, order // CHOSEN, back * gates.flatten()[order, None])
        return x + mixed.view_as(x)


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Experts())
    with foreshock.Watch(every=2, inner="aot_eager").bind(model) as watch:  # counts that are waited for break the graph
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1 + rank)
        for _ in range(STEPS):
            compiled(torch.randn(4, 16, WIDTH)).square().mean().backward()
            for name, parameter in model.named_parameters():
                if (
                    not name.endswith(".weight") or "gate" in name
                ):  # an expert has the gradients of all ranks' tokens already
                    distributed.all_reduce(parameter.grad)
                parameter.grad /= ranks
            optimizer.step()
            optimizer.zero_grad()
    if rank == 0:
        for site in watch.sites:
            counts = watch.series("router/load", site.id)[1][0] * ranks * 4 * 16 * CHOSEN
            print(f"{site.id}: tokens of all ranks, by expert: {counts.round().astype(int).tolist()}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
