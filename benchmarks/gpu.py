"""Step time and memory on a CUDA device, plain and watched, default and reduce-overhead. `benchmarks/gpu.sh` runs it.

    python benchmarks/gpu.py [--device cpu --tiny] [--seconds 320]

A dense decoder of 350M parameters and one of 1B with experts, in bfloat16, AdamW. Blocks of ten steps run in turns, timed from a
quiet device to a quiet device; what foreshock does about a step is in them. Ratios are printed after every round, and what there
is no time for is left out with a word. Needs torch, numpy and networkx; without scipy the t-tests of the judge are left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from measuring import ratio, where
from numpy import array, median
from transformer import Decoder, Size

from foreshock import Watch

SIZES = {
    "dense 350M": (Size(width=1024, layers=24, heads=16, hidden=4096, vocabulary=32000), 4, 1024),
    "experts 1B": (Size(width=1024, layers=12, heads=16, hidden=2560, experts=16, vocabulary=32000), 4, 1024),
}
TINY = {
    "dense": (Size(width=32, layers=1, heads=2, hidden=64, vocabulary=64), 2, 32),
    "experts": (Size(width=32, layers=1, heads=2, hidden=64, experts=4, vocabulary=64), 2, 32),
}
WAYS: dict[str, dict[str, Any] | None] = {"plain": None, "every=10": {"every": 10}, "every=1": {"every": 1}}
BLOCK, LEAST, MOST = 10, 3, 20  # steps of a block; rounds
WHOLE = importlib.util.find_spec("scipy") is not None


def stepper(
    size: Size, sequences: int, length: int, way: dict[str, Any] | None, mode: str, device: str
) -> tuple[Callable[[], None], Watch | None, int]:
    """One training step, its watch, and the number of parameters."""
    torch.manual_seed(0)
    model = Decoder(size, length).to(device, torch.bfloat16)
    tokens = torch.randint(size.vocabulary, (sequences, length), device=device)
    watch = None if way is None else Watch(strict=WHOLE, detectors=[], **way)
    options = {} if mode == "default" else {"mode": mode}
    compiled = torch.compile(model, backend="inductor" if watch is None else watch.backend, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")

    def step() -> None:
        compiled(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, watch, sum(p.numel() for p in model.parameters())


def quiet(device: str) -> float:
    """The time once the device has nothing left to do, in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """What time is left of ``seconds``, and how long the slowest way took to compile."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.slowest = 0.0

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()


def compare(name: str, sizes: tuple[Size, int, int], mode: str, device: str, clock: Clock, share: float) -> None:
    """Print the ratios after each round, which go on for ``share`` of the time that is left."""
    steps, watches, peaks = {}, {}, {}
    until = time.perf_counter() + clock.left * share
    _, sequences, length = sizes
    print(f"{name}: bfloat16, {sequences} x {length} tokens, {mode}", flush=True)
    for way, options in WAYS.items():
        if clock.left < clock.slowest:
            print(f"  {way}: left out, {clock.left:.0f} s are left and compiling took up to {clock.slowest:.0f} s")
            continue
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = quiet(device)
        steps[way], watches[way], parameters = stepper(*sizes, options, mode, device)
        for _ in range(BLOCK + 2):
            steps[way]()
        taken = quiet(device) - start
        clock.slowest = max(clock.slowest, taken)
        print(f"  {way}: {parameters / 1e6:.0f}M parameters, compiled and warm after {taken:.0f} s", flush=True)
        peaks[way] = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    if len(steps) > 1:
        rounds(steps, device, clock, until)
    for way, watch in watches.items():
        if watch is not None:
            memory = f", peak {peaks[way] / max(1, peaks['plain']):.3f} of plain" if device == "cuda" else ""
            lines = [*watch.coverage.warnings, *watch.coverage.unmatched]
            print(f"  {way}: {len(watch.sites)} sites, {len(watch.metrics())} metrics{memory}", *lines, sep="\n    ")
            watch.close()


def rounds(steps: Mapping[str, Callable[[], None]], device: str, clock: Clock, until: float) -> None:
    """A block of each way in turn, over and over, until time is up."""
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(1, MOST + 1):
        if number > 1 and (clock.left < 0 or (number > LEAST and time.perf_counter() > until)):
            return
        for way, step in steps.items():
            start = quiet(device)
            for _ in range(BLOCK):
                step()
            taken[way].append((quiet(device) - start) / BLOCK)
        plain = array(taken["plain"])
        told = [f"{way} {ratio(array(of), plain)}" for way, of in taken.items() if way != "plain"]
        print(f"  round {number}: plain {1e3 * median(plain):.2f} ms; of it {', '.join(told)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=320)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU: times say nothing about a GPU"
    print(", ".join([device, *(f"{key} {value}" for key, value in where().items())]))
    if not WHOLE:
        print("no scipy: t-tests are not judged, and the ratios are without them")
    clock, sizes = Clock(options.seconds), TINY if options.tiny else SIZES
    runs = [(name, mode) for name in sizes for mode in ("default", "reduce-overhead")]
    for number, (name, mode) in enumerate(runs):
        torch._dynamo.reset()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if clock.left < 2 * clock.slowest:
            print(f"{name}, {mode}: left out, there is no time for a comparison")
            continue
        compare(name, sizes[name], mode, options.device, clock, 1 / (len(runs) - number))


if __name__ == "__main__":
    main()
