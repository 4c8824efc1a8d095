"""Whether a budget holds: what a watched training takes beyond a plain one beside it, and what its watch says that it takes.

    python benchmarks/budget.py [--budget 0.005] [--every 1] [--turns 8] [--json FOLDER]

A Llama of two layers of width 256 on 256 tokens is trained twice under inductor, plain and watched, in turns of 20 steps. What a
step takes beyond plain inductor's is the processor's time, without the watch's own word; 16 turns each make a line, beside which
stands how far apart samples and spectra are by then, and which share the watch itself has measured last.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from families import model_of
from measuring import interleaved, ratio, where, write
from rich.console import Console
from rich.table import Table
from torch import nn
from trained import Trained, Way

from foreshock.cost import SAMPLING, SPECTRA

BLOCK, BLOCKS = 20, 16  # steps, and how many of these a turn has


def llama() -> tuple[nn.Module, Any]:
    tokens = torch.randint(256, (2, 128), generator=torch.Generator().manual_seed(1))
    return model_of("Llama", 256), lambda run: run(input_ids=tokens, labels=tokens).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.005)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--json", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, rows = Console(width=120), list[dict[str, Any]]()
    console.print(" ".join(f"{key} {value}" for key, value in where().items()))
    table = Table("steps", "ms plain", "of plain", "samples apart", "spectra apart", "the watch says")
    with tempfile.TemporaryDirectory() as folder:
        way = Way({"every": options.every, "budget": options.budget})
        plain, watched = Trained(llama, Way()), Trained(llama, way, Path(folder) / "run")
        assert watched.watch is not None
        for trained in (plain, watched):
            for _ in range(2 * BLOCK):  # both variants compile
                trained.step()
        for _ in range(options.turns):
            taken = interleaved({"plain": (plain.step, BLOCK), "watched": (watched.step, BLOCK)}, BLOCKS)
            pace, found = watched.watch.pace, ratio(taken["watched"], taken["plain"])
            shares = pace.shares()
            row: dict[str, Any] = {"steps": watched.watch.step, "ms": 1e3 * float(sorted(taken["plain"])[BLOCKS // 2])}
            row |= {"ratio": found, "periods": dict(pace.periods), "shares": shares and dict(shares)}
            rows.append(row)
            told = "" if shares is None else f"{sum(shares.values()):.2%}"
            apart = (str(pace.periods[name]) for name in (SAMPLING, SPECTRA))
            table.add_row(f"{row['steps']:,}", f"{row['ms']:.1f}", str(found), *apart, told)
        watched.close()
    console.print(table)
    console.print(
        f"budget {options.budget:.2%} of a plain step, every={options.every} asked for; brackets: {found.words}"
    )
    write("budget", {"rows": rows}, options.json)


if __name__ == "__main__":
    main()
