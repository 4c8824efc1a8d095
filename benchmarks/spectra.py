"""What the weight spectra cost a step: every site in its turn, and all of them on every tenth step.

`python benchmarks/spectra.py [LAYERS] [WIDTH] [HEADS]` (default 16 512 8), windows of 10 and 50 steps, one thread.
"""

from __future__ import annotations

import sys
import time
import weakref

import numpy as np
import torch

from foreshock.monitors import Spectra
from foreshock.records import Site, Stage, WeightView


def site(number: int, width: int, heads: int) -> tuple[Site, list[torch.Tensor]]:
    """An attention whose query and key weights are ``[width, width]``, and those."""
    parameters = [torch.randn(width, width) / width**0.5 for _ in "qk"]
    stage = Stage(np.arange(width).reshape(heads, -1), (0,), tuple(range(heads)))
    q, k = (WeightView(("w",), (stage,), (weakref.ref(p),)) for p in parameters)
    return Site(f"{number}", f"{number}", "attention", "benchmark", heads=heads, q_weight=q, k_weight=k), parameters


def seconds(layers: int, width: int, heads: int, every: int) -> tuple[np.ndarray, int]:
    """Of the ten steps after the 60th, with an update on every ``every``-th; and the numbers held after them."""
    made = [site(number, width, heads) for number in range(layers)]
    spectra, taken = Spectra((10, 50)), []
    for step in range(71):
        for _, parameters in made:
            for p in parameters:
                p += 1e-3 * p.flip(0)
        start = time.perf_counter()
        if step % every == 0:
            spectra.update(step, [of for of, _ in made])
        taken.append(time.perf_counter() - start)
    turns = spectra.state_dict()["turns"].values()
    held = sum(x.numel() for _, ring in turns for entry in ring for side in entry[2:4] for x in side[::2])
    return np.array(taken[61:71]), held


if __name__ == "__main__":
    torch.set_num_threads(1)
    layers, width, heads = (int(x) for x in (*sys.argv[1:], *("16", "512", "8")[len(sys.argv) - 1 :]))
    weights = 2 * layers * width * width
    for every, words in ((1, "in turn"), (10, "all at once")):
        taken, held = seconds(layers, width, heads, every)
        print(
            f"{words:12} longest step {taken.max():.2f} s, ten steps {taken.sum():.2f} s, "
            f"{held / weights:.1f} copies of {weights / 1e6:.1f} M weights held"
        )
