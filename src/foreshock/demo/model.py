"""A decoder-only, byte-level transformer, with a mixture of experts or a dense feed-forward.

RMSNorm, rotary positions, grouped-query attention through a third-party kernel, and a top-2 router over experts that
are all computed (no shape depends on the data, so the whole model compiles into one graph).

Shapes: B batch, S sequence, D hidden, H query heads, G key/value heads, h head dim, T = B*S tokens, E experts,
F expert width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # everybody's name for it
from torch import Tensor, nn

from foreshock.demo import kernel


@dataclass(frozen=True)
class Config:
    vocabulary: int = 256
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    length: int = 64
    experts: int = 8  # none: one dense feed-forward
    top_k: int = 2
    width: int = 32  # of each expert, or of the feed-forward
    sdpa: bool = False


class Rotary(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, length: int, head_dim: int) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(length), 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, x_BHSh: Tensor) -> Tensor:
        first, second = x_BHSh.chunk(2, -1)
        return x_BHSh * self.cos + torch.cat((-second, first), -1) * self.sin


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.hidden // config.heads
        self.sdpa = config.sdpa
        self.q_proj = nn.Linear(config.hidden, config.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * self.head_dim, config.hidden, bias=False)
        self.q_rotary, self.k_rotary = (Rotary(config.length, self.head_dim) for _ in range(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (
            proj(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = self.q_rotary(q).bfloat16(), self.k_rotary(k).bfloat16(), v.bfloat16()
        if self.sdpa:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out, _ = kernel.attention(q, k, v, True, self.head_dim**-0.5)
        return self.o_proj(out.transpose(1, 2).flatten(2).float())  # type: ignore[no-any-return]  # nn.Module.__call__


class Experts(nn.Module):
    """Top-k of E gated experts; returns the output and the load-balancing loss of Switch (arXiv 2101.03961, eq. 4)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Linear(config.hidden, config.experts, bias=False)
        shape = (config.experts, config.hidden, config.width)
        self.gate = nn.Parameter(torch.randn(shape) * config.hidden**-0.5)
        self.up = nn.Parameter(torch.randn(shape) * config.hidden**-0.5)
        self.down = nn.Parameter(torch.randn(shape).mT.contiguous() * config.width**-0.5)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = x_BSD.flatten(0, 1)
        scores_TE = self.router(x_TD).softmax(-1)
        top_TK, chosen_TK = scores_TE.topk(self.top_k)
        weights_TK = top_TK / top_TK.sum(-1, keepdim=True)
        gates_TE = torch.zeros_like(scores_TE).scatter(-1, chosen_TK, weights_TK)
        hidden_ETF = F.silu(x_TD @ self.gate) * (x_TD @ self.up)
        out_TD = ((hidden_ETF * gates_TE.T.unsqueeze(-1)) @ self.down).sum(0)
        load_E = torch.zeros_like(scores_TE).scatter(-1, chosen_TK, 1.0).mean(0) / self.top_k
        return out_TD.view_as(x_BSD), len(load_E) * (load_E * scores_TE.mean(0)).sum()


class FeedForward(nn.Module):
    """A dense feed-forward in the experts' place; it has nothing to balance."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.width, bias=False)
        self.up = nn.Linear(config.hidden, config.width, bias=False)
        self.down = nn.Linear(config.width, config.hidden, bias=False)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(F.silu(self.gate(x_BSD)) * self.up(x_BSD)), x_BSD.new_zeros(())


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.experts_norm = nn.RMSNorm(config.hidden)
        self.experts = Experts(config) if config.experts else FeedForward(config)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        out_BSD, balance = self.experts(self.experts_norm(x_BSD))
        return x_BSD + out_BSD, balance


class Transformer(nn.Module):
    """``tokens`` int64 [B, S + 1] -> (cross-entropy in nats, mean load-balancing loss)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x_BSD = self.embedding(tokens[:, :-1])
        balances = []
        for layer in self.layers:
            x_BSD, balance = layer(x_BSD)
            balances.append(balance)
        logits = self.head(self.norm(x_BSD))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, torch.stack(balances).mean()
