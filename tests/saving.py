"""Small models, and how they are saved: what tests of `foreshock scan` read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp

from foreshock import models, scanning
from foreshock.scanning import Scan

transformers = pytest.importorskip("transformers")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 4, 2, 8, 2
VALUES = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 64,
}

_captured: dict[tuple[str, ...], Any] = {}


def capture_each_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capturing takes a second; the same config and callable give the same module and sites."""

    def captured(target: str, args: Sequence[str]) -> Any:
        key = (Path(target).read_text(), *args)
        if key not in _captured:
            _captured[key] = models.captured(target, args)
        return _captured[key]

    monkeypatch.setattr(scanning, "captured", captured)


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**VALUES, architectures=["LlamaForCausalLM"]))


def mixtral() -> Any:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**VALUES, num_local_experts=4, num_experts_per_tok=2)
    )


def moved(model: Any, size: float = 1e-3) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def pretrained(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def sharded(model: Any, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="10KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def pickled(model: Any, path: Path) -> Path:
    path.mkdir()
    state = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    trained = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "step": 3, "args": {"lr": 1e-3}}
    torch.save({"model": state, **trained}, path / "model.pt")
    model.config.save_pretrained(path)
    return path / "model.pt"


def distributed(model: Any, path: Path) -> Path:
    state = {"model": model.state_dict(), "ema": torch.zeros(5), "step": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process, which is what is asked for
        dcp.save(state, checkpoint_id=path, no_dist=True)
    model.config.save_pretrained(path)
    return path


FORMATS = [pretrained, sharded, pickled, distributed]
Save = Callable[[Any, Path], Path]


def values(found: Scan) -> dict[tuple[str, str, int], np.ndarray[Any, Any]]:
    return {
        (scanned.site.id, metric, place): numbers
        for scanned in found.sites
        for states in (scanned.standing, scanned.changes)
        for place, state in enumerate(states)
        for metric, numbers in state.items()
    }


def saved(tmp_path: Path, state: dict[str, Any], name: str = "x.pt") -> Path:
    llama().config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / name)
    return tmp_path / name
