"""Three small boundaries as they appear in real models: what the pictures of docs/sites.md show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, softmax

BATCH, LENGTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 2, 16, 64, 8, 2, 8, 16


class Fused(nn.Module):
    """Grouped-query attention with one projection for q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


class WrittenOut(nn.Module):
    """Attention in separate ops, with a soft cap and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(BATCH, LENGTH, HEADS, HEAD_DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        logits = torch.tanh(q @ k.mT * HEAD_DIM**-0.5 / 50) * 50
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=x.device).triu(1)
        weights = softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class Router(nn.Module):
    """Sigmoid scores, a bias that moves the choice only, and the best experts of all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN) / 8)
        self.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / 8)
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = linear(tokens.float(), self.weight.float()).sigmoid()
        chosen = torch.topk(scores + self.bias, 4, dim=-1).indices
        gates = scores.gather(1, chosen)
        outputs = torch.einsum("td,tkdf->tkf", tokens, self.experts[chosen])
        return ((gates / gates.sum(-1, keepdim=True))[..., None] * outputs).sum(1).view_as(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused, self.written_out, self.router = Fused(), WrittenOut(), Router()

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.fused, self.written_out, self.router):
            x = x + part(x)
        return x


def make() -> tuple[nn.Module, tuple[Any, ...]]:
    return Model(), (torch.randn(BATCH, LENGTH, HIDDEN),)
