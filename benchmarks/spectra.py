"""What the weight spectra cost: of one layer against straightforward ways, and a step in turn against all at once.

    python benchmarks/spectra.py [--quick] [--json FOLDER]

The first table measures all heads of one layer, Delta2 and Delta3 (and dWq and dWk, which the others leave out), from float32
weights: as foreshock does, from Gram matrices; straightforwardly, from thin QRs of the factors and the eigenvalues of the core's
Gram matrix, in float64, in float32, and without forming Q (R alone, in the faster of both); and by a dense SVD of one head in
float64, times the heads. The share is that of the faster straightforward way of those that reach the accuracy asked. Errors are
the largest relative ones of norm and effective rank of the first head against the dense SVD, beyond a width of 1024 against the
QRs in float64. Processor seconds, the least of five (of one where a run is long); one thread.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from measuring import where, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from foreshock.monitors import Spectra
from foreshock.monitors.increments import increment, statistics
from foreshock.records import Site, Stage, WeightView

SHARE, ALIKE = 0.2, 1e-3  # of the straightforward way's time from a width of 1024 on; relative error
DENSE = 1024  # the widest matrix that is decomposed densely
Found = Mapping[str, Tensor]  # squared singular values [H, n] of each matrix


def straightforward(now: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor], mode: str = "reduced") -> Found:
    """Thin QRs of both factors of each product, ``[H, d, h]``; with ``mode`` "r" the orthogonal factors are not formed."""
    (wq, wk), (dq, dk) = base, (a - b for a, b in zip(now, base, strict=True))

    def squares(a: Tensor, b: Tensor) -> Tensor:
        core = torch.linalg.qr(a, mode)[1] @ torch.linalg.qr(b, mode)[1].mT
        return torch.linalg.eigvalsh(core.mT @ core)

    return {"delta2": squares(torch.cat([dq, wq], -1), torch.cat([wk, dk], -1)), "delta3": squares(dq, dk)}


def dense(now: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> Found:
    """Of the first head alone, the products formed."""
    (wq, wk), (dq, dk) = ([x[:1] for x in base], [a[:1] - b[:1] for a, b in zip(now, base, strict=True)])
    return {
        name: torch.linalg.svdvals(matrix).square()
        for name, matrix in (("delta2", dq @ wk.mT + wq @ dk.mT), ("delta3", dq @ dk.mT))
    }


def summary(found: Found) -> dict[str, float]:
    """Norm and effective rank of the first head."""
    told = {}
    for name, squares in found.items():
        of = squares[0].double().clamp_min(0)
        told[f"{name}_norm"] = float(of.sum().sqrt())
        told[f"{name}_effective_rank"] = float(torch.special.entr(of / of.sum()).sum().exp())
    return told


def ours(now: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """All statistics of all heads."""
    own = tuple(range(now[0].shape[0]))
    sides = [increment([(a[None], None)], [(b[None], None)], [own]) for a, b in zip(now, base, strict=True)]
    return statistics(*sides, own, own, 10)[0]


def least(work: Callable[[], Any], times: int = 5) -> tuple[float, Any]:
    taken = []
    for _ in range(times):
        start = time.process_time()
        found = work()
        taken.append(time.process_time() - start)
    return min(taken), found


def layers(console: Console, widths: list[int], dims: list[int]) -> list[dict[str, float]]:
    """The table of one layer."""
    columns = (
        "d",
        "h",
        "heads",
        "ours ms",
        "error",
        "QR f64",
        "QR f32",
        "its error",
        "R alone",
        "SVD",
        "share",
        "of R",
    )
    table, rows = Table(*columns, title="one layer, all heads"), []
    for width in widths:
        for dim in dims:
            random, heads = torch.Generator().manual_seed(0), max(1, width // dim)
            base = tuple((torch.randn(heads, dim, width, generator=random) / width**0.5).mT for _ in "qk")
            now = tuple(w + 1e-3 * torch.randn(heads, dim, width, generator=random).mT / width**0.5 for w in base)
            wide = tuple(tuple(w.double() for w in of) for of in (now, base))
            times = 5 if width <= DENSE else 1
            row: dict[str, float] = {"d": width, "h": dim, "heads": heads}
            row["ours"], told = least(lambda now=now, base=base: ours(now, base))
            row["qr64"], exact = least(lambda wide=wide: straightforward(*wide), times)
            row["qr32"], single = least(lambda now=now, base=base: straightforward(now, base), times)
            reference, found = summary(exact), summary(single)
            if width <= DENSE:
                taken, exact = least(lambda wide=wide: dense(*wide), 1)
                row["svd"], reference = taken * heads, summary(exact)
            own = {name: float(told[f"attention/{name}"][0, 0]) for name in reference}
            row["error"], row["error32"] = (
                max(abs(of[name] / reference[name] - 1) for name in reference) for of in (own, found)
            )
            narrow = row["error32"] <= ALIKE and row["qr32"] < row["qr64"]
            faster = (now, base) if narrow else wide
            row["r"], _ = least(lambda of=faster: straightforward(*of, "r"), times)
            row["share"] = row["ours"] / (row["qr32"] if narrow else row["qr64"])
            row["share of r"] = row["ours"] / row["r"]
            rows.append(row)
            missed = "" if width < 1024 or (row["share"] <= SHARE and row["error"] <= ALIKE) else " MISSED"
            table.add_row(
                *(str(x) for x in (width, dim, heads)),
                f"{1e3 * row['ours']:.1f}",
                f"{row['error']:.0e}",
                *(f"{1e3 * row[name]:.0f}" for name in ("qr64", "qr32")),
                f"{row['error32']:.0e}",
                f"{1e3 * row['r']:.0f}",
                f"{1e3 * row['svd']:.0f}" if "svd" in row else "",
                f"{row['share']:.2f}{missed}",
                f"{row['share of r']:.2f}",
            )
    console.print(table)
    console.print(f"target from d = 1024 on: share <= {SHARE} at an error <= {ALIKE}")
    return rows


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
        start = time.process_time()
        if step % every == 0:
            spectra.update(step, [of for of, _ in made])
        taken.append(time.process_time() - start)
    turns = spectra.state_dict()["turns"].values()
    held = sum(x.numel() for _, ring in turns for entry in ring for side in entry[2:4] for x in side[::2])
    return np.array(taken[61:71]), held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="widths up to 1024, four layers")
    parser.add_argument("--json", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    console.print(" ".join(f"{key} {value}" for key, value in where().items()))
    widths = [256, 512, 1024] if options.quick else [256, 512, 1024, 2048, 4096]
    found = layers(console, widths, [64] if options.quick else [32, 64, 128])
    number, width, heads = 4 if options.quick else 16, 512, 8
    weights, turns = 2 * number * width * width, {}
    for every, words in ((1, "in turn"), (10, "all at once")):
        taken, held = seconds(number, width, heads, every)
        turns[words] = {"longest": taken.max(), "ten": taken.sum(), "copies": held / weights}
        console.print(
            f"{number} layers of {heads} heads of {width // heads}, {words}: longest step {taken.max():.2f} s, "
            f"ten steps {taken.sum():.2f} s, {held / weights:.1f} copies of {weights / 1e6:.1f} M weights held"
        )
    write("spectra", {"layers": found, "turns": turns}, options.json)


if __name__ == "__main__":
    main()
