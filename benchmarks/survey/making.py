"""Builds a tiny model of any family of transformers, and inputs that it takes.

Inputs are guessed from what the forward pass takes, and guessed again from what it says when it refuses them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import tiny
import torch
import transformers
from oracle import Oracle
from tiny import IMAGE, MELS, PATCH

_FEATURES = re.compile(r"(?:tokens: *(\d+).*)?features:? *(\d+)")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PLACEHOLDERS = re.compile(r"^(image|video|audio)_token_(id|index)$|^image_pad_token_id$|^media_token_index$")
TOKENS, SAMPLES = 16, 4000


class NotRunError(Exception):
    """No guess of a config and inputs made the model run."""


def build(family: str, attention: str | None) -> tuple[Any, dict[str, Any], Any]:
    """A model, inputs that it takes, and the oracle that watched it take them. Raises `NotRunError`."""
    reasons: list[str] = []
    best: tuple[Any, dict[str, Any], Any] | None = None
    for mode in tiny.MODES:
        for cls in list(tiny.candidates(family))[:2]:
            try:
                config = tiny.tiny(family, mode)
                if attention is not None:
                    config._attn_implementation = attention
                with torch.device("meta"):
                    size = sum(p.numel() for p in cls(tiny.tiny(family, mode)).parameters())
                if size > tiny.MOST_PARAMETERS:
                    raise NotRunError(f"{size / 1e6:.0f} million parameters")
                transformers.set_seed(0)
                model = cls(config).train()
            except Exception as error:
                reasons.append(f"{cls.__name__} ({mode}) {type(error).__name__}: {first_line(error)}")
                continue
            found = _try_inputs(model, config, reasons, f"{cls.__name__} ({mode})")
            if found is not None and (best is None or len(found[0]) > len(best[1])):
                best = (model, *found)
                if mode == "small":
                    return best
        if best is not None:
            return best
    raise NotRunError(" | ".join(dict.fromkeys(reasons[:1] + reasons[-1:])) or "no class for this config")


def _try_inputs(model: Any, config: Any, reasons: list[str], what: str) -> tuple[dict[str, Any], Any] | None:
    holders = [v for n, v in vars(config).items() if _PLACEHOLDERS.match(n) and type(v) is int]
    for shape in range(12):
        drawn: dict[int, int] = {}
        for _ in range(3 if holders else 1):
            given = inputs(model, config, shape, drawn)
            try:
                return given, watched(model, given, config)
            except Exception as error:
                reasons.append(f"{what} {type(error).__name__}: {first_line(error)}")
                told = _FEATURES.search(str(error))
                if told is None or not holders or "not match" not in str(error):
                    break
                kind = next((w for w in ("video", "audio", "image") if w in str(error).lower()), "image")
                token = getattr(config, f"{kind}_token_id", getattr(config, f"{kind}_token_index", holders[0]))
                width = getattr(getattr(config, "text_config", config), "hidden_size", 1) or 1
                count = int(told[2])
                drawn = {**drawn, token: count // width if count > 4096 else count}
    for only in (["input_ids", "decoder_input_ids"], [model.main_input_name]):
        given = {n: v for n, v in inputs(model, config, 0, {}).items() if n in only}
        try:
            return given, watched(model, given, config)
        except Exception as error:
            reasons.append(f"{what} {type(error).__name__}: {first_line(error)}")
    return None


def watched(model: Any, given: dict[str, Any], config: Any) -> Oracle:
    experts = {getattr(part, name, None) for part in _parts(config) for name in _EXPERTS}
    model.zero_grad()
    with Oracle(model, frozenset(x for x in experts if type(x) is int and x > 1)) as oracle:
        oracle.outcome = step(model, model, given)  # type: ignore[attr-defined]
    return oracle


def step(model: Any, run: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loss and gradients of one forward and backward pass; the loss weighs all floating outputs."""
    transformers.set_seed(1)
    result = run(**given)
    loss: Any = 0.0
    for x in _floating(result):
        loss = loss + (x * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).mean() + x.square().mean() * 0.1
    loss.backward()
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def _floating(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x] if x.is_floating_point() and x.requires_grad and x.numel() else []
    values = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return [tensor for value in values for tensor in _floating(value)]


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200]


def _parts(config: Any) -> list[Any]:
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return [config, *(inner for part in parts if part is not None for inner in _parts(part))]


