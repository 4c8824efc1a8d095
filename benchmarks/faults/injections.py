"""What can go wrong in a run, each as a change of the model's behaviour: the kernel, the rates, the weights, the loop, the data.

Nothing here touches foreshock, and nothing changes a graph: tensors are edited in place, between two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foreshock.demo import kernel
from foreshock.demo.model import Rotary
from foreshock.demo.rounding import Flip

if TYPE_CHECKING:
    from training import Trainer

Rate = Callable[[int], float]
Edit = Callable[["Trainer", int], None]
Batch = Callable[["Trainer", Tensor, int], tuple[Tensor, ...]]


def steady(since: int) -> float:
    """A factor of one."""
    return 1.0


@dataclass(frozen=True)
class Jump:
    """A factor that holds from the first step on."""

    factor: float

    def __call__(self, since: int) -> float:
        return self.factor


@dataclass(frozen=True)
class Injection:
    """What changes from the fault's first step on; ``since`` counts from it.

    ``rates`` and ``decays`` are factors on learning rate and weight decay of the optimizer's three groups: the others, the
    routers, queries and keys. ``schedule`` replaces the warm-up and what follows it. ``kernel_steps``: how long the kernel is
    wrong, if not to the end. ``batch`` makes the microbatches of a step out of its batch. ``before`` runs ahead of the forward
    pass, ``after`` behind the optimizer's step.
    """

    kernel: kernel.Fault = kernel.HEALTHY
    kernel_steps: int | None = None
    rates: tuple[Rate, Rate, Rate] = (steady, steady, steady)
    decays: tuple[float, float, float] = (1.0, 1.0, 1.0)
    schedule: Rate | None = None
    balance: float = 1.0
    loss_scale: float = 1.0
    clip: float = 1.0
    batch: Batch | None = None
    before: Edit | None = None
    after: Edit | None = None


NOTHING = Injection()


# -- weights and optimizer state -------------------------------------------------------------------------------------


def query(trainer: Trainer, layer: int = 0) -> torch.nn.Parameter:
    """The query projection's weight of a layer, [H * h, D]."""
    weight: torch.nn.Parameter = trainer.network.get_parameter(f"layers.{layer}.attention.q_proj.weight")
    return weight


def flip_weight(bit: int) -> Edit:
    """One bit of one entry of layer 0's query weight, once."""

    @torch.no_grad()
    def edit(trainer: Trainer, since: int) -> None:
        if since == 0:
            query(trainer).copy_(Flip(bit)(query(trainer)))

    return edit


def flip_momentum(bit: int) -> Edit:
    """One bit of one entry of the first moment of layer 0's query weight, once."""

    def edit(trainer: Trainer, since: int) -> None:
        if since == 0:
            momentum = trainer.optimizer.state[query(trainer)]["exp_avg"]
            momentum.copy_(Flip(bit)(momentum))

    return edit


@torch.no_grad()
def stale_head(trainer: Trainer, since: int) -> None:
    """Layer 0's first query head is put back after each step; called before the first one, to know to what."""
    rows = query(trainer)[: trainer.config.hidden // trainer.config.heads]
    rows.copy_(trainer.kept.setdefault("head", rows.clone()))


@torch.no_grad()
def frozen_layer(trainer: Trainer, since: int) -> None:
    """No weight of the last layer moves any more; called before the first step as well."""
    weights = list(trainer.network.layers[-1].parameters())
    for weight, kept in zip(weights, trainer.kept.setdefault("layer", [w.clone() for w in weights]), strict=True):
        weight.copy_(kept)


# -- routers and experts ---------------------------------------------------------------------------------------------


@torch.no_grad()
def starve_expert(trainer: Trainer, since: int) -> None:
    """Layer 0's first expert gets the router row that comes nearest to a logit of -30 for every token: none will choose it."""
    if since == 0:
        tokens = next(trainer.corpus.batches(trainer.seed, 32, trainer.config.length))
        block = trainer.network.layers[0]
        x_BSD = trainer.network.embedding(tokens)
        x_TD = block.experts_norm(x_BSD + block.attention(block.attention_norm(x_BSD))).flatten(0, 1)
        row_D1 = torch.linalg.lstsq(x_TD, torch.full((len(x_TD), 1), -30.0)).solution
        block.experts.router.weight[0] = row_D1[:, 0]


@torch.no_grad()
def silence_expert(trainer: Trainer, since: int) -> None:
    """Layer 0's first expert returns zeros."""
    trainer.network.layers[0].experts.down[0] = 0.0


# -- the training loop -----------------------------------------------------------------------------------------------


def half(trainer: Trainer, tokens: Tensor, since: int) -> tuple[Tensor, ...]:
    """Half the batch, written twice: the gradient of half a batch in a batch of the same shape."""
    kept = tokens[: len(tokens) // 2]
    return (torch.cat((kept, kept)),)


def double(trainer: Trainer, tokens: Tensor, since: int) -> tuple[Tensor, ...]:
    """Two microbatches of the usual size."""
    return tokens, trainer.draw()


@torch.no_grad()
def shift_queries(trainer: Trainer, since: int) -> None:
    """The rotary tables of the queries begin at position 1, those of the keys at 0."""
    if since == 0:
        shifted = Rotary(trainer.config.length + 1, trainer.config.hidden // trainer.config.heads)
        for block in trainer.network.layers:
            block.attention.q_rotary.cos.copy_(shifted.cos[1:])
            block.attention.q_rotary.sin.copy_(shifted.sin[1:])


# -- the data --------------------------------------------------------------------------------------------------------


def garbage(share: float) -> Batch:
    """So many of the bytes are replaced by random ones."""

    def batch(trainer: Trainer, tokens: Tensor, since: int) -> tuple[Tensor, ...]:
        generator = trainer.generator()
        noise = torch.randint(256, tokens.shape, generator=generator)
        return (torch.where(torch.rand(tokens.shape, generator=generator) < share, noise, tokens),)

    return batch


def repeated(count: int) -> Batch:
    """The first so many batches over and over."""

    def batch(trainer: Trainer, tokens: Tensor, since: int) -> tuple[Tensor, ...]:
        kept = trainer.kept.setdefault("batches", [])
        if len(kept) < count:
            kept.append(tokens)
        return (kept[since % count],)

    return batch


def last_third(trainer: Trainer, tokens: Tensor, since: int) -> tuple[Tensor, ...]:
    """The text's last third alone: other modules of the library than most of those seen so far."""
    size = len(trainer.corpus.tokens)
    first = size * 2 // 3
    starts = torch.randint(first, size - tokens.shape[1], (len(tokens), 1), generator=trainer.generator())
    return (trainer.corpus.tokens[starts + torch.arange(tokens.shape[1])].long(),)
