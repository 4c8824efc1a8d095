"""Tiny random models of the families people train, by name, and what foreshock has to find in each. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from family import (
    COMMON,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    TOP_K,
    Family,
    Router,
    images,
    pairs,
    speech,
    tokens,
)

__all__ = ["DECOYS", "FAMILIES", "FAST", "SLOW", "Family", "make", "tokens"]

transformers.logging.set_verbosity_error()

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
_NORMED: dict[str, Any] = {"q": ("q_proj.weight", "q_norm.weight"), "k": ("k_proj.weight", "k_norm.weight")}
_LAYERNORMED: dict[str, Any] = {
    "q": ("q_proj.weight", "query_layernorm.weight"),
    "k": ("k_proj.weight", "key_layernorm.weight"),
}
_SHORT_NORMED: dict[str, Any] = {
    "q": ("q_proj.weight", "q_layernorm.weight"),
    "k": ("k_proj.weight", "k_layernorm.weight"),
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

# Low-rank q and k, and a rotary part of each head that comes from elsewhere: the factors are of the rest.
_LOW_RANK = {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_MLA: dict[str, Any] = {
    "q": ("q_b_proj.weight", "q_a_proj.weight", "q_a_layernorm.weight"),
    "k": ("kv_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight"),
    "kv_heads": HEADS,
    "head_dim": HEAD_DIM + 4,
    "value_dim": 6,
}
_GROUPED = {"groups": 2, "biased": True}

_STACKS = {
    f"{stack}_{name}": value
    for stack in ("encoder", "decoder")
    for name, value in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", HIDDEN), ("layerdrop", 0.0))
} | {"d_model": HIDDEN, "decoder_start_token_id": 1}
_SEQUENCES: dict[str, Any] = {  # bart and what is written like it
    "sites": (
        "model.encoder.layers.{}.self_attn",
        "model.decoder.layers.{}.self_attn",
        "model.decoder.layers.{}.encoder_attn",
    ),
    "kv_heads": HEADS,
}
_T5: dict[str, Any] = {
    "sites": (
        "encoder.block.{}.layer.0.SelfAttention",
        "decoder.block.{}.layer.0.SelfAttention",
        "decoder.block.{}.layer.1.EncDecAttention",
    ),
    "q": ("q.weight",),
    "k": ("k.weight",),
    "kv_heads": HEADS,
    "facts": {"scale": 1.0},
}
_T5_VALUES = {
    "d_kv": HEAD_DIM,
    "d_ff": HIDDEN,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "decoder_start_token_id": 1,
}
_PATCHES = {"image_size": 32, "patch_size": 8}


def _fused(site: str, name: str, kv_heads: int = HEADS) -> dict[str, Any]:
    """Queries and keys from one parameter."""
    return {"sites": (site,), "q": (name,), "k": (name,), "kv_heads": kv_heads}


def _bert(site: str, q: str = "query.weight", k: str = "key.weight") -> dict[str, Any]:
    """As many key heads as query heads."""
    return {"sites": (site,), "q": (q,), "k": (k,), "kv_heads": HEADS}


FAST: dict[str, Family] = {
    "llama": Family("Llama"),
    "qwen3_moe": Family("Qwen3Moe", {**_HEAD_DIM, **_EXPERTS}, **_NORMED, router=Router()),
    "gpt2": Family("GPT2", model="GPT2LMHeadModel", **_fused("transformer.h.{}.attn", "c_attn.weight")),
    "gpt_neox": Family("GPTNeoX", **_fused("gpt_neox.layers.{}.attention", "query_key_value.weight")),
    "olmoe": Family("Olmoe", _EXPERTS, **_NORMED, router=Router()),
    "llama4": Family(
        "Llama4Text",
        {**_HEAD_DIM, **_LOCAL, "intermediate_size_mlp": 32},
        "Llama4ForCausalLM",
        router=Router(("model.layers.{}.feed_forward.router.weight",), "sigmoid"),
    ),
    "deepseek_v3": Family(
        "DeepseekV3", {**_LOW_RANK, **_GROUPS}, **_MLA, router=Router(scoring="sigmoid", layers=(1,), facts=_GROUPED)
    ),
    "gemma2": Family(
        "Gemma2", {**_HEAD_DIM, "query_pre_attn_scalar": 8}, facts={"softcap": 50.0, "causal": True, "masked": False}
    ),
    "bloom": Family("Bloom", **_fused("transformer.h.{}.self_attention", "query_key_value.weight")),
    "gpt_oss": Family(
        "GptOss", {**_HEAD_DIM, **_LOCAL}, facts={"sinks": True}, router=Router(("model.layers.{}.mlp.router.weight",))
    ),
    "xlnet": Family(
        "XLNet",
        {"d_model": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "d_inner": HIDDEN, "max_position_embeddings": None},
        "XLNetLMHeadModel",
        **_bert("transformer.layer.{}.rel_attn", "q", "k"),
    ),
    "phimoe": Family(
        "Phimoe", _LOCAL, router=Router(("model.layers.{}.mlp.router.weight",), facts={"selection": "argmax"})
    ),
    "t5": Family("T5", _T5_VALUES, "T5ForConditionalGeneration", **_T5),
    "vit": Family(
        "ViT",
        _PATCHES,
        "ViTForImageClassification",
        **_bert("vit.layers.{}.attention", "q_proj.weight", "k_proj.weight"),
        inputs=images,
    ),
}

SLOW: dict[str, Family] = {
    "afmoe": Family(
        "Afmoe",
        {**_HEAD_DIM, **_EXPERTS},
        **_NORMED,
        router=Router(("model.layers.{}.mlp.router.gate.weight",), "sigmoid", layers=(1,)),
    ),
    "albert": Family(
        "Albert",
        {"embedding_size": HIDDEN},
        "AlbertForMaskedLM",
        **_bert("albert.encoder.albert_layer_groups.0.albert_layers.0.attention"),
        layers=(0,),
        runs=LAYERS,
    ),
    "apertus": Family("Apertus", **_NORMED),
    "arcee": Family("Arcee"),
    "bamba": Family(
        "Bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}, layers=(1,)
    ),
    "bart": Family("Bart", _STACKS, "BartForConditionalGeneration", **_SEQUENCES),
    "bert": Family("Bert", model="BertForMaskedLM", **_bert("bert.encoder.layer.{}.attention.self")),
    "biogpt": Family("BioGpt", **_bert("biogpt.layers.{}.self_attn", "q_proj.weight", "k_proj.weight")),
    "bitnet": Family("BitNet"),
    "clip": Family(
        "CLIP",
        {"text_config": COMMON, "vision_config": {**COMMON, **_PATCHES}},
        "CLIPModel",
        sites=("text_model.encoder.layers.{}.self_attn", "vision_model.encoder.layers.{}.self_attn"),
        kv_heads=HEADS,
        inputs=pairs,
    ),
    "codegen": Family("CodeGen", {"rotary_dim": 4}, **_fused("transformer.h.{}.attn", "qkv_proj.weight")),
    "cohere": Family("Cohere"),
    "cohere2": Family("Cohere2"),
    "deberta_v2": Family(
        "DebertaV2",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "DebertaV2ForMaskedLM",
        **_bert("deberta.encoder.layer.{}.attention.self", "query_proj.weight", "key_proj.weight"),
    ),
    "deepseek_v2": Family("DeepseekV2", {**_LOW_RANK, **_GROUPS}, **_MLA, router=Router(layers=(1,))),
    "dots1": Family(
        "Dots1", {**_HEAD_DIM, **_GROUPS}, **_NORMED, router=Router(scoring="sigmoid", layers=(1,), facts=_GROUPED)
    ),
    "ernie4_5": Family("Ernie4_5", _HEAD_DIM),
    "ernie4_5_moe": Family(
        "Ernie4_5_Moe", {"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_layer_start_index": 0}, router=Router()
    ),
    "exaone4": Family("Exaone4", **_NORMED),
    "falcon": Family("Falcon", **_fused("transformer.h.{}.self_attention", "query_key_value.weight", 1)),
    "flex_olmo": Family("FlexOlmo", _EXPERTS, **_NORMED, router=Router()),
    "gemma": Family("Gemma", _HEAD_DIM),
    "gemma3": Family("Gemma3Text", {**_HEAD_DIM, "query_pre_attn_scalar": 8}, "Gemma3ForCausalLM", **_NORMED),
    "glm": Family("Glm", _HEAD_DIM),
    "glm4": Family("Glm4", _HEAD_DIM),
    "glm4_moe": Family(
        "Glm4Moe", {**_HEAD_DIM, **_GROUPS}, router=Router(scoring="sigmoid", layers=(1,), facts=_GROUPED)
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLite", {**_LOW_RANK, **_GROUPS}, **_MLA, router=Router(scoring="sigmoid", layers=(1,), facts=_GROUPED)
    ),
    "gpt_bigcode": Family("GPTBigCode", **_fused("transformer.h.{}.attn", "c_attn.weight", 1)),
    "gpt_neo": Family(
        "GPTNeo",
        {"attention_types": [[["global", "local"], 1]]},
        **_bert("transformer.h.{}.attn.attention", "q_proj.weight", "k_proj.weight"),
        facts={"scale": 1.0},
    ),
    "gptj": Family("GPTJ", {"rotary_dim": 4}, **_bert("transformer.h.{}.attn", "q_proj.weight", "k_proj.weight")),
    "granite": Family("Granite"),
    "granitemoe": Family("GraniteMoe", _LOCAL, router=Router(("model.layers.{}.block_sparse_moe.router.weight",))),
    "helium": Family("Helium", _HEAD_DIM),
    "hunyuan": Family("HunYuanDenseV1", _HEAD_DIM, **_LAYERNORMED),
    "hunyuan_moe": Family(
        "HunYuanMoEV1",
        {**_HEAD_DIM, "num_experts": EXPERTS, "moe_topk": TOP_K},
        **_LAYERNORMED,
        router=Router(("model.layers.{}.mlp.gate.wg.weight",)),
    ),
    "kimi_linear": Family(
        "KimiLinear",
        {**_LOW_RANK, **_GROUPS, **_LOCAL, **_HYBRID, "linear_head_dim": HEAD_DIM, "linear_num_heads": HEADS},
        **_MLA,
        layers=(1,),
        router=Router(scoring="sigmoid", layers=(1,), facts={"biased": True}),
    ),
    "lfm2": Family("Lfm2", {"layer_types": ["full_attention"] * LAYERS}, **_SHORT_NORMED),
    "lfm2_moe": Family(
        "Lfm2Moe",
        {**_EXPERTS, "layer_types": ["full_attention"] * LAYERS, "num_dense_layers": 0},
        **_SHORT_NORMED,
        router=Router(("model.layers.{}.feed_forward.gate.weight",), "sigmoid"),
    ),
    "longcat_flash": Family(
        "LongcatFlash",
        {
            **_LOW_RANK,
            "num_hidden_layers": None,
            "head_dim": 4,
            "num_layers": LAYERS,
            "ffn_hidden_size": HIDDEN,
            "expert_ffn_hidden_size": HIDDEN,
            "n_routed_experts": EXPERTS,
            "zero_expert_num": 2,
            "moe_topk": TOP_K,
        },
        **_MLA,
        sites=("model.layers.{}.self_attn.0", "model.layers.{}.self_attn.1"),
        breaks=True,
        router=Router(("model.layers.{}.mlp.router.classifier.weight",), experts=EXPERTS + 2),
    ),
    "mbart": Family("MBart", _STACKS, "MBartForConditionalGeneration", **_SEQUENCES),
    "minicpm3": Family("MiniCPM3", _LOW_RANK, **_MLA),
    "minimax": Family("MiniMax", _LOCAL, layers=(0,), router=Router()),
    "minimax_m2": Family("MiniMaxM2", {**_HEAD_DIM, **_LOCAL}, **_NORMED, router=Router(scoring="sigmoid")),
    "mistral": Family("Mistral"),
    "mixtral": Family("Mixtral", _LOCAL, router=Router()),
    "modernbert": Family("ModernBert", model="ModernBertForMaskedLM", **_fused("model.layers.{}.attn", "Wqkv.weight")),
    "mpt": Family(
        "Mpt",
        {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 64},
        **_fused("transformer.blocks.{}.attn", "Wqkv.weight"),
    ),
    "nemotron": Family("Nemotron"),
    "olmo": Family("Olmo"),
    "olmo2": Family("Olmo2", **_NORMED),
    "olmo3": Family("Olmo3", **_NORMED),
    "opt": Family(
        "OPT",
        {"ffn_dim": HIDDEN, "word_embed_proj_dim": HIDDEN},
        **_bert("model.decoder.layers.{}.self_attn", "q_proj.weight", "k_proj.weight"),
    ),
    "persimmon": Family(
        "Persimmon",
        q=("query_key_value.weight", "q_layernorm.weight"),
        k=("query_key_value.weight", "k_layernorm.weight"),
        kv_heads=HEADS,
    ),
    "phi": Family("Phi"),
    "phi3": Family("Phi3", **_fused("model.layers.{}.self_attn", "qkv_proj.weight", KV_HEADS)),
    "qwen2": Family("Qwen2"),
    "qwen2_moe": Family("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": HIDDEN}, router=Router()),
    "qwen3": Family("Qwen3", _HEAD_DIM, **_NORMED),
    "qwen3_next": Family(
        "Qwen3Next",
        {
            **_HEAD_DIM,
            **_EXPERTS,
            **_HYBRID,
            "shared_expert_intermediate_size": HIDDEN,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": HEAD_DIM,
            "linear_value_head_dim": HEAD_DIM,
        },
        **_NORMED,
        layers=(1,),
        router=Router(),
    ),
    "recurrent_gemma": Family(
        "RecurrentGemma",
        {"block_types": ["recurrent", "attention"], "lru_width": HIDDEN},
        sites=("model.layers.{}.temporal_block",),
        layers=(1,),
    ),
    "roberta": Family("Roberta", model="RobertaForMaskedLM", **_bert("roberta.encoder.layer.{}.attention.self")),
    "seed_oss": Family("SeedOss", _HEAD_DIM),
    "smollm3": Family("SmolLM3"),
    "stablelm": Family("StableLm"),
    "starcoder2": Family("Starcoder2"),
    "switch_transformers": Family(
        "SwitchTransformers",
        {
            **_T5_VALUES,
            "num_experts": EXPERTS,
            "expert_capacity": 64,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
        "SwitchTransformersForConditionalGeneration",
        **_T5,
        breaks=True,
        router=Router(
            (
                "encoder.block.{}.layer.1.mlp.router.classifier.weight",
                "decoder.block.{}.layer.2.mlp.router.classifier.weight",
            ),
            layers=(1,),
            top_k=1,
            facts={"selection": "argmax"},
        ),
    ),
    "whisper": Family(
        "Whisper",
        {
            **_STACKS,
            "num_key_value_heads": HEADS,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 64,
        },
        "WhisperForConditionalGeneration",
        **_SEQUENCES,
        facts={"scale": 1.0},
        inputs=speech,
    ),
    "xglm": Family(
        "XGLM",
        {"d_model": HIDDEN, "attention_heads": HEADS, "num_layers": LAYERS, "ffn_dim": HIDDEN},
        kv_heads=HEADS,
        facts={"scale": 1.0},
    ),
    "youtu": Family("Youtu", _LOW_RANK, **_MLA),
}

# Models that mix tokens by other means, and choose no experts.
_SCAN = {"state_size": 8, "conv_kernel": 4, "num_key_value_heads": None}
DECOYS: dict[str, Family] = {
    "mamba": Family("Mamba", _SCAN, layers=()),
    "mamba2": Family("Mamba2", {**_SCAN, "num_heads": 8, "head_dim": 8, "n_groups": 1}, layers=()),
    "rwkv": Family("Rwkv", {"attention_hidden_size": HIDDEN}, layers=()),
    "fnet": Family("FNet", model="FNetForMaskedLM", layers=()),
    "poolformer": Family(
        "PoolFormer",
        {"hidden_sizes": [8] * 4, "depths": [1] * 4},
        "PoolFormerForImageClassification",
        layers=(),
        inputs=images,
    ),
    "resnet": Family(
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
        "ResNetForImageClassification",
        layers=(),
        inputs=images,
    ),
}

FAMILIES = {**FAST, **SLOW, **DECOYS}


def make(name: str, **values: Any) -> Any:
    """A family's model in training mode, the same weights each time."""
    torch.manual_seed(0)
    return FAMILIES[name].make(**values).train()