def inputs(model: Any, config: Any, shape: int, drawn: Mapping[str, int]) -> dict[str, Any]:
    """Inputs of one forward pass by its signature. ``shape`` is which form of images and audio to try, ``drawn`` how many
    placeholder tokens of each kind stand in the text, by token id."""
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    whole = [
        config,
        *(getattr(config, n) for n in getattr(config, "sub_configs", ()) if getattr(config, n, None) is not None),
    ]

    def asked(*names: str, default: int) -> int:
        sizes = (getattr(part, name, None) for name in names for part in whole)
        value = next((v for v in sizes if isinstance(v, int | list | tuple) and v), default)
        return value if isinstance(value, int) else value[0]

    image, patch, channels = (
        asked("image_size", default=IMAGE),
        asked("patch_size", default=PATCH),
        asked("num_channels", default=3),
    )
    frames, merge = asked("num_frames", default=2), asked("temporal_patch_size", default=1)
    mels = asked("num_mel_bins", "n_mels", "feature_size", "input_dim", "input_feat_per_channel", default=MELS)
    length = 2 * asked("max_source_positions", default=50)
    normal = lambda *sizes: torch.randn(*sizes, generator=generator)  # noqa: E731
    text = torch.randint(tiny.FIRST_TOKEN, tiny.VOCABULARY, (2, TOKENS), generator=generator)
    side = max(image // patch, 1) // 2 * 2 or 2
    grid = torch.tensor([[1, side, side]] * 2)
    pixels = (
        normal(2, channels, image, image),
        normal(2 * side * side, channels * merge * patch * patch),
        normal(2, frames, channels, image, image),
        normal(2, 1, channels, image, image),
        normal(2, side * side, channels * patch * patch),
        normal(2 * side * side, channels, patch, patch),
    )[shape % 6]
    sounds = (normal(2, mels, length), normal(2, length, mels), normal(2, SAMPLES), normal(2, 1, 1024, mels))[shape % 4]
    past, width = asked("context_length", "prediction_length", default=32), asked("input_size", default=1)
    past += max(getattr(config, "lags_sequence", None) or [0])
    series = (normal(2, past), normal(2, past, width))[shape % 2]
    places = torch.arange(side)
    corners = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1).reshape(1, -1, 2)
    spoken = (normal(2, SAMPLES), normal(2, 1, SAMPLES), normal(2, asked("max_length", default=32), mels), sounds)[
        shape % 4
    ]
    heard = torch.ones(2, length, dtype=torch.long)
    times = getattr(config, "num_time_features", 1)
    known: dict[str, Any] = {
        "pixel_values": pixels,
        "pixel_values_images": pixels,
        "pixel_values_videos": normal(2, frames, channels, image, image) if "pixel_values" not in takes else None,
        "hidden_states": pixels if "grid_thw" in takes else None,
        "grid_thw": grid,
        "image_grid_thw": grid if shape % 6 == 1 else None,
        "image_sizes": torch.tensor([[image, image]] * 2) if shape >= 6 else None,
        "pixel_position_ids": corners.expand(2, -1, -1),
        "spatial_shapes": torch.tensor([[side, side]] * 2),
        "pixel_attention_mask": torch.ones(2, side * side, dtype=torch.long),
        "input_features": sounds,
        "input_features_mask": heard if shape >= 6 or "input_ids" not in takes else None,
        "feature_attention_mask": heard if shape >= 6 else None,
        "is_longer": torch.ones(2, 1, dtype=torch.bool),
        "input_values": spoken,
        "audio_values": normal(2, 1, SAMPLES),
        "decoder_input_values": normal(2, 10, mels),
        "past_values": series,
        "past_observed_mask": torch.ones_like(series),
        "past_time_features": normal(2, past, times),
        "future_values": normal(2, 8),
        "future_time_features": normal(2, 8, times),
        "visual_feats": normal(2, 5, asked("visual_feat_dim", default=64)),
        "visual_pos": normal(2, 5, 4),
        "qformer_input_ids": text,
        "states": normal(2, 8, asked("state_dim", default=17)),
        "actions": normal(2, 8, asked("act_dim", default=4)),
        "rewards": normal(2, 8, 1),
        "returns_to_go": normal(2, 8, 1),
        "timesteps": torch.arange(8).expand(2, 8),
        "input_boxes": torch.rand(2, 1, 4, generator=generator) * 8,
        "use_cache": False if shape >= 6 else None,
    }
    if shape % 6 != 4:
        known |= {"spatial_shapes": None, "pixel_attention_mask": None}
    if drawn:
        extra = [torch.full((2, -(-count // 2)), int(token)) for token, count in drawn.items()]
        text = torch.cat([text[:, :2], *extra, text[:, 2:]], 1)
    kinds = {
        getattr(config, f"{kind}_token_id", None): number for number, kind in ((1, "image"), (2, "video"), (3, "audio"))
    }
    types = torch.tensor([[kinds.get(token, 0) for token in row] for row in text.tolist()])
    known |= {"mm_token_type_ids": types, "token_type_ids": types if shape >= 6 else None}
    known |= {
        "input_ids": text,
        "attention_mask": torch.ones_like(text) if shape >= 6 and "input_ids" in takes else None,
    }
    boxes = (normal(*text.shape, 8).abs(), torch.ones(*text.shape, 4, dtype=torch.long))[config.model_type != "bros"]
    known["bbox"] = boxes if config.model_type == "bros" or shape >= 6 else None
    if getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in takes:
        known["decoder_input_ids"] = text[:, :TOKENS] % tiny.VOCABULARY
    return {name: value for name, value in known.items() if name in takes and value is not None}
