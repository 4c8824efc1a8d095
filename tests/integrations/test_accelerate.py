"""Accelerate, the real one: a broken kernel reaches its trackers, the watch's state its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker

import foreshock
from foreshock.demo import data, kernel
from foreshock.demo.model import Config, Transformer
from foreshock.demo.rounding import Rounding
from foreshock.integrations.accelerate import connect


class Tracker(GeneralTracker):
    """Keeps what an Accelerator logs."""

    name = "kept"
    requires_logging_directory = False
    tracker: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int | None, **kwargs: Any) -> None:
        self.rows.append((step, values))

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(accelerator: Accelerator, watch: foreshock.Watch, in_place: bool) -> tuple[Any, Any]:
    """The two ways that the documentation shows."""
    model = Transformer(Config(layers=1, hidden=32, experts=0, width=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if in_place:
        model, optimizer = accelerator.prepare(model, optimizer)
        model.compile(backend=watch.backend)
        return model, optimizer
    made: tuple[Any, Any] = accelerator.prepare(torch.compile(model, backend=watch.backend), optimizer)
    return made


def test_a_broken_kernel_stands_in_accelerates_tensorboard(
    example: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = example("accelerate_loop")
    watch = module.train(tmp_path, 30, 15)
    ((step, message),) = module.logged(tmp_path)
    assert step == watch.step == 16
    assert message.startswith("low-precision attention kernel at model.layers.0.self_attn")


@pytest.mark.parametrize(("in_place", "broken"), [(True, True), (True, False), (False, True)])
def test_alarms_reach_the_trackers_and_states_the_checkpoints(tmp_path: Path, in_place: bool, broken: bool) -> None:
    torch.manual_seed(0)
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=[tracker], gradient_accumulation_steps=2)
    accelerator.init_trackers("project")
    batches = data.standard_library(cap=200_000).batches(seed=0, batch=4, length=65)
    with foreshock.Watch(every=5, on_alarm="stop") as watch:
        model, optimizer = prepared(accelerator, watch, in_place)
        tell = connect(accelerator, watch, metrics=["law/eul*"])
        for batch in range(60):
            kernel.set_fault(kernel.Fault(out=Rounding(bits=1)) if broken and batch >= 30 else kernel.HEALTHY)
            with accelerator.accumulate(model):
                accelerator.backward(model(next(batches))[0])
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                tell()
                if watch.stop_requested:
                    break
        accelerator.save_state(str(tmp_path))
    alarms = [(step, row) for step, row in tracker.rows if "foreshock/alarms" in row]
    assert [(step, row["foreshock/onset"], row["foreshock/mechanism"]) for step, row in alarms] == (
        [(17, 15, "low-precision attention kernel")] if broken else []
    )
    readings = [step for step, row in tracker.rows if any("law/euler/" in name for name in row)]
    assert readings == ([2, 7, 12, 17] if broken else [2, 7, 12, 17, 22, 27])
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed, again = foreshock.Watch(), Accelerator(cpu=True)
    prepared(again, resumed, in_place)
    connect(again, resumed)
    again.load_state(str(tmp_path), load_kwargs={"weights_only": True})
    assert resumed.step == watch.step == (17 if broken else 30)
    resumed.close()
