"""Tiny random configs of any family of transformers. Nothing is downloaded.

A family's own default config is shrunk by what its attributes are called, nested configs too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, LAYERS = 64, 4, 2, 16, 6, 2, 2
VOCABULARY, FIRST_TOKEN = 128, 64  # tokens below the first are special
IMAGE, PATCH, MELS = 64, 8, 16
MOST_PARAMETERS = 120_000_000
MODES = ("small", "deep", "default")  # widths and depths; widths alone; neither

_HEADS = re.compile(r"(^|_)(attention_heads|n_heads?|num_heads|heads|num_query_groups)$")
_LAYERS = re.compile(r"(^|_)(layers?|depth|num_blocks|n_layer)$")
_WIDTHS = re.compile(
    r"size|dim|width|channels|features|units|embd|d_model|d_ff|d_inner|ffn|inner|hidden|filters|inplanes|num_landmarks|latents"
)
_FIXED = re.compile(
    r"image_size|patch|kernel|window|stride|vocab|rate|length|batch|chunk|type_|frame|scale|index_|crop|input_size|block_size|bbox|stem|stage"
)
_NO_LAYERS = re.compile(
    r"feature_layer|num_feature_levels|first_|last_|add_layer|max_window|adapter_layers|skip|shared_layers|feat_extract"
)
_MODELS = (
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "TIME_SERIES_PREDICTION",
)  # fmt: skip


def families() -> list[str]:
    """All model types, those that are no part of another one first."""
    parts = {
        getattr(part, "model_type", None)
        for name in CONFIG_MAPPING
        for part in CONFIG_MAPPING[name].sub_configs.values()
    }
    return sorted(CONFIG_MAPPING, key=lambda name: name in parts)


def candidates(family: str) -> Iterator[type]:
    """The model classes of ``family``, that with a head first."""
    made = CONFIG_MAPPING[family]
    seen = set()
    heads = _MODELS[3:5] + _MODELS if getattr(made(), "is_encoder_decoder", False) else _MODELS
    heads = _MODELS[:5] if len(made.sub_configs) > 1 else heads
    for name in (*(f"MODEL_FOR_{head}_MAPPING" for head in heads), "MODEL_MAPPING", "MODEL_FOR_PRETRAINING_MAPPING"):
        mapping = getattr(modeling_auto, name)
        found = mapping.get(made, None) if made in mapping else None
        for model in found if isinstance(found, tuple) else (found,):
            if model is not None and model not in seen:
                seen.add(model)
                yield model
    if not seen:
        mappings = [m for m in vars(modeling_auto).values() if isinstance(m, modeling_auto._LazyAutoMapping)]
        yield from (m[made] for m in mappings if made in m and not isinstance(m[made], tuple))


def tiny(family: str, mode: str = "small") -> Any:
    """A config of ``family`` with few and small layers."""
    made = CONFIG_MAPPING[family]
    plain = made().to_dict()
    tokens = itertools.count(3)
    return made.from_dict(_small(plain, mode, {}, tokens))


def _small(plain: Mapping[str, Any], mode: str, ids: dict[int, int], tokens: Iterator[int]) -> dict[str, Any]:
    if plain.get("model_type") == "timm_backbone":
        return {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1] * 4,
                "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
    keep, depth = _kept_layers(plain, mode)
    found: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict) and "model_type" in value:
            found[name] = _small(value, mode, ids, tokens)
        elif isinstance(value, list | tuple) and keep is not None and len(value) == depth and name != "mrope_section":
            found[name] = [value[at] for at in keep]
        elif isinstance(value, list | tuple) and re.search("token_ids?$", name):
            found[name] = [_number("x_token_id", v, plain, mode, ids, tokens) for v in value]
        elif isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            found[name] = _numbers(name, list(value), mode)
        elif type(value) is float and re.search("layerdrop$|^mask_(time|feature)_prob$|^drop_path_rate$", name):
            found[name] = 0.0
        elif name == "per_layer_config":
            found[name] = {}
        elif name == "prediction_length" and not value:
            found[name] = 8
        elif name == "window_size" and "depths" in plain and mode == "small":
            found[name] = 2
        elif name == "head_dim" and value and value == plain.get("qk_rope_head_dim"):
            found[name] = value if mode == "default" else HEAD_DIM // 2
        elif value is None and name == "vocab_size":
            found[name] = VOCABULARY
        elif value is None and name in ("image_token_id", "image_token_index"):
            found[name] = ids.setdefault(-1, next(tokens))
        elif type(value) is int:
            found[name] = _number(name, value, plain, mode, ids, tokens)
        else:
            found[name] = value
        if name == "rope_parameters" and mode != "default" and isinstance(value, dict):
            of_grids = re.search("vl|omni|4v|46v|ernie|ocr", str(plain.get("model_type")))
            section = value.get("mrope_section") or ([16, 24, 24] if of_grids else None)
            found[name] = (
                value
                if section is None
                else value | {"mrope_section": _sections(section, value.get("partial_rotary_factor") or 1.0)}
            )
    if keep is not None:
        found |= {name: len(keep) for name, value in plain.items() if value == depth and _is_layers(name)}
        if mode == "small":
            for name in ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices"):
                found.pop(name, None)
    return found


def _sections(section: list[int], rotated: float) -> list[int]:
    whole = int(HEAD_DIM // 2 * rotated)
    small = [max(1, v * whole // sum(section)) for v in section]
    return [*small[:-1], whole - sum(small[:-1])]


def _is_layers(name: str) -> bool:
    return bool(_LAYERS.search(name)) and not _NO_LAYERS.search(name)


def _kept_layers(plain: Mapping[str, Any], mode: str) -> tuple[list[int] | None, int]:
    """Which layers stay, one of each type and at least two; None where layers are left as they are."""
    depth = next(
        (v for n in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if type(v := plain.get(n)) is int), 0
    )
    if mode != "small" or depth < LAYERS or "depths" in plain:
        return None, depth
    typed = [
        v for n, v in plain.items() if isinstance(v, list) and len(v) == depth and re.search("type|block|mlp|sparse", n)
    ]
    rows = list(zip(*(map(str, v) for v in typed), strict=True)) or [()] * depth
    first = [at for at, row in enumerate(rows) if row not in rows[:at]]
    others = [at for at in range(depth) if at not in first]
    return sorted((first + others)[: max(LAYERS, min(len(first), 4))]), depth


def _numbers(name: str, values: list[int], mode: str) -> list[int]:
    if mode == "default":
        return values
    if name in ("depths", "num_blocks", "layers", "encoder_depths") or name.endswith("_depths"):
        return [min(v, 2 if mode == "small" else v) for v in values]
    if re.search("image_size|img_size|crop_size", name) and min(values) > IMAGE:
        return [IMAGE] * len(values)
    if _HEADS.search(name) and min(values) > 0:
        return [_power(v) for v in values]
    if min(values) >= 32 and _WIDTHS.search(name) and not _FIXED.search(name):
        return [WIDTH] * len(values)
    return [WIDTH] * len(values) if name in ("conv_dim", "tdnn_dim") else values


def _power(heads: int) -> int:
    """The largest power of two, up to `HEADS`, that is not above ``heads``."""
    return next((power for power in (HEADS, 2) if power <= heads), 1)


def _number(
    name: str, value: int, plain: Mapping[str, Any], mode: str, ids: dict[int, int], tokens: Iterator[int]
) -> int:
    if re.search("_id$|token_index$|_token_idx$", name) and value >= 3:
        return ids.setdefault(value, next(tokens))
    if re.search("vocab|codebook_size|num_embeddings$", name) and value > VOCABULARY and "offset" not in name:
        return VOCABULARY
    if mode == "default":
        return value
    rules: tuple[tuple[str, int], ...] = (
        ("^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", EXPERTS),
        ("experts_per_tok|^moe_k$|^moe_topk$|^top_k_experts$|^num_selected_experts$", TOP_K),
        ("^n_group$|^num_expert_group$", 2),
        ("^topk_group$|^n_shared_experts$|^first_k_dense_replace$", 1),
        ("key_value_heads$|kv_heads$", KV_HEADS),
        ("qk_rope_head_dim$", HEAD_DIM // 2),
        ("^qk_head_dim$", HEAD_DIM + HEAD_DIM // 2),
        (
            "(^|_)head_dim$|^mamba_d_head$|^mamba_headdim$|^d_kv$|^d_head$|_head_size$|^dim_head$|^kv_channels$|_dim_head$|head_dim$",
            HEAD_DIM,
        ),
        ("_rank$", 12),
        ("^num_queries$|^num_denoising$", 10),
        ("^mamba_n_heads$|^mamba_num_heads$", 8),
        ("^mamba_d_ssm$", 2 * WIDTH),
        ("upsample_groups$", WIDTH),
        ("mel_bins$|^n_mels$|^input_feat_per_channel$", MELS),
        ("(every_n|_period|_interval|_pattern)", 2),
        ("_offset$", 1),
        ("tokens_per_image$|image_seq_length$", 16),
        ("^sampling_rate$|^num_channels$|^in_channels$", value),
    )
    for pattern, small in rules:
        if re.search(pattern, name) and value:
            if small == KV_HEADS and value == max(
                (plain.get(n) or 0 for n in ("num_attention_heads", "n_head")), default=0
            ):
                return HEADS
            return min(small, value)
    if mode == "small" and _is_layers(name):
        return min(value, LAYERS)
    if _HEADS.search(name):
        return _power(value)
    if re.search("image_size|img_size|resolution|crop_size", name) and value > IMAGE:
        return IMAGE
    if re.search("patch_size$", name) and value > PATCH:
        return PATCH
    if re.search("max_.*position|n_positions|max_seq|n_ctx|context_length|window$", name):
        return min(value, 64)
    if value > 32 and _WIDTHS.search(name) and not _FIXED.search(name):
        return WIDTH
    return value
