"""A small model with an attention and a router, and a training loop that tells all about itself: what chaos is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS = 6


class Layer(nn.Module):
    """Causal attention of two heads, then two of four experts."""

    def __init__(self, width: int = 8, experts: int = 4) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.Parameter(torch.randn(experts, width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        spread = torch.zeros_like(self.gate(x)).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
        return x + torch.einsum("bse,bsd,edf->bsf", spread, x, self.experts)


class Loop:
    """One training. ``between(loop, step)`` is called before each step and may change anything that a user could."""

    def __init__(self, backend: Any, model: nn.Module | None = None) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = Layer() if model is None else model
        self.backend = backend
        self.compiled: Any = torch.compile(self.model, backend=backend)
        self.optimizer: Any = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.generator = torch.Generator().manual_seed(1)
        self.length, self.dtype = 5, torch.float32
        self.losses: list[Tensor] = []

    def batch(self) -> Tensor:
        return torch.randn(2, self.length, 8, generator=self.generator).to(self.dtype)

    def step(self, x: Tensor) -> Tensor:
        loss: Tensor = self.compiled(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def run(self, between: Callable[[Loop, int], None] = lambda loop, step: None, steps: int = STEPS) -> list[Tensor]:
        """Losses and, behind them, the parameters."""
        for step in range(steps):
            between(self, step)
            self.losses.append(self.step(self.batch()))
        return [*self.losses, *(p.detach().clone() for p in self.model.parameters())]


def identical(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit by bit, so that NaN is NaN."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        if a.dim()
        else a.dtype == b.dtype and torch.equal(a[None].view(torch.uint8), b[None].view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )
