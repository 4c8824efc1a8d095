"""What each page takes for granted when its code runs (`PRELUDES`), and what must be true of it afterwards (`AFTER`).

A page is named by its path from the root of the repository. A prelude returns names; it may write files into the working directory.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from adopted import adopting, after_adopting
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import foreshock

ROOT = Path(__file__).parents[1]
Names = dict[str, Any]
VOCABULARY = 64


class Attention(nn.Module):
    """Four heads, causal, as a model of anybody's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def fit(model: Any, steps: int = 12) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.randn(2, 6, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def training() -> Names:
    return {"torch": torch, "foreshock": foreshock, "model": Attention(), "train": fit, "save_checkpoint": print}


def own_ops() -> ModuleType:
    """`examples/custom_pattern.py`, which registers the ops ``mylib::attend`` and ``mylib::route``; once a process."""
    if (module := sys.modules.get("custom_pattern")) is None:
        spec = importlib.util.spec_from_file_location("custom_pattern", ROOT / "examples/custom_pattern.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["custom_pattern"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def readme() -> Names:
    own_ops()
    return training()


def stored() -> Names:
    """A run in the folder that pages read."""
    with foreshock.Watch("runs/exp1", every=1, monitors="all") as watch:
        fit(torch.compile(Attention(), backend=watch.backend), 3)
    return {}


def families() -> Names:
    stored()
    run = foreshock.open_run("runs/exp1")
    return {"foreshock": foreshock, "run": run, "site": run.sites[0]}


def resume() -> Names:
    from torch.distributed import checkpoint

    watch, model = foreshock.Watch("runs/resumed"), Attention()
    optimizer = fit(torch.compile(model, backend=watch.backend))
    states = {"model_state": model.state_dict(), "optimizer_state": optimizer.state_dict()}
    for rank in range(2):
        torch.save(watch.state_dict(), f"watch.{rank}.pt")
    return {"torch": torch, "dcp": checkpoint, "watch": watch, "model": model, "optimizer": optimizer, **states} | {
        "path": "checkpoint.pt",
        "folder": "checkpoint",
    }


def scan() -> Names:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 16}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    Path("config.json").write_text(json.dumps(config.to_dict()))
    for step in (1000, 2000):
        torch.save(LlamaForCausalLM(config).state_dict(), f"step-{step}.pt")
    return {"foreshock": foreshock}


def sinks() -> Names:
    posted: list[tuple[str, str]] = []
    return {"foreshock": foreshock, "posted": posted, "post": lambda *sent: posted.append(sent)}


CHOICES = {
    "README.md"
}  # pages of which each block begins anew: "one of" these ways; each model is trained a little afterwards
SCRIPTS = {"docs/adopting.md"}  # pages of which each block is a script by itself: names that two of them import are two
JOBS = {"docs/resume.md"}  # pages that take a process group for granted
PRELUDES: dict[str, Callable[[], Names]] = {
    "README.md": readme,
    "docs/adopting.md": adopting,
    "docs/concepts.md": training,
    "docs/cost.md": training,
    "docs/families.md": families,
    "docs/index.md": training,
    "docs/patterns.md": lambda: {"mylib": own_ops()},
    "docs/resume.md": resume,
    "docs/scan.md": scan,
    "docs/sinks.md": sinks,
    "docs/what_now.md": stored,
}


def after_readme(names: Names, printed: str) -> None:
    registered = importlib.import_module("foreshock.patterns.find")._registered
    assert {pattern.name for pattern in registered} >= {"mylib::attend", "mylib::route"}
    assert names["watch"].sites[0].heads == foreshock.default_watch().sites[0].heads == 4


def after_index(names: Names, printed: str) -> None:
    assert names["watch"].sites[0].heads == 4


def after_acting(names: Names, printed: str) -> None:
    assert printed.splitlines()[-1] == "checkpoint-15 True ['checkpoint-25', 'checkpoint-30']"
    assert names["watch"].coverage.warnings == ()


def after_families(names: Names, printed: str) -> None:
    assert names["q"].shape == names["out"].shape == (len(names["steps"]), 4)


def after_patterns(names: Names, printed: str) -> None:
    assert {"ATTEND", "ROUTE", "rms_norm", "my_attention", "NORM", "DETECTORS"} <= set(names)


def after_resume(names: Names, printed: str) -> None:
    assert names["watch"].step == 12


def after_scan(names: Names, printed: str) -> None:
    assert names["found"].sites[0].changes[0]["attention/delta2_norm"].shape == (4,)


def after_sinks(names: Names, printed: str) -> None:
    said: Names = {"site": None, "metric": "run/loss", "value": 9.0, "expected": "about 1", "severity": "warning"}
    chat = names["Chat"]()
    chat.alarm(foreshock.Alarm(step=2, onset=1, mechanism="an example", evidence=(), message="hear, hear", **said))
    chat.close()
    assert names["posted"] == [("https://chat.example/hook", "hear, hear")]


def after_start(names: Names, printed: str) -> None:
    losses = printed.split("loss ")[1:]
    assert losses[0][:5] == losses[1][:5]
    assert "attention:model.layers.0.self_attn 4 heads" in printed
    assert names["values"].shape == (12, 2)
    assert names["values"].max() < 6.1e-5


AFTER: dict[str, Callable[[Names, str], None]] = {
    "README.md": after_readme,
    "docs/acting.md": after_acting,
    "docs/adopting.md": after_adopting,
    "docs/families.md": after_families,
    "docs/index.md": after_index,
    "docs/patterns.md": after_patterns,
    "docs/resume.md": after_resume,
    "docs/scan.md": after_scan,
    "docs/sinks.md": after_sinks,
    "docs/start.md": after_start,
}
