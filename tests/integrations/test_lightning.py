"""PyTorch Lightning, the real one: a broken kernel in the logger's own file, a healthy run without alarms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import foreshock

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
