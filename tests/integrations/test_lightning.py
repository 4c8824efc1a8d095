"""PyTorch Lightning and Fabric, the real ones: a broken kernel in the logger's own file, a healthy run without alarms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint

import foreshock
from foreshock.demo import data, kernel
from foreshock.demo.model import Config, Transformer
from foreshock.demo.rounding import Rounding

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
]


@pytest.fixture
def module(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("lightning_callback")


def test_a_broken_kernel_stands_in_the_loggers_file_and_stops_the_trainer(module: ModuleType, tmp_path: Path) -> None:
    trainer, watch = module.train(tmp_path, 40, breaks=15)
    (row,) = module.logged(tmp_path)
    assert (row["foreshock/alarms"], row["foreshock/onset"], row["step"]) == ("1", "15", "17")
    assert float(row["foreshock/low-precision attention kernel"]) == 1
    assert "foreshock/law/euler/attention:model.layers.0.attention/max" in row
    assert trainer.global_step == watch.step == 17
    assert list(watch_series(tmp_path, "run/loss")) == list(range(17))


def watch_series(folder: Path, metric: str, site: str | None = None) -> dict[int, Any]:
    with foreshock.open_run(folder / "run") as run:
        steps, values = run.series(metric, site)
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def test_a_healthy_run_raises_none_and_resumes_with_its_watch(module: ModuleType, tmp_path: Path) -> None:
    """Validation runs between, eagerly. The second half's batches are others than those of a run that was never stopped."""
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=20, save_top_k=-1)
    options = {"callbacks": [save], "enable_checkpointing": True, "limit_val_batches": 1, "val_check_interval": 7}
    trained = [module.train(tmp_path, 20, **options)]
    trained.append(module.train(tmp_path, 40, resume=tmp_path / "saved" / "step=20.ckpt", **options))
    assert [(trainer.global_step, watch.step, watch.alarms) for trainer, watch in trained] == [
        (20, 20, []),
        (40, 40, []),
    ]
    assert module.logged(tmp_path) == []
    assert list(watch_series(tmp_path, "law/euler", "attention:model.layers.1.attention")) == list(range(0, 40, 5))
    assert [status.evaluations for status in trained[0][1].coverage] == [20, 20]
    saved = torch.load(tmp_path / "saved" / "step=20.ckpt", weights_only=True)
    assert "ForeshockCallback" in saved["callbacks"]


@pytest.mark.parametrize("broken", [True, False])
def test_fabric_takes_the_backend_and_saves_the_watch(tmp_path: Path, broken: bool) -> None:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu")
    batches = data.standard_library(cap=200_000).batches(seed=0, batch=8, length=65)
    model = Transformer(Config(layers=1, hidden=32, experts=0, width=64))
    with foreshock.Watch(every=5, on_alarm="stop") as watch:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        compiled, optimizer = fabric.setup(torch.compile(model, backend=watch.backend), optimizer)
        for step in range(30):
            kernel.set_fault(kernel.Fault(out=Rounding(bits=1)) if broken and step >= 15 else kernel.HEALTHY)
            loss = compiled(next(batches))[0]
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if watch.stop_requested:
                break
        fabric.save(tmp_path / "saved.ckpt", {"model": compiled, "watch": watch})
        assert (watch.step, bool(watch.alarms)) == ((17, True) if broken else (30, False))
    with foreshock.Watch(every=5) as resumed:
        fabric.load(tmp_path / "saved.ckpt", {"model": compiled, "watch": resumed})
        assert resumed.step == watch.step
