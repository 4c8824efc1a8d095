"""What each metric family of the second tier costs: its steps over steps without foreshock, run in turns.

    python benchmarks/families.py

A small OLMoE and a small Llama are trained on one thread under inductor, every step sampled (``every=1``): the worst case, ten
times what ``every=10`` costs. Each round runs one step of every variant, in an order that changes; a ratio is the median over
rounds of step time over the plain step time of the same round. The first tier is in every variant but the plain one, so what a
family adds is the difference to the line `default`. Time is the processor's: on one thread it is the step time of a machine that
does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from foreshock import Watch
from foreshock.config import SECOND_TIER

VOCABULARY, LAYERS, HEADS = 256, 2, 4


def model_of(name: str, width: int) -> torch.nn.Module:
    """Random weights, the same each time."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "intermediate_size": width if name == "Olmoe" else 4 * width,
    }
    experts = {"num_experts": 8, "num_experts_per_tok": 2} if name == "Olmoe" else {}
    config = getattr(transformers, f"{name}Config")(**sizes, **experts)
    torch.manual_seed(0)
    made: torch.nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).train()
    return made


def stepper(name: str, width: int, tokens: torch.Tensor, watch: Watch | None) -> Callable[[], float]:
    """Processor seconds of one training step: forward, backward, AdamW, and what foreshock does between steps."""
    model = model_of(name, width)
    compiled = torch.compile(model, backend="inductor" if watch is None else watch.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        start = time.process_time()
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            _ = watch.alarms  # works off the step now, not inside the next one
        return time.process_time() - start

    for _ in range(3):
        step()
    return step


def compare(name: str, width: int, rounds: int, sequences: int, length: int) -> None:
    """Print one line for each variant."""
    tokens = torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(1))
    chosen: dict[str, list[str]] = {"default": ["default"]}
    chosen |= {f"+ {family}": ["default", family] for family in SECOND_TIER}
    chosen["all"] = ["all"]
    steps, watches = {"plain": stepper(name, width, tokens, None)}, dict[str, Watch]()
    for key, families in chosen.items():
        watches[key] = Watch(every=1, strict=True, detectors=[], monitors=families)
        steps[key] = stepper(name, width, tokens, watches[key])
    times: dict[str, list[float]] = {key: [] for key in steps}
    gc.collect()
    order = list(steps)
    for number in range(rounds):
        turn = number % len(order)
        for key in [*order[turn:], *order[:turn]]:
            times[key].append(steps[key]())
    sizes = f"{LAYERS} layers of width {width}, {sequences} x {length} tokens, {rounds} rounds"
    print(f"{name}, {sizes}, one thread, every=1, torch {torch.__version__}", flush=True)
    print(f"  {'plain':14} {1e3 * statistics.median(times['plain']):8.1f} ms a step")
    base = 0.0
    for key, watch in watches.items():
        ratios = sorted(mine / plain for mine, plain in zip(times[key], times["plain"], strict=True))
        ratio, low, high = statistics.median(ratios), ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        base = base or ratio
        series = sum(len(watch.collector.store.sites_of(metric)) for metric in watch.metrics())
        print(
            f"  {key:14} {ratio:6.3f} of plain ({low:.3f} to {high:.3f}), {ratio - base:+.3f}, {series} series a step"
        )
        watch.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--models", nargs="+", default=["Llama", "Olmoe"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # every variant compiles the same code once more
    for family in options.models:
        compare(family, options.width, options.rounds, options.sequences, options.length)
