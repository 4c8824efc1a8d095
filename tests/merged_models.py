"""What tests/merged.py trains, and what is watched beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock.demo import kernel
from foreshock.records import Reading

D, HEADS, EXPERTS = 32, 4, 4
DYING = 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, D // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Flash(Attention):
    """With the demo's kernel, which can be broken."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).bfloat16() for f in (self.q, self.k, self.v))
        y, _ = kernel.attention(q, k, v, True, (D // HEADS) ** -0.5)
        return x + self.out(y.to(x.dtype).transpose(1, 2).flatten(2))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, EXPERTS, bias=False), nn.Parameter(torch.randn(EXPERTS, D, D) / D**0.5)

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.einsum("bsd,edf->bsef", x, self.up).relu()
        y = y.gather(2, chosen[..., None].expand(*chosen.shape, D))
        return x + (y * gates[..., None]).sum(2)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Resizing:
    """A monitor whose reading gets another size in mid-run."""

    def update(self, step: int, sites: Any) -> list[Reading]:
        return [Reading("own/thing", None, np.ones(2 if step < DYING else 3))]


def refuse(*args: Any, **options: Any) -> None:
    raise ValueError("no words")


def failing_once(weigh: Callable[[int], None]) -> Callable[[int], None]:
    def weighed(step: int) -> None:
        if step == DYING:
            raise ValueError("too heavy")
        weigh(step)

    return weighed


class Heard:
    """A sink that keeps the steps of which it heard."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def readings(self, step: int, readings: Any) -> None:
        self.steps.append(step)

    def alarm(self, alarm: Any) -> None: ...

    def close(self) -> None: ...
