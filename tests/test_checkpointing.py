"""Activation checkpointing around a compiled block runs it again in the backward: same numbers, nothing counted twice."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from foreshock import Watch


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def _step(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _train(backend: object, in_backward: bool) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(2))
    compiled = [torch.compile(block, backend=backend) for block in blocks]
    if in_backward:
        for parameter in blocks.parameters():
            optimizer = torch.optim.SGD([parameter], lr=1e-3)
            parameter.register_post_accumulate_grad_hook(functools.partial(_step, optimizer))
    else:
        optimizer = torch.optim.SGD(blocks.parameters(), lr=1e-3)
    for _ in range(4):
        x = torch.randn(2, 5, 16)
        for block in compiled:
            x = checkpoint(block, x, use_reentrant=False)
        x.square().sum().backward()
        if not in_backward:
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in blocks.named_parameters()}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["optimizer", "optimizer-in-backward"])
def test_checkpointed_blocks_train_as_without_and_count_once(one_thread, inner: str, in_backward: bool) -> None:
    plain = _train(inner, in_backward)
    with Watch(every=2, inner=inner, strict=True) as watch:
        watched = _train(watch.backend, in_backward)
    assert all(torch.equal(watched[name], plain[name]) for name in plain)
    assert [status.evaluations for status in watch.coverage] == [4, 4]
    assert [status.sampled for status in watch.coverage] == [2, 2]
    for site in watch.sites:
        steps, residuals = watch.series("law/key_shift", site.id)
        assert steps.tolist() == [0, 2]
        assert residuals.max() < 1e-5
