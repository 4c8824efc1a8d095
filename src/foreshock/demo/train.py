"""Train the small mixture-of-experts model on real text, and break the run on request.

A plain training script: the only line that concerns compilation is ``torch.compile(model, backend=...)``.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.demo import kernel
from foreshock.demo.data import Corpus, standard_library
from foreshock.demo.model import Config, Transformer
from foreshock.demo.rounding import Rounding

BATCH = 8
WARMUP = 100
LEARNING_RATE = 1.5e-3
BALANCE = 0.01


@dataclass(frozen=True)
class Ramp:
    """A factor that grows from 1 to ``peak``, by the same ratio each step for ``steps`` steps, and stays there."""

    peak: float = 1.0
    steps: int = 1

    def __call__(self, since: int) -> float:
        return float(self.peak ** min(max(since, 0) / self.steps, 1.0))


@dataclass(frozen=True)
class Fault:
    """What goes wrong from the chosen step on: the kernel, a learning rate, or the weight of the balancing loss."""

    note: str
    learning_rate: Ramp = Ramp()
    router_learning_rate: Ramp = Ramp()
    query_key_learning_rate: Ramp = Ramp()
    attention: kernel.Fault = kernel.HEALTHY
    balance: float = 1.0


ONE_BIT = Rounding(bits=1)
FAULTS = {
    "none": Fault("nothing goes wrong"),
    "attention": Fault(
        "the attention kernel of layer 1 rounds its output away from zero, to one mantissa bit",
        attention=kernel.Fault(out=ONE_BIT, layer=1, layers=2),
    ),
    "attention-everywhere": Fault(
        "the attention kernel rounds its output away from zero, to one mantissa bit",
        attention=kernel.Fault(out=ONE_BIT),
    ),
    "attention-backward": Fault(
        "the attention kernel's backward rounds the output that it reads away from zero, to a power of two",
        attention=kernel.Fault(delta=Rounding(bits=0)),
    ),
    "router": Fault(
        "the learning rate of the routers ramps up a hundredfold over 800 steps", router_learning_rate=Ramp(100, 800)
    ),
    "router-balance": Fault("the load-balancing loss turns its sign and grows tenfold", balance=-10.0),
    "learning-rate": Fault(
        "the learning rate of the query and key weights ramps up thirtyfold over 800 steps",
        query_key_learning_rate=Ramp(30, 800),
    ),
    "learning-rate-everywhere": Fault(
        "the learning rate ramps up thirtyfold over 800 steps",
        Ramp(30, 800),
        Ramp(30, 800),
        query_key_learning_rate=Ramp(30, 800),
    ),
}


@dataclass(frozen=True)
class Result:
    losses: list[float]
    parameters: dict[str, Tensor]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the routers, and the query and key weights, in groups of their own (the second and the third)."""
    named = dict(model.named_parameters())
    routers = [name for name in named if ".router." in name]
    query_key = [name for name in named if ".q_proj." in name or ".k_proj." in name]
    others = [name for name in named if name not in {*routers, *query_key}]
    groups = [{"params": [named[name] for name in names]} for names in (others, routers, query_key)]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def train(
    backend: str | Callable[..., Any] = "inductor",
    *,
    steps: int,
    seed: int = 1,
    fault: Fault = FAULTS["none"],
    at: int = 0,
    config: Config = Config(),  # noqa: B008  # frozen
    corpus: Corpus | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Result:
    """Run ``steps`` optimizer steps with ``fault`` from step ``at`` on; ``on_step(step, loss)`` follows each."""
    torch.manual_seed(seed)
    kernel.set_fault(kernel.HEALTHY)
    network = Transformer(config)
    optimizer = make_optimizer(network)
    model = network if backend == "eager" else torch.compile(network, backend=backend)
    batches = (corpus or standard_library()).batches(seed, BATCH, config.length + 1)
    losses = []
    for step, tokens in enumerate(islice(batches, steps)):
        broken = step >= at
        if step == at:
            kernel.set_fault(fault.attention)
        warm = LEARNING_RATE * min((step + 1) / WARMUP, 1.0)
        ramps = fault.learning_rate, fault.router_learning_rate, fault.query_key_learning_rate
        for group, ramp in zip(optimizer.param_groups, ramps, strict=True):
            group["lr"] = warm * ramp(step - at)
        loss, balance = model(tokens)
        (loss + BALANCE * (fault.balance if broken else 1.0) * balance).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    kernel.set_fault(kernel.HEALTHY)
    return Result(losses, {name: p.detach().clone() for name, p in network.named_parameters()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="inductor", help="any torch.compile backend, or eager")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--at", type=int, default=400, help="step at which the fault starts")
    parser.add_argument("--sdpa", action="store_true", help="PyTorch's own attention instead of the kernel")
    parser.add_argument("--threads", type=int, default=1, help="one makes a run repeat itself bit for bit")
    parser.add_argument("--save", type=Path, help="write losses and final parameters to this file")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    corpus = standard_library()
    print(f"text: {len(corpus.tokens):,} bytes, sha256 {corpus.sha256[:16]}")
    result = train(
        options.backend,
        steps=options.steps,
        seed=options.seed,
        fault=FAULTS[options.fault],
        at=options.at,
        config=Config(sdpa=options.sdpa),
        corpus=corpus,
        on_step=lambda step, loss: print(f"step {step:5d}  loss {loss:.4f}") if step % 50 == 0 else None,
    )
    if options.save is not None:
        torch.save({"losses": torch.tensor(result.losses), "parameters": result.parameters}, options.save)


if __name__ == "__main__":
    main()
