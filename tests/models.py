"""Tiny random models of the families people train, by name, and what foreshock has to find in each. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

transformers.logging.set_verbosity_error()

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 2, 4, 2, 8
EXPERTS, TOP_K = 4, 2

_COMMON = {
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
_HEAD_DIM = {"head_dim": HEAD_DIM}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": HIDDEN}
_GROUPS = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": HIDDEN,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Router:
    """What a family's routers look like; ``weight`` is a parameter name with ``{}`` for the layer."""

    weight: str = "model.layers.{}.mlp.gate.weight"
    scoring: str = "softmax"
    layers: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class Family:
    """How to build a family's tiny model, and what is in it: ``q`` and ``k`` name the parameters behind one layer's heads."""

    config: str
    values: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    layer: str = "model.layers.{}.self_attn"
    q: tuple[str, ...] = ("q_proj.weight",)
    k: tuple[str, ...] = ("k_proj.weight",)
    kv_heads: int = KV_HEADS
    layers: tuple[int, ...] = (0, 1)
    router: Router | None = None

    def make(self, **values: Any) -> Any:
        config = getattr(transformers, f"{self.config}Config")(**{**_COMMON, **self.values, **values})
        return getattr(transformers, self.model or f"{self.config}ForCausalLM")(config)

    def weights(self, layer: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Full names of the parameters behind the queries and the keys of ``layer``."""
        path = self.layer.format(layer)
        return tuple(f"{path}.{name}" for name in self.q), tuple(f"{path}.{name}" for name in self.k)


_NORMED: dict[str, Any] = {
    "q": ("q_proj.weight", "q_norm.weight"),
    "k": ("k_proj.weight", "k_norm.weight"),
}

_LAYERNORMED: dict[str, Any] = {
    "q": ("q_proj.weight", "query_layernorm.weight"),
    "k": ("k_proj.weight", "key_layernorm.weight"),
}


def _fused(name: str, kv_heads: int = HEADS) -> dict[str, Any]:
    return {"q": (name,), "k": (name,), "kv_heads": kv_heads}


FAST: dict[str, Family] = {
    "llama": Family("Llama"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", _HEAD_DIM, **_NORMED),
    "gpt2": Family("GPT2", model="GPT2LMHeadModel", layer="transformer.h.{}.attn", **_fused("c_attn.weight")),
    "gpt_neox": Family("GPTNeoX", layer="gpt_neox.layers.{}.attention", **_fused("query_key_value.weight")),
    "phi3": Family("Phi3", **_fused("qkv_proj.weight", KV_HEADS)),
    "mistral": Family("Mistral"),
    "mixtral": Family("Mixtral", _LOCAL, router=Router()),
    "qwen3_moe": Family("Qwen3Moe", {**_HEAD_DIM, **_EXPERTS}, **_NORMED, router=Router()),
    "olmoe": Family("Olmoe", _EXPERTS, **_NORMED, router=Router()),
    "gemma": Family("Gemma", _HEAD_DIM),
    "glm4_moe": Family("Glm4Moe", {**_HEAD_DIM, **_GROUPS}, router=Router(scoring="sigmoid", layers=(1,))),
}

SLOW: dict[str, Family] = {
    "apertus": Family("Apertus", **_NORMED),
    "arcee": Family("Arcee"),
    "bert": Family(
        "Bert",
        model="BertForMaskedLM",
        layer="bert.encoder.layer.{}.attention.self",
        q=("query.weight",),
        k=("key.weight",),
        kv_heads=HEADS,
    ),
    "cohere": Family("Cohere"),
    "cohere2": Family("Cohere2"),
    "dots1": Family("Dots1", {**_HEAD_DIM, **_GROUPS}, **_NORMED, router=Router(scoring="sigmoid", layers=(1,))),
    "ernie4_5": Family("Ernie4_5", _HEAD_DIM),
    "ernie4_5_moe": Family(
        "Ernie4_5_Moe", {"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_layer_start_index": 0}, router=Router()
    ),
    "exaone4": Family("Exaone4", **_NORMED),
    "falcon": Family("Falcon", layer="transformer.h.{}.self_attention", **_fused("query_key_value.weight", 1)),
    "flex_olmo": Family("FlexOlmo", _EXPERTS, **_NORMED, router=Router()),
    "gemma3": Family("Gemma3Text", {**_HEAD_DIM, "query_pre_attn_scalar": 8}, "Gemma3ForCausalLM", **_NORMED),
    "glm": Family("Glm", _HEAD_DIM),
    "glm4": Family("Glm4", _HEAD_DIM),
    "gpt_bigcode": Family("GPTBigCode", layer="transformer.h.{}.attn", **_fused("c_attn.weight", 1)),
    "granite": Family("Granite"),
    "granitemoe": Family("GraniteMoe", _LOCAL, router=Router("model.layers.{}.block_sparse_moe.router.weight")),
    "helium": Family("Helium", _HEAD_DIM),
    "hunyuan": Family("HunYuanDenseV1", _HEAD_DIM, **_LAYERNORMED),
    "hunyuan_moe": Family(
        "HunYuanMoEV1",
        {**_HEAD_DIM, "num_experts": EXPERTS, "moe_topk": TOP_K},
        **_LAYERNORMED,
        router=Router("model.layers.{}.mlp.gate.wg.weight"),
    ),
    "lfm2": Family(
        "Lfm2",
        {"layer_types": ["full_attention"] * LAYERS},
        q=("q_proj.weight", "q_layernorm.weight"),
        k=("k_proj.weight", "k_layernorm.weight"),
    ),
    "llama4": Family(
        "Llama4Text",
        {**_HEAD_DIM, **_LOCAL, "intermediate_size_mlp": 32},
        "Llama4ForCausalLM",
        router=Router("model.layers.{}.feed_forward.router.weight", "sigmoid"),
    ),
    "minimax": Family("MiniMax", _LOCAL, layers=(0,), router=Router()),
    "minimax_m2": Family("MiniMaxM2", {**_HEAD_DIM, **_LOCAL}, **_NORMED, router=Router(scoring="sigmoid")),
    "modernbert": Family(
        "ModernBert", model="ModernBertForMaskedLM", layer="model.layers.{}.attn", **_fused("Wqkv.weight")
    ),
    "nemotron": Family("Nemotron"),
    "olmo": Family("Olmo"),
    "olmo2": Family("Olmo2", **_NORMED),
    "olmo3": Family("Olmo3", **_NORMED),
    "opt": Family(
        "OPT",
        {"ffn_dim": HIDDEN, "word_embed_proj_dim": HIDDEN},
        layer="model.decoder.layers.{}.self_attn",
        kv_heads=HEADS,
    ),
    "persimmon": Family(
        "Persimmon",
        q=("query_key_value.weight", "q_layernorm.weight"),
        k=("query_key_value.weight", "k_layernorm.weight"),
        kv_heads=HEADS,
    ),
    "phi": Family("Phi"),
    "qwen2_moe": Family("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": HIDDEN}, router=Router()),
    "roberta": Family(
        "Roberta",
        model="RobertaForMaskedLM",
        layer="roberta.encoder.layer.{}.attention.self",
        q=("query.weight",),
        k=("key.weight",),
        kv_heads=HEADS,
    ),
    "seed_oss": Family("SeedOss", _HEAD_DIM),
    "smollm3": Family("SmolLM3"),
    "stablelm": Family("StableLm"),
    "starcoder2": Family("Starcoder2"),
    "biogpt": Family("BioGpt", layer="biogpt.layers.{}.self_attn", kv_heads=HEADS),
    "afmoe": Family(
        "Afmoe",
        {**_HEAD_DIM, **_EXPERTS},
        **_NORMED,
        router=Router("model.layers.{}.mlp.router.gate.weight", "sigmoid", layers=(1,)),
    ),
    "qwen3_next": Family(
        "Qwen3Next",
        {
            **_HEAD_DIM,
            **_EXPERTS,
            "shared_expert_intermediate_size": HIDDEN,
            "layer_types": ["full_attention"] * LAYERS,
        },
        **_NORMED,
        router=Router(),
    ),
    "bitnet": Family("BitNet"),
    "lfm2_moe": Family(
        "Lfm2Moe",
        {**_EXPERTS, "layer_types": ["full_attention"] * LAYERS, "num_dense_layers": 0},
        q=("q_proj.weight", "q_layernorm.weight"),
        k=("k_proj.weight", "k_layernorm.weight"),
        router=Router("model.layers.{}.feed_forward.gate.weight", "sigmoid"),
    ),
}

FAMILIES = {**FAST, **SLOW}


def make(name: str, **values: Any) -> Any:
    """A family's model in training mode, the same weights each time."""
    torch.manual_seed(0)
    return FAMILIES[name].make(**values).train()


def tokens(generator: torch.Generator, length: int = 16, sequences: int = 2) -> dict[str, Tensor]:
    """Random tokens with themselves as labels: a model's inputs."""
    drawn = torch.randint(3, VOCABULARY, (sequences, length), generator=generator)
    return {"input_ids": drawn, "labels": drawn}
