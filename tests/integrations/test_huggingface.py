"""The Hugging Face Trainer, the real one: a broken kernel in its log and its checkpoints, and a healthy run without alarms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import foreshock
from foreshock.integrations.huggingface import ForeshockCallback


@pytest.fixture
def module(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("huggingface_trainer")


def alarms(trainer: transformers.Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "foreshock/alarms" in entry]


def test_a_broken_kernel_stands_in_the_trainers_log_and_stops_it(module: ModuleType, tmp_path: Path) -> None:
    trainer = module.make(tmp_path, 40, breaks=15)
    watch = module.train(trainer, tmp_path / "run")
    (entry,) = alarms(trainer)
    assert entry["foreshock/mechanism"] == "low-precision attention kernel"
    assert entry["foreshock/site"].startswith("attention:model.layers.")
    assert entry["foreshock/onset"] == 15
    assert entry["foreshock/low-precision attention kernel"] == 1
    assert trainer.state.global_step == entry["step"] == watch.step == 17
    checkpoint = tmp_path / "checkpoints" / "checkpoint-17"
    assert alarms(trainer) == [e for e in history(checkpoint) if "foreshock/alarms" in e]
    readings = [entry for entry in trainer.state.log_history if any("law/euler" in name for name in entry)]
    assert [entry["step"] for entry in readings] == [10]
    assert {name.rsplit("/", 1)[1] for name in readings[0] if "law/euler" in name} == {"mean", "max"}
    with foreshock.open_run(tmp_path / "run") as kept:
        assert list(kept.series("run/loss")[0]) == [9]
        assert {site.name for site in kept.sites} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}


def history(checkpoint: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return found


def test_a_healthy_run_raises_none_and_resumes_with_its_watch(module: ModuleType, tmp_path: Path) -> None:
    every = {"save_steps": 10, "logging_steps": 5}
    trainer = module.make(tmp_path / "whole", 20, **every)
    assert module.train(trainer, tmp_path / "whole" / "run").alarms == alarms(trainer) == []
    module.train(module.make(tmp_path / "parts", 10, **every), tmp_path / "parts" / "run")
    torch._dynamo.reset()
    trainer = module.make(tmp_path / "parts", 20, **every)
    second = module.train(trainer, tmp_path / "parts" / "run", resume=True)
    assert trainer.state.global_step == second.step == 20
    assert alarms(trainer) == second.alarms == []
    with foreshock.open_run(tmp_path / "whole" / "run") as one, foreshock.open_run(tmp_path / "parts" / "run") as other:
        assert list(other.series("run/loss")[0]) == list(one.series("run/loss")[0]) == [4, 9, 14, 19]
        for site in one.sites:
            (steps, values), (again, resumed) = (r.series("law/euler", site.id) for r in (one, other))
            assert list(steps) == list(again) == list(range(0, 20, 5))
            assert values.tolist() == resumed.tolist()


def test_accumulation_evaluation_autocast_and_one_class_of_layers(module: ModuleType, tmp_path: Path) -> None:
    """Evaluation is eager, so that nothing is captured for it; the clock counts optimizer steps."""
    options = {"gradient_accumulation_steps": 2, "bf16": True, "save_strategy": "no"}
    trainer = module.make(tmp_path, 6, **options)
    watch = module.train(trainer, tmp_path / "run", compile="LlamaDecoderLayer")
    assert watch.step == trainer.state.global_step == 6
    assert [(s.site.name, s.evaluations, s.sampled) for s in watch.coverage] == [
        (f"model.layers.{i}.self_attn", 12, 4) for i in (0, 1)
    ]
    trainer.evaluate(trainer.train_dataset[:4])
    assert sum(status.evaluations for status in watch.coverage) == 24


def test_what_cannot_be_is_said(module: ModuleType, tmp_path: Path, warnings_logged: Callable[[], list[str]]) -> None:
    with pytest.raises(foreshock.ConfigError, match="leave torch_compile out"):
        module.train(module.make(tmp_path, 2, torch_compile=True), tmp_path / "run")
    with foreshock.Watch() as watch:
        ForeshockCallback(module.make(tmp_path, 2), watch).resume(tmp_path / "nowhere")
    assert any("loading the watch's state from" in line for line in warnings_logged())
