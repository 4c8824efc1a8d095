"""DistributedDataParallel: Dynamo splits the graph by buckets and rehearses each part on fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from foreshock import Watch

D, LAYERS = 256, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (linear(x).unflatten(-1, (4, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_every_layer_is_one_site_whatever_the_buckets(one_thread, one_process, inner: str) -> None:
    results = []
    for watched in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Stack()
        parallel = DistributedDataParallel(model, bucket_cap_mb=1.1)
        parts: list[int] = []
        with Watch(every=1, inner=inner, strict=True, detectors=[]) as watch:

            def backend(module, inputs, watch=watch, parts=parts, watched=watched):
                parts.append(len(inputs))
                return watch.backend(module, inputs) if watched else torch._dynamo.lookup_backend(inner)(module, inputs)

            compiled = torch.compile(parallel, backend=backend)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                loss = compiled(torch.randn(2, 6, D)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert len(parts) > 1
        results.append([loss.detach(), *(p.detach() for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    coverage = watch.coverage
    assert [(status.evaluations, status.sampled, status.notes) for status in coverage] == [(2, 2, ())] * LAYERS
    assert [status.site.q_weight.names for status in coverage] == [(f"layers.{i}.q.weight",) for i in range(LAYERS)]
    assert coverage.unmatched == coverage.warnings == ()
