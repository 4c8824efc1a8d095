"""What docs/adopting.md takes for granted, and each of its functions called on a tiny model; for tests/preludes.py."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foreshock

EXAMPLES = Path(__file__).parents[1] / "examples"
Names = dict[str, Any]


class _MetricsProcessor:
    @dataclass(kw_only=True, slots=True)
    class Config:
        log_freq: int = 10
        enable_tensorboard: bool = False


class _Trainer:
    @dataclass(kw_only=True, slots=True)
    class Config:
        compile: Any
        metrics: Any


def adopting() -> Names:
    """torchtitan has an environment of its own (`make test-torchtitan`), where the real one runs the page; here it is names."""
    os.environ["FORESHOCK_INNER"] = "eager"  # four models: the compiler is not the point; the test puts it back
    made = {
        "components.metrics": {"MetricsProcessor": _MetricsProcessor},
        "tools.logging": {"logger": logging.getLogger("torchtitan")},
        "trainer": {"Trainer": _Trainer},
        "models.llama3.config_registry": {
            "llama3_debugmodel": lambda: _Trainer.Config(compile=types.SimpleNamespace(), metrics=None)
        },
    }
    for name, members in made.items():
        parts = ["torchtitan", *name.split(".")]
        for depth in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:depth]), types.ModuleType(parts[depth - 1]))
        vars(sys.modules[".".join(parts)]).update(members)
    return {}


def after_adopting(names: Names, printed: str) -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries
            for check in (_trainer, _lightning, _accelerate, _fabric, _torchtitan):
                check(names)
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in [n for n in sys.modules if n.startswith(("torchtitan", "foreshock.integrations.torchtitan"))]:
            del sys.modules[name]


def _sites(run: str) -> list[str]:
    with foreshock.open_run(run) as kept:
        assert kept.series("run/loss")[0][0] == 0
        return [site.name for site in kept.sites]


def _trainer(names: Names) -> None:
    trainer = importlib.import_module("huggingface_trainer").make(Path("trained"), 2, logging_steps=1)
    names["train"](trainer)
    assert _sites("runs/exp1") == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert any("foreshock/law/key_shift" in name for entry in trainer.state.log_history for name in entry)


def _lightning(names: Names) -> None:
    module = importlib.import_module("lightning_callback")
    loader = module.DataLoader(module.windows(module.LENGTH + 1)[:16], batch_size=8)
    names["fit"](module.Language(None), loader)
    assert _sites("runs/exp2") == ["model.layers.0.attention", "model.layers.1.attention"]


def _accelerate(names: Names) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    module = importlib.import_module("accelerate_loop")
    batches = module.windows(module.LENGTH)[:16].split(8)
    model, loader = module.small_llama(), [{"input_ids": tokens, "labels": tokens} for tokens in batches]
    with foreshock.Watch(every=1) as watch:
        optimizer = module.torch.optim.AdamW(model.parameters())
        names["train_accelerated"](Accelerator(cpu=True), model, optimizer, loader, watch)
        assert (watch.step, len(watch.sites)) == (2, 2)
    assert Path("checkpoint").is_dir()
    AcceleratorState._reset_state(reset_partial_state=True)


def _fabric(names: Names) -> None:
    module = importlib.import_module("fabric_loop")
    model = module.Transformer(module.Config(layers=1, hidden=32, experts=0, width=64, length=module.LENGTH))
    loader = module.DataLoader(module.windows(module.LENGTH + 1)[:16], batch_size=8)
    with foreshock.Watch(every=1) as watch:
        optimizer = module.torch.optim.AdamW(model.parameters())
        names["train_with_fabric"](module.Fabric(accelerator="cpu"), model, optimizer, loader, watch)
        assert (watch.step, len(watch.sites)) == (2, 1)
    with foreshock.Watch() as resumed:
        module.Fabric(accelerator="cpu").load("checkpoint.ckpt", {"watch": resumed})
        assert resumed.step == 2


def _torchtitan(names: Names) -> None:
    config = names["llama3_watched"]()
    assert type(config).__qualname__ == "ForeshockTrainer.Config"
    assert (config.compile.backend, config.metrics.readings) == ("foreshock", ["law/euler"])
