"""One model in training: a loop as a user would write it, with a place for every fault, that can be stopped and gone on with.

Until a fault starts, nothing in it depends on the fault: two runs of one seed are equal bit for bit up to there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from injections import Injection
from subjects import Subject
from torch import Tensor, nn

from foreshock.demo import kernel
from foreshock.demo.data import Corpus
from foreshock.demo.model import Transformer
from foreshock.demo.train import BALANCE, BATCH, LEARNING_RATE, WARMUP, make_optimizer

DECAY = 0.1  # weight decay of every group, as the demo's optimizer has it


@dataclass(frozen=True)
class Step:
    """What one step leaves behind; ``loss`` and ``grad_norm`` (before clipping) are tensors that nobody waited for."""

    loss: Tensor
    grad_norm: Tensor
    learning_rate: float


class Trainer:
    """A model, its optimizer and its batches. ``step`` is the number of the next step; ``kept`` is the fault's own memory."""

    def __init__(self, subject: Subject, seed: int, corpus: Corpus, backend: str | Callable[..., Any]) -> None:
        torch.manual_seed(seed)
        kernel.set_fault(kernel.HEALTHY)
        self.config, self.seed, self.corpus = subject.config, seed, corpus
        self.network = Transformer(subject.config)
        self.optimizer = make_optimizer(self.network)
        self.model: Any = torch.compile(self.network, backend=backend) if backend != "eager" else self.network
        self._batches = corpus.batches(seed, BATCH, subject.config.length + 1)
        self.step = 0
        self.kept: dict[str, Any] = {}

    def draw(self) -> Tensor:
        """The next batch of the run's own stream, int64 [B, S + 1]."""
        return next(self._batches)

    def generator(self) -> torch.Generator:
        """Random numbers for this step's fault; the run's own stream does not notice."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + self.step)

    def advance(self, injection: Injection, since: int) -> Step:
        """One step, ``since`` steps after the fault's first (negative: it has not started)."""
        broken = since >= 0
        if since == 0 or since == injection.kernel_steps:
            fault = injection.kernel if since == 0 else kernel.HEALTHY
            kernel.set_fault(replace(fault, layers=self.config.layers))
        tokens = self.draw()
        self._set_rates(injection, since)
        if broken and injection.before is not None:
            injection.before(self, since)
        batches = injection.batch(self, tokens, since) if broken and injection.batch is not None else (tokens,)
        scale = injection.loss_scale if broken else 1.0
        weight = BALANCE * (injection.balance if broken else 1.0)
        losses = []
        for part in batches:
            loss, balance = self.model(part)
            ((loss + weight * balance) * (scale / len(batches))).backward()
            losses.append(loss.detach())
        clip = injection.clip if broken else 1.0
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if broken and injection.after is not None:
            injection.after(self, since)
        self.step += 1
        return Step(torch.stack(losses).mean(), norm.detach(), self.optimizer.param_groups[0]["lr"])

    def _set_rates(self, injection: Injection, since: int) -> None:
        warm = min((self.step + 1) / WARMUP, 1.0)
        base = LEARNING_RATE * (warm if injection.schedule is None or since < 0 else injection.schedule(since))
        for group, rate, decay in zip(self.optimizer.param_groups, injection.rates, injection.decays, strict=True):
            group["lr"] = base * (rate(since) if since >= 0 else 1.0)
            group["weight_decay"] = DECAY * (decay if since >= 0 else 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; tensors are copies."""
        state = {
            "step": self.step,
            "random": torch.get_rng_state(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        copied: dict[str, Any] = _copy(state)
        return copied

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; the stream of batches is wound forward."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        next(islice(self._batches, state["step"] - 1, None), None)
        self.step = state["step"]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def cosine(floor: float, steps: int) -> Callable[[int], float]:
    """A schedule that warms up as all do and falls to ``floor`` over ``steps`` steps."""

    def rate(since: int) -> float:
        warm = min((since + 1) / WARMUP, 1.0)
        return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(since / steps, 1.0))))

    return rate
