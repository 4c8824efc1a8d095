"""Two ranks, data parallel, one of which begins to compute attention wrong: ``torchrun --nproc-per-node 2 examples/ddp.py``.

The alarm comes on both ranks at the same step and names the rank; rank 0 writes the run for both.
"""

import tempfile

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from foreshock import Watch, open_run
from foreshock.demo import kernel

D, HEADS, STEPS, BROKEN = 64, 4, 20, 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2).bfloat16() for y in self.qkv(x).chunk(3, -1))
        y, _ = kernel.attention(q, k, v, True, (D // HEADS) ** -0.5)
        return x + self.out(y.float().transpose(1, 2).flatten(2))


def main(run: str) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    with Watch(run, every=1) as watch:
        compiled = torch.compile(DistributedDataParallel(model), backend=watch.backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1 + rank)
        for step in range(STEPS):
            if step == BROKEN and rank == 1:
                kernel.set_fault(kernel.Fault(diagonal=1))  # each row sees one key of the future
            loss = compiled(torch.randn(4, 32, D)).square().mean()
            watch.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"rank {rank}: {[(alarm.step, alarm.mechanism, alarm.ranks) for alarm in watch.alarms]}")
    if rank == 0:
        with open_run(run) as written:
            print(
                f"written for all ranks: {written.series('run/loss')[1].shape[0]} steps, {len(written.alarms)} alarms"
            )
    distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
