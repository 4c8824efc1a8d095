"""Step time and memory on a CUDA device, plain and watched, default and reduce-overhead. `benchmarks/gpu.sh` runs it.

    python benchmarks/gpu.py [--device cpu --tiny] [--seconds 300]

A dense decoder of 350M parameters and one of 1B with experts, in bfloat16, AdamW. Blocks of ten steps run in turns, timed from a
quiet device to a quiet device; what foreshock does about a step is in them. Needs torch and numpy alone.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
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
    "dense": (Size(width=32, layers=2, heads=2, hidden=64, vocabulary=64), 2, 32),
    "experts": (Size(width=32, layers=2, heads=2, hidden=64, experts=4, vocabulary=64), 2, 32),
}
WAYS: dict[str, dict[str, Any] | None] = {"plain": None, "every=10": {"every": 10}, "every=1": {"every": 1}}
BLOCK = 10


def stepper(
    size: Size, sequences: int, length: int, way: dict[str, Any] | None, mode: str, device: str
) -> tuple[Callable[[], None], Watch | None, int]:
    """One training step, its watch, and the number of parameters."""
    torch.manual_seed(0)
    model = Decoder(size, length).to(device, torch.bfloat16)
    tokens = torch.randint(size.vocabulary, (sequences, length), device=device)
    watch = None if way is None else Watch(strict=True, detectors=[], **way)
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


def compare(name: str, sizes: tuple[Size, int, int], mode: str, device: str, until: float) -> None:
    """Print one line a way; rounds end at ``until``."""
    steps, watches, peaks = {}, {}, {}
    for way, options in WAYS.items():
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps[way], watches[way], parameters = stepper(*sizes, options, mode, device)
        start = quiet(device)
        for _ in range(BLOCK + 2):
            steps[way]()
        print(f"  {way}: compiled and warm after {quiet(device) - start:.0f} s", flush=True)
        peaks[way] = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    while min(map(len, taken.values())) < 3 or (time.perf_counter() < until and len(taken["plain"]) < 20):
        for way, step in steps.items():
            start = quiet(device)
            for _ in range(BLOCK):
                step()
            taken[way].append((quiet(device) - start) / BLOCK)
    _, sequences, length = sizes
    print(f"{name}: {parameters / 1e6:.0f}M parameters, bfloat16, {sequences} x {length} tokens, {mode}")
    for way, seconds in taken.items():
        of = ratio(array(seconds), array(taken["plain"]))
        memory = f"peak {peaks[way] / max(1, peaks['plain']):.3f}" if device == "cuda" else ""
        watch = watches[way]
        sites = "" if watch is None else f"{len(watch.sites)} sites {len(watch.metrics())} metrics"
        print(f"  {way:10} {1e3 * median(seconds):9.2f} ms, {of} of plain  {memory}  {sites}", flush=True)
    for watch in watches.values():
        if watch is not None:
            watch.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU: times say nothing about a GPU"
    print(", ".join([device, *(f"{key} {value}" for key, value in where().items())]))
    begun, runs = (
        time.perf_counter(),
        [(n, m) for n in (TINY if options.tiny else SIZES) for m in ("default", "reduce-overhead")],
    )
    for number, (name, mode) in enumerate(runs):
        torch._dynamo.reset()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        until = begun + options.seconds * (number + 1) / len(runs)
        compare(name, (TINY if options.tiny else SIZES)[name], mode, options.device, until)


if __name__ == "__main__":
    main()
