"""Whether watching for long leaks: memory, Python objects and bytes on the disk over many steps of a small model.

    python benchmarks/soak.py                 # 20,000 steps, every one sampled, with a run folder
    python benchmarks/soak.py --plain         # the same training without foreshock, to compare with

Every ``--look`` steps the process collects its garbage and is measured: resident memory, objects that the collector knows, by
type, and the bytes of the run folder. Slopes are Theil and Sen's over the second half, with their 95% intervals, per 1,000 steps:
windows, histories and caches are full by then. Types that grew in that half are named.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from measuring import where, write
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from foreshock import Watch

WIDTH, EXPERTS = 16, 4


class Block(nn.Module):
    """Attention and a mixture of experts, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1).topk(2)
        spread = torch.zeros_like(logits).scatter(-1, chosen, weights)
        return x + torch.einsum("bse,bsd,edf->bsf", spread, x, self.experts)


@dataclass
class Soak:
    """What was measured at each look, and the slopes: ``(slope, low, high)`` per 1,000 steps."""

    steps: list[int] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    stored_bytes: list[int] = field(default_factory=list)
    slopes: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    growing: dict[str, float] = field(default_factory=dict)
    milliseconds: float = 0.0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(steps: list[int], values: list[int]) -> tuple[float, float, float]:
    """Per 1,000 steps, over the second half."""
    half = len(steps) // 2
    found = stats.theilslopes(np.array(values[half:], float), np.array(steps[half:], float))
    return (1000 * found.slope, 1000 * found.low_slope, 1000 * found.high_slope)


def soak(steps: int, look: int, inner: str, plain: bool, folder: Path) -> Soak:
    torch.manual_seed(0)
    model, found = Block(), Soak()
    types: dict[int, Counter[str]] = {}
    with nullcontext() if plain else Watch(folder, every=1, inner=inner, monitors="all", on_alarm="warn") as watch:
        compiled = torch.compile(model, backend=inner if watch is None else watch.backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        target = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
        began = time.process_time()
        for step in range(1, steps + 1):
            x = torch.randn(4, 16, WIDTH)
            loss = (compiled(x) - x @ target).square().mean()
            if watch is not None:
                watch.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % look == 0:
                gc.collect()
                found.steps.append(step)
                found.resident_bytes.append(resident())
                known = gc.get_objects()
                found.objects.append(len(known))
                if len(found.steps) in (steps // look // 2, steps // look):
                    types[step] = Counter(f"{type(x).__module__}.{type(x).__qualname__}" for x in known)
                del known
                found.stored_bytes.append(sum(f.stat().st_size for f in folder.iterdir()) if folder.is_dir() else 0)
        found.milliseconds = 1000 * (time.process_time() - began) / steps
    for name in ("resident_bytes", "objects", "stored_bytes"):
        found.slopes[name] = slope(found.steps, getattr(found, name))
    first, last = min(types), max(types)
    more = types[last] - types[first]
    found.growing = (
        {name: 1000 * count / (last - first) for name, count in more.most_common(12)} if last > first else {}
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--look", type=int, default=200, help="steps between two measurements")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--plain", action="store_true", help="without foreshock")
    parser.add_argument("--json", help="folder for the numbers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(given.steps, given.look, given.inner, given.plain, Path(folder) / "run")
    print(f"{given.steps} steps, {found.milliseconds:.1f} ms of processor time each; {where()}")
    for name, (middle, low, high) in found.slopes.items():
        last = getattr(found, name)[-1]
        print(f"{name}: {last:,} at the end, {middle:+,.1f} per 1,000 steps ({low:+,.1f} to {high:+,.1f})")
    for name, count in found.growing.items():
        print(f"  {count:+.1f} {name} per 1,000 steps")
    write("soak plain" if given.plain else "soak", asdict(found), given.json)


if __name__ == "__main__":
    main()
