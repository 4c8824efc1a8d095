"""What there is to say about a family of models: how to build a tiny one, what it takes, and what is in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 2, 4, 2, 8
EXPERTS, TOP_K = 4, 2

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tokens(generator: torch.Generator, length: int = 16, sequences: int = 2) -> dict[str, Tensor]:
    """Random tokens with themselves as labels: a model's inputs."""
    drawn = torch.randint(3, VOCABULARY, (sequences, length), generator=generator)
    return {"input_ids": drawn, "labels": drawn}


def images(generator: torch.Generator) -> dict[str, Tensor]:
    """Random images of 4 x 4 patches, of either of two classes."""
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "labels": torch.tensor([0, 1])}


def pairs(generator: torch.Generator) -> dict[str, Any]:
    """Random images with random texts, to be told from each other."""
    texts, pictures = tokens(generator), images(generator)
    return {"input_ids": texts["input_ids"], "pixel_values": pictures["pixel_values"], "return_loss": True}


def speech(generator: torch.Generator) -> dict[str, Tensor]:
    """Random spectrograms with tokens as labels."""
    return {"input_features": torch.randn(2, 16, 64, generator=generator), "labels": tokens(generator)["labels"]}


@dataclass(frozen=True)
class Router:
    """What a family's routers look like; ``weights`` are parameter names with ``{}`` for the layer."""

    weights: tuple[str, ...] = ("model.layers.{}.mlp.gate.weight",)
    scoring: str = "softmax"
    layers: tuple[int, ...] = (0, 1)
    experts: int = EXPERTS
    top_k: int = TOP_K
    facts: Mapping[str, Any] = field(default_factory=dict)

    def names(self) -> list[str]:
        return sorted(weight.format(layer) for weight in self.weights for layer in self.layers)


@dataclass(frozen=True)
class Family:
    """How to build a family's tiny model, and what is in it.

    ``sites`` are its attention modules, with ``{}`` for the layer; ``q`` and ``k`` name the parameters behind one module's heads,
    and ``width`` is how many channels of a head they make. ``facts`` are further fields of each site. ``runs`` is how often a
    site runs in one forward pass, ``inputs`` makes the inputs of one, and ``breaks`` says that the library breaks its graph
    within layers, where only `Watch.bind` knows full names.
    """

    config: str
    values: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    sites: tuple[str, ...] = ("model.layers.{}.self_attn",)
    q: tuple[str, ...] = ("q_proj.weight",)
    k: tuple[str, ...] = ("k_proj.weight",)
    kv_heads: int = KV_HEADS
    head_dim: int = HEAD_DIM
    value_dim: int = HEAD_DIM
    width: int = HEAD_DIM
    layers: tuple[int, ...] = (0, 1)
    facts: Mapping[str, Any] = field(default_factory=dict)
    runs: int = 1
    breaks: bool = False
    router: Router | None = None
    inputs: Callable[[torch.Generator], dict[str, Any]] = tokens

    def make(self, **values: Any) -> Any:
        given = {key: value for key, value in {**COMMON, **self.values, **values}.items() if value is not None}
        config = getattr(transformers, f"{self.config}Config")(**given)
        return getattr(transformers, self.model or f"{self.config}ForCausalLM")(config)

    def weights(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Full names of the parameters behind the queries and the keys, by site."""
        paths = [site.format(layer) for site in self.sites for layer in self.layers]
        return {path: (_under(path, self.q), _under(path, self.k)) for path in paths}


def _under(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in names)
