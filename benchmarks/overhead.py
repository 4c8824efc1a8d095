"""What watching costs a training step, a compilation and memory, against plain inductor and against hooks.

    python benchmarks/overhead.py [--quick] [--json FOLDER] [--models dense moe llama] [--steps WAY ...]

Each round runs a block of steps of every way, in turns; a ratio is that of medians over rounds, with the interval that holds
95 % of its bootstrap, or of fewer than five rounds with their range. Blocks have ten steps, for some things are done every tenth;
they begin when the weight spectra have both their windows.
A step is forward, backward, AdamW, and what foreshock does when it is over: merging, spectra, judging, writing to the run folder.

Compile times are the processor's, compilers included, in a process that has compiled before: cold with an empty cache folder, and
warm with the same one; "both" is the first sampled and the first plain step. Peak memory is the most that a step holds, with
parameters, gradients and Adam's moments; the spectra's snapshots are told apart. Reads are single numbers that the host reads from
tensors, copies are tensors that it brings to itself, both in a plain loop of ten steps, beyond those of plain inductor.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from families import model_of
from measuring import Ratio, interleaved, ratio, where, write
from rich.console import Console
from rich.table import Table
from torch import nn
from trained import Compiled, Make, Trained, Way, compiled
from transformer import Decoder, Size

from foreshock.cost import REWRITING

WAYS = {
    "inductor": Way(),
    "every=10": Way({}),
    "every=1": Way({"every": 1}),
    'every=1, "all"': Way({"every": 1, "monitors": "all"}),
    "hooks": Way(hooks=True),
    "eager": Way(compiled=False),
    "eager, hooks": Way(hooks=True, compiled=False),
}
TARGETS = {"every=10": 1.01, "every=1": 1.03}
SIZES = {
    "dense": (Size(width=512, layers=6, heads=8, hidden=2048), 1, 512),
    "moe": (Size(width=256, layers=4, heads=4, hidden=512, experts=8), 2, 512),
}
SMALL = Size(width=256, layers=2, heads=4, hidden=1024)
LEAST = Size(width=64, layers=1, heads=1, hidden=64)
BLOCK, SHORT = 10, 3  # steps a block: of ways that do something now and then, of all others


LEFT_OUT = {  # so that the whole takes minutes: everything on is shown on the least model, eager on the greatest
    "dense": ('every=1, "all"',),
    "moe": ('every=1, "all"', "eager", "eager, hooks"),
    "llama": ("hooks", "eager", "eager, hooks"),
}


def _ways(name: str) -> dict[str, Way]:
    return {way: of for way, of in WAYS.items() if way not in LEFT_OUT[name]}


def _slug(way: str) -> str:
    return "".join(letter for letter in way if letter.isalnum())


def plain(size: Size, sequences: int, length: int) -> Make:
    """A decoder of `transformer`, and its loss."""

    def make() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
        tokens = torch.randint(size.vocabulary, (sequences, length), generator=torch.Generator().manual_seed(1))
        return Decoder(size, length), lambda run: run(tokens)

    return make


def llama() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """Two layers of width 256, on 4 x 256 tokens."""
    tokens = torch.randint(256, (4, 256), generator=torch.Generator().manual_seed(1))
    return model_of("Llama", 256), lambda run: run(input_ids=tokens, labels=tokens).loss


MAKES: dict[str, Make] = {**{name: plain(*size) for name, size in SIZES.items()}, "llama": llama}


def verdict(found: Ratio, target: float) -> str:
    """By the median; and whether the interval is on one side of the target."""
    word = "met" if found.value <= target else "MISSED"
    return word if (found.high <= target) == (found.low <= target) else f"{word}, not surely"


def steps(console: Console, name: str, found: dict[str, Trained], rounds: int) -> dict[str, Any]:
    """The table of step times."""
    for trained in found.values():
        trained.step()
        trained.settle()
    before = {way: own_seconds(trained) for way, trained in found.items()}
    blocks = {way: SHORT if way[0] in "eh" and "=" not in way else BLOCK for way in found}
    times = interleaved({way: (trained.step, blocks[way]) for way, trained in found.items()}, rounds)
    table = Table("way", "ms a step", "of inductor", "of eager", "target", title=f"{name}: steps, {rounds} rounds")
    ratios: dict[str, Any] = {}
    for way, taken in times.items():
        of = {base: ratio(taken, times[base]) for base in ("inductor", "eager") if base in times and base != way}
        target = TARGETS.get(way)
        told = "" if target is None else f"<= {target} {verdict(of['inductor'], target)}"
        milliseconds = 1e3 * float(sorted(taken)[len(taken) // 2])
        table.add_row(way, f"{milliseconds:.1f}", str(of.get("inductor", "")), str(of.get("eager", "")), told)
        ratios[way] = {"ms": milliseconds, **of}
    console.print(table)
    told = next(ratio(taken, taken).words for taken in times.values())
    console.print(f"  in brackets: {told}")
    for way, trained in found.items():
        if trained.watch is not None:
            own = Counter(own_seconds(trained))
            own.subtract(before[way])
            ratios[way]["parts"] = parts = {n: 1e3 * s / rounds / blocks[way] for n, s in own.most_common() if s > 0}
            more = float(np.median(times[way]) - np.median(times["inductor"])) * 1e3
            told = ", ".join(f"{name} {taken:.1f}" for name, taken in parts.items() if taken >= 0.05)
            rest = more - sum(parts.values())
            console.print(
                f"  {way} takes {more:.1f} ms more a step: on the host {told}; the graphs, or noise, {rest:.1f}"
            )
    return ratios


def own_seconds(trained: Trained) -> dict[str, float]:
    """What the watch has taken so far, by its own account, part by part."""
    return {} if trained.watch is None else dict(trained.watch.costs.seconds)


def compilations(console: Console, name: str, make: Make, folder: Path) -> tuple[dict[str, Trained], dict[str, Any]]:
    """The table of compilations, and every way compiled."""
    cold: dict[str, Compiled] = {}
    ways = {way: of for way, of in _ways(name).items() if of.compiled}
    for way, of in ways.items():
        if way == "every=10":
            continue
        torch._dynamo.reset()
        steps = 1
        if way == "every=1":  # one that compiles its second variant as well, a step later
            of, steps = Way({"every": 2}), 2
        trained, cold[way] = compiled(make, of, folder / _slug(way), steps)
        trained.close()
    torch._dynamo.reset()
    compiled(make, Way(), folder / "inductor")[0].close()  # the first to read from the cache pays for something once
    torch._dynamo.reset()
    found, warm = dict[str, Trained](), dict[str, Compiled]()
    for way, of in ways.items():
        cache = folder / _slug("every=1" if way == "every=10" else way)  # of its two variants, which are the same
        found[way], warm[way] = compiled(make, of, cache, folder=folder / f"run-{_slug(way)}")
    table = Table("way", "cold s", "warm s", "graphs", "breaks", "recompiles", "kernels", title=f"{name}: compilation")
    for way, one in cold.items():
        of_inductor = [cold["inductor"].seconds[0], warm["inductor"].seconds[0]]
        pairs = zip([one.seconds[0], warm[way].seconds[0]], of_inductor, strict=True)
        told = [f"{seconds:.1f} ({seconds / base:.2f})" for seconds, base in pairs]
        if ours := own_seconds(found[way]).get(REWRITING):
            told[1] += f", {ours:.2f} ours"
        if len(one.seconds) > 1:
            told[0] += f", both {one.seconds[1]:.1f} ({one.seconds[1] / of_inductor[0]:.2f})"
        counts = warm[way].graphs, warm[way].breaks, warm[way].recompiles, warm[way].kernels
        table.add_row(way, *told, *map(str, counts))
    console.print(table)
    console.print(
        "targets of inductor's: every=1 cold <= 1.25, warm <= 1.25, both variants <= 2.2; ours: matching, rewriting"
    )
    return found, {"cold": cold, "warm": warm}


def rest(console: Console, name: str, found: dict[str, Trained], folder: Path) -> dict[str, Any]:
    """The table of memory, of what comes to the host, and of bytes."""
    base_peak, base = found["inductor"].peak(), found["inductor"].brought()
    columns = ("peak", "+ snapshots", "reads", "copies", "samples", "numbers a sample", "KiB a sample")
    table = Table("way", *columns, title=f"{name}: memory, and ten steps in a plain loop")
    told: dict[str, Any] = {}
    for way, trained in found.items():
        watch = trained.watch
        if watch is None:
            continue
        snapshots = trained.snapshot_bytes()
        peak = (trained.peak() - max(0, trained.snapshot_bytes() - snapshots)) / base_peak
        brought = trained.brought()
        reads, copies = brought.numbers - base.numbers, brought.copies - base.copies
        numbers = sum(
            len(watch.series(m, s)[1][-1:].reshape(-1))
            for m in watch.metrics()
            for s in watch.collector.store.sites_of(m)
        )
        trained.close()
        sampled, samples = -(-watch.step // watch.settings.every), BLOCK // watch.settings.every
        size = sum(file.stat().st_size for file in (folder / f"run-{_slug(way)}").glob("*")) / sampled / 1024
        ring = trained.snapshot_bytes() / trained.held_bytes()
        row = {"peak": peak, "snapshots": ring, "reads": reads, "copies": copies, "numbers": numbers, "KiB": size}
        cells = f"{ring:.3f}", str(reads), str(copies), str(samples), str(numbers), f"{size:.1f}"
        table.add_row(way, f"{peak:.3f}", *cells)
        told[way] = row
    console.print(table)
    console.print("targets: peak <= 1.02 beside the snapshots; reads 0 but for what solvers report of themselves\n")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, and a dense model of two layers")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--models", nargs="+", default=list(MAKES), choices=list(MAKES))
    parser.add_argument("--steps", nargs="+", choices=list(WAYS), help="step times of these ways, and nothing else")
    parser.add_argument("--json", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # every way compiles the same code once more
    torch._inductor.config.compile_threads = 1  # compilers are waited for, and so counted
    console, told = Console(width=120), dict[str, Any]()
    console.print(" ".join(f"{key} {value}" for key, value in where().items()))
    if options.quick:
        MAKES["dense"] = plain(SMALL, 1, 256)
    if not options.steps:  # pays for imports and the like
        with tempfile.TemporaryDirectory() as folder:
            compiled(plain(LEAST, 1, 128), Way({"every": 1}), Path(folder))[0].close()
    for name in options.models:
        rounds = options.rounds or (3 if options.quick else 7)
        with tempfile.TemporaryDirectory() as folder:
            if options.steps:
                torch._dynamo.reset()
                found = {way: Trained(MAKES[name], WAYS[way], Path(folder) / _slug(way)) for way in options.steps}
                told[name] = {"steps": steps(console, name, found, rounds)}
                for trained in found.values():
                    trained.close()
                continue
            found, compiling = compilations(console, name, MAKES[name], Path(folder))
            found |= {way: Trained(MAKES[name], of) for way, of in _ways(name).items() if not of.compiled}
            taken = steps(console, name, found, rounds)
            told[name] = {"compilation": compiling, "steps": taken, "rest": rest(console, name, found, Path(folder))}
    write("overhead", told, options.json)


if __name__ == "__main__":
    main()
