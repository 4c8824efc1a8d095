"""A byte-level language model small enough for a test, whose attention kernel rounds the way it is told.

The attention is flash-shaped: P is recomputed in the backward from the logsumexp, and D = rowsum(dO * stored O), so a
biased rounding of the stored O reaches dK exactly as arXiv 2510.04212 describes.

Shapes: B batch, H heads, S sequence, D head dim, M model width.
"""

from __future__ import annotations

import inspect
import math
import unittest

import torch
from torch import Tensor, nn
from torch.nn import functional

MODES = ("nearest", "stochastic", "away", "truncate")


def round_to(x: Tensor, bits: int, mode: str) -> Tensor:
    """``x`` kept to ``bits`` explicit mantissa bits (7 is bfloat16's own), rounded as ``mode`` says."""
    mantissa, exponent = torch.frexp(x)
    scaled = mantissa * 2 ** (bits + 1)
    if mode == "nearest":
        scaled = torch.round(scaled)
    elif mode == "stochastic":
        scaled = torch.floor(scaled + torch.rand_like(scaled))
    elif mode == "away":
        scaled = torch.sign(scaled) * torch.ceil(scaled.abs())
    else:
        scaled = torch.trunc(scaled)
    return torch.ldexp(scaled / 2 ** (bits + 1), exponent)


class FlashAttention(torch.autograd.Function):
    """Causal attention with P and O rounded; the backward trusts the stored O."""

    @staticmethod
    def forward(ctx, q_BHSD, k_BHSD, v_BHSD, bits: int, mode: str, p_bits: int, p_mode: str):
        logits = q_BHSD @ k_BHSD.mT / math.sqrt(q_BHSD.shape[-1])
        seq = logits.shape[-1]
        logits = logits.masked_fill(torch.ones(seq, seq, dtype=torch.bool).triu(1), -torch.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        p = round_to((logits - lse).exp(), p_bits, p_mode)
        out = round_to(p @ v_BHSD, bits, mode)
        ctx.save_for_backward(q_BHSD, k_BHSD, v_BHSD, out, logits, lse)
        ctx.p_rounding = p_bits, p_mode
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, logits, lse = ctx.saved_tensors
        p = round_to((logits - lse).exp(), *ctx.p_rounding)
        delta = (d_out * out).sum(-1, keepdim=True)
        ds = p * (d_out @ v.mT - delta) / math.sqrt(q.shape[-1])
        return ds @ k, ds.mT @ q, p.mT @ d_out, None, None, None, None


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.rounding: tuple[int, str, int, str] = (7, "nearest", 7, "nearest")
        self.boundary: dict[str, Tensor] = {}

    def forward(self, x_BSM: Tensor) -> Tensor:
        normed = self.norm_1(x_BSM)
        q, k, v = (p(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out = FlashAttention.apply(q, k, v, *self.rounding)
        self.boundary = {"q": q, "k": k, "v": v, "out": out}
        for tensor in self.boundary.values():
            if tensor.requires_grad:
                tensor.retain_grad()
        x_BSM = x_BSM + self.o(out.transpose(1, 2).flatten(2))
        return x_BSM + self.mlp(self.norm_2(x_BSM))

    def bias_sums(self) -> tuple[Tensor, Tensor]:
        """``law/bias_num`` and ``law/bias_den`` of the last backward, per head: c_hat = num / den."""
        q, out = self.boundary["q"].detach(), self.boundary["out"].detach()
        delta = (self.boundary["out"].grad * out).sum(-1, keepdim=True)
        u_HD = (delta * q).sum((0, 2)) / math.sqrt(q.shape[-1])
        shift_HD = self.boundary["k"].grad.sum((0, 2))
        return -(shift_HD * u_HD).sum(-1), u_HD.square().sum(-1)

    def key_shift(self) -> Tensor:
        """``law/key_shift`` of the last backward, per head."""
        dk = self.boundary["k"].grad
        return dk.sum((0, 2)).norm(dim=-1) / dk.square().sum((0, 2, 3)).sqrt()


class SmallLM(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2, seq: int = 64) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(seq, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x = self.embed(tokens_BS) + self.position.weight[: tokens_BS.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def corpus() -> Tensor:
    """Real text that every Python has at hand: the standard library's own sources, as bytes."""
    modules = (inspect, unittest.case, unittest.mock) if hasattr(unittest, "mock") else (inspect, unittest.case)
    text = "".join(inspect.getsource(module) for module in modules).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(model: nn.Module, steps: int, text: Tensor, generator: torch.Generator, after=lambda step: None) -> None:
    """AdamW as in a small run: lr 2e-3, betas (0.9, 0.95), clip 1, warm-up over 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        starts = torch.randint(0, len(text) - 65, (8, 1), generator=generator)
        window = text[starts + torch.arange(65)]
        logits = model(window[:, :-1])
        optimizer.zero_grad()
        functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50)
        optimizer.step()
        after(step)
