"""A loop of Lightning Fabric, watched: a small transformer on Python's own sources, whose attention kernel breaks at a step.

python examples/fabric_loop.py              # the alarm stands in the logger's metrics.csv, and the loop stops
python examples/fabric_loop.py --healthy    # nothing is heard
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from torch.utils.data import DataLoader

import foreshock
from foreshock.demo.lent import set_broken, windows
from foreshock.demo.model import Config, Transformer
from foreshock.integrations.fabric import connect

LENGTH = 64


def train(folder: Path, steps: int, breaks: int | None = None) -> foreshock.Watch:
    """Train up to step ``steps``, and save; from step ``breaks`` on the kernel is broken."""
    fabric = Fabric(accelerator="cpu", loggers=CSVLogger(folder, name="log", version=0))
    fabric.seed_everything(0, verbose=False)
    model = Transformer(Config(layers=2, hidden=32, experts=0, width=64, length=LENGTH))
    loader = fabric.setup_dataloaders(DataLoader(windows(LENGTH + 1), batch_size=8, shuffle=True, drop_last=True))
    # Inductor, the default, would take a minute or two to compile.
    with foreshock.Watch(folder / "run", every=5, inner="eager", on_alarm="stop") as watch:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer = fabric.setup(torch.compile(model, backend=watch.backend), optimizer)
        tell = connect(fabric, watch, metrics=["law/euler"])
        for step, tokens in zip(range(steps), loader, strict=False):
            set_broken(breaks is not None and step >= breaks)
            loss, _ = model(tokens)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            watch.log(loss=loss)
            tell()
            if watch.stop_requested:
                break
        watch.flush()
        tell()
        fabric.save(folder / "saved.ckpt", {"model": model, "watch": watch})
    fabric.logger.finalize(
        "success"
    )  # the file of a CSVLogger is written every hundred steps, behind an alarm, and now
    return watch


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of the logger's file that tell of an alarm."""
    with (folder / "log" / "version_0" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("foreshock/alarms")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/fabric"))
    parser.add_argument("--healthy", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    chosen = parser.parse_args()
    watch = train(chosen.folder, chosen.steps, None if chosen.healthy else chosen.steps // 2)
    for row in logged(chosen.folder):
        print(f"in the logger's file, step {row['step']}: an alarm since step {row['foreshock/onset']}")
    print(f"{watch.step} steps, {len(watch.alarms)} alarms; next: foreshock report {chosen.folder / 'run'}")
