"""A block with separate projections around whatever attends, and its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

B, S, H, G, D, HIDDEN = 2, 6, 4, 2, 8, 32


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    """Separate projections; ``call(q, k, v)`` on ``[B, heads, S, h]``, ``[B, S, heads, h]`` or packed ``[B*S, heads, h]``."""

    def __init__(self, call=causal, kv_heads: int = H, layout: str = "BHSD"):
        super().__init__()
        self.q = nn.Linear(HIDDEN, H * D, bias=False)
        self.k, self.v = (nn.Linear(HIDDEN, kv_heads * D, bias=False) for _ in range(2))
        self.call, self.layout = call, layout

    def heads(self, y):
        y = y.view(*y.shape[:2], -1, D)
        return {"BHSD": y.transpose(1, 2), "BSHD": y, "packed": y.flatten(0, 1)}[self.layout]

    def forward(self, x):
        return self.call(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))


def x() -> Tensor:
    return torch.randn(B, S, HIDDEN, generator=torch.Generator().manual_seed(0))
