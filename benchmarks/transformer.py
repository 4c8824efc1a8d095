"""Decoders in plain PyTorch, dense and with experts, as a training script would write them; no package beyond torch.

Shape suffixes: B batch, S positions, D width, H heads, T tokens, E experts, K chosen experts, C an expert's places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Size:
    """``experts=0`` is dense; ``hidden`` is the width of one (expert's) feed-forward layer."""

    width: int
    layers: int
    heads: int
    hidden: int
    experts: int = 0
    chosen: int = 2
    vocabulary: int = 256


class Kernel(nn.Module):
    """The attention kernel as a module of its own, so that hooks can stand around it."""

    def forward(self, q_BHSh: Tensor, k_BHSh: Tensor, v_BHSh: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q_BHSh, k_BHSh, v_BHSh, is_causal=True)


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.query, self.key, self.value, self.out = (nn.Linear(size.width, size.width, bias=False) for _ in range(4))
        self.kernel = Kernel()

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (
            layer(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y_BSD: Tensor = self.out(self.kernel(q, k, v).transpose(1, 2).flatten(2))
        return y_BSD


class FeedForward(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size.width, size.hidden), nn.Linear(size.hidden, size.width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD: Tensor = self.down(functional.gelu(self.up(x_BSD)))
        return y_BSD


class Router(nn.Module):
    """Top-k of a softmax: ``(logits, scores)`` ``[T, E]`` and ``(gates, indices)`` ``[T, K]``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate, self.chosen = nn.Linear(size.width, size.experts, bias=False), size.chosen

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        gates_TK, indices_TK = scores_TE.topk(self.chosen, dim=-1)
        return logits_TE, scores_TE, gates_TK, indices_TK


class Experts(nn.Module):
    """Each expert has places for a quarter more than its share of tokens; what finds none passes by."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.experts, self.chosen = size.experts, size.chosen
        self.router = Router(size)
        self.up = nn.Parameter(torch.randn(size.experts, size.width, size.hidden) / size.width**0.5)
        self.down = nn.Parameter(torch.randn(size.experts, size.hidden, size.width) / size.hidden**0.5)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        places = math.ceil(1.25 * self.chosen * x_TD.shape[0] / self.experts)
        _, _, gates_TK, indices_TK = self.router(x_TD)
        given_NE = functional.one_hot(indices_TK.flatten(), self.experts)  # N = T K, in the order of tokens
        place_N = (given_NE.cumsum(0) * given_NE).sum(-1) - 1
        fits_N = place_N < places
        at_N = torch.where(fits_N, indices_TK.flatten() * places + place_N, self.experts * places)
        x_ND = x_TD.repeat_interleave(self.chosen, 0)
        seats = torch.zeros(self.experts * places + 1, x_TD.shape[1], dtype=x_ND.dtype, device=x_ND.device)
        seats_ECD = seats.index_copy(0, at_N, x_ND)[:-1].unflatten(0, (self.experts, places))
        y_ECD = functional.gelu(seats_ECD @ self.up) @ self.down
        y_ND = functional.pad(y_ECD.flatten(0, 1), (0, 0, 0, 1))[at_N]
        gated_ND = y_ND * (gates_TK.flatten() * fits_N).unsqueeze(-1).to(y_ND.dtype)
        return gated_ND.unflatten(0, (-1, self.chosen)).sum(1).view_as(x_BSD)


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(size.width), Attention(size)
        self.between, self.feed = nn.LayerNorm(size.width), Experts(size) if size.experts else FeedForward(size)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.before(x_BSD))
        y_BSD: Tensor = x_BSD + self.feed(self.between(x_BSD))
        return y_BSD


class Decoder(nn.Module):
    """``forward(tokens [B, S])`` is the loss of predicting each token from those before it."""

    def __init__(self, size: Size, length: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(size.vocabulary, size.width), nn.Embedding(length, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.last, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSD = self.embed(tokens_BS) + self.position.weight[: tokens_BS.shape[1]]
        for block in self.blocks:
            x_BSD = block(x_BSD)
        logits = self.head(self.last(x_BSD))[:, :-1].float()
        return functional.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())
