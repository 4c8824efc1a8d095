"""PyTorch Lightning watched by a callback: a small transformer on Python's own sources, whose attention kernel breaks at a step.

python examples/lightning_callback.py              # the alarm stands in the logger's metrics.csv, and the Trainer stops
python examples/lightning_callback.py --healthy    # nothing is heard
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import foreshock
from foreshock.demo.lent import set_broken, windows
from foreshock.demo.model import Config, Transformer
from foreshock.integrations.lightning import ForeshockCallback

LENGTH = 64


class Language(pl.LightningModule):
    """The demo's byte-level transformer, which calls a kernel of its own. It breaks in the step ``breaks``."""

    def __init__(self, breaks: int | None) -> None:
        super().__init__()
        self.model = Transformer(Config(layers=2, hidden=32, experts=0, width=64, length=LENGTH))
        self.breaks = breaks
        set_broken(False)

    def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        if self.global_step == self.breaks:
            set_broken(True)
        return self.model(tokens)[0]

    def validation_step(self, tokens: torch.Tensor, index: int) -> None:
        self.log("validation", self.model(tokens)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(
    folder: Path,
    steps: int,
    breaks: int | None = None,
    resume: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    **options: Any,
) -> tuple[pl.Trainer, foreshock.Watch]:
    """Train up to step ``steps``; ``options`` are the Trainer's."""
    pl.seed_everything(0, verbose=False)
    text = windows(LENGTH + 1)
    # Inductor, the default, would take a minute or two to compile.
    with foreshock.Watch(folder / "run", every=5, inner="eager", on_alarm="stop") as watch:
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[ForeshockCallback(watch, metrics=["law/euler"]), *callbacks],
            logger=CSVLogger(folder, name="log", version=0),
            log_every_n_steps=10,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"limit_val_batches": 0, "enable_checkpointing": False, **options},
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            loaders = DataLoader(text, batch_size=8, shuffle=True), DataLoader(text[:8], batch_size=8)
            trainer.fit(Language(breaks), *loaders, ckpt_path=resume)
    return trainer, watch


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of the logger's file that tell of an alarm."""
    with (folder / "log" / "version_0" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("foreshock/alarms")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--healthy", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    chosen = parser.parse_args()
    trainer, watch = train(chosen.folder, chosen.steps, None if chosen.healthy else chosen.steps // 2)
    for row in logged(chosen.folder):
        print(f"in the logger's file, step {row['step']}: an alarm since step {row['foreshock/onset']}")
    print(f"{watch.step} steps, {len(watch.alarms)} alarms; next: foreshock report {chosen.folder / 'run'}")
