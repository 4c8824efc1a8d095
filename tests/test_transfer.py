"""How numbers come to the host: as they are on CPU, without a wait on CUDA."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from foreshock import Watch
from foreshock.transfer import Transfer


def test_on_cpu_nothing_is_copied_until_it_is_read() -> None:
    transfer, vector = Transfer(torch.device("cpu")), torch.arange(3.0, requires_grad=True)
    read = transfer.start(vector)
    assert transfer.copies == 1
    assert transfer.to_device(vector) is vector
    assert read().tolist() == [0.0, 1.0, 2.0]
    assert read().dtype == "float64"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in self.qkv(x_BSD).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)).square().mean()


@pytest.fixture
def no_syncs() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("no_syncs")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_sampled_step_waits_for_nothing(mode: str) -> None:
    """Forward and backward of sampled steps raise where they would wait for the device; what they leave is right all the same."""
    torch.manual_seed(0)
    model = Small().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = torch.randn(8, 4, 32, 64, device="cuda")
    watch = Watch(every=1, strict=True, detectors=[], monitors=["laws", "attention", "router"])
    compiled = torch.compile(model, backend=watch.backend, mode=mode)
    wanted = []
    for step, batch in enumerate(batches):
        with torch.no_grad():
            wanted.append(
                model.qkv(batch)[..., :64].unflatten(-1, (4, 16)).square().mean((0, 1, 3)).sqrt().cpu().numpy()
            )
        if step == 4:  # graphs are compiled and recorded by now
            torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step >= 4 else "default")
        loss = compiled(batch)
        loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        optimizer.step()
        optimizer.zero_grad()
    steps, values = watch.series("attention/q_rms")
    assert steps.tolist() == list(range(8))
    np.testing.assert_allclose(values, wanted, rtol=1e-3)  # each step's own: none was written over by a replay
    assert watch.series("law/key_shift")[0].tolist() == list(range(8))
    watch.close()
