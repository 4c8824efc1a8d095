"""The norm of gradients that ranks have whole, or parts of: as any rank of a job that is not there (torch's fake process group)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from foreshock.gradients import Gradients, copies, squares

RANKS = 4
Layout = tuple[
    Sequence[str], Sequence[Placement]
]  # the dimensions of the mesh (dp, tp), and how a gradient lies on each


def part(whole: Tensor, at: Sequence[int], placements: Sequence[Placement]) -> Tensor:
    for rank, placement in zip(at, placements, strict=True):
        if isinstance(placement, Shard):
            whole = whole.chunk(2, placement.dim)[rank]
    return whole


def told(rank: int, layouts: Sequence[Layout], whole: Sequence[Tensor]) -> float:
    """What ``rank`` of four adds to the square of the norm."""
    distributed.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    try:
        mesh, at = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), {"dp": rank // 2, "tp": rank % 2}
        gradients = []
        for x, (names, placements) in zip(whole, layouts, strict=True):
            own = mesh if len(names) == 2 else mesh[names[0]]
            local = part(x, [at[name] for name in names], placements)
            gradients.append(DTensor.from_local(local, own, placements, run_check=False))
        return float(sum(squares(gradients)))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    "layouts",
    [
        [(("dp", "tp"), (Shard(0), Shard(1))), (("dp", "tp"), (Shard(0), Replicate()))],
        [(("dp", "tp"), (Replicate(), Shard(0))), (("dp", "tp"), (Replicate(), Replicate()))],
        [(("dp", "tp"), (Shard(0), Shard(0))), (("dp",), (Shard(0),))],  # FSDP2 with TP, and what is not TP
        [(("dp", "tp"), (Shard(0), Shard(1))), (("tp",), (Shard(0),))],
    ],
)
def test_each_element_counts_once_however_it_lies(layouts: list[Layout]) -> None:
    whole = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(len(layouts))]
    total = sum(told(rank, layouts, whole) for rank in range(RANKS))
    assert total == pytest.approx(float(sum(x.square().sum() for x in whole)), rel=1e-6)


def of(seed: int, *shapes: Sequence[int]) -> tuple[Gradients, list[nn.Parameter]]:
    """Gradients, made from ``seed``, of parameters that begin alike."""
    found, generator = Gradients(), torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    found.read(0, torch.optim.SGD(parameters, lr=0.1))
    return found, parameters


def test_copies_are_told_by_entries_of_weights_and_gradients() -> None:
    made = [of(seed, (3, 4), (7,)) for seed in (0, 0, 1)]
    same, again, other = (gradients.prints() for gradients, _ in made)
    assert same == again
    assert not set(same) & set(other)
    everything = [(same, [0, 1]), (other, [2])]
    assert copies(everything, 1).tolist() == [2, 2]
    assert copies(everything, 2).tolist() == [1, 1]
    split = [(same[:1], [0]), (same, [1, 2, 3])]
    assert [copies(split, rank).tolist() for rank in (0, 1)] == [[4], [4, 3]]


def test_one_process_reads_the_norm_itself() -> None:
    found, parameters = of(0, (3, 4), (7,))
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    readings = {r.metric: r.values for r in found.readings(0, None)}
    assert readings["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-6)
