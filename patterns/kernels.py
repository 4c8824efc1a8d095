"""Opaque kernels that need no description by the user: public ones by name, others by a schema that says q, k, v.

Arguments that are given and are no default keep what they may break out: caps and sinks the laws that rest on shifts of keys,
masks the mass of values, whatever is not known every law. Offsets of packed sequences break none: every law is a sum over keys or
queries, whichever sequence they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from foreshock.patterns.attention import attention_op
from foreshock.patterns.boundary import NO_BIAS_PAIR
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import args, schema, shape
from foreshock.patterns.pattern import Match, Miss, Pattern

_CAUSAL = ("causal", "is_causal", "custom_mask_type")
_SCALE = ("scale", "softmax_scale", "sm_scale")
_DROPOUT = ("dropout_p", "p_dropout", "dropout", "p")
# What an argument does, by its name in any kernel's schema.
_MASKS = frozenset({"mask", "attn_mask", "attention_mask", "attn_bias", "bias", "alibi_slopes", "block_mask"})
_MASKS |= frozenset({"window_size", "window_size_left", "window_size_right", "window_left", "window_right"})
_CAPS = frozenset({"softcap", "soft_cap", "logits_soft_cap"})
_SINKS = frozenset({"sink", "sinks", "s_aux", "learnable_sink", "attention_sinks"})
_PACKED = frozenset({"cu_seqlens_q", "cu_seqlens_k", "cum_seq_q", "cum_seq_k", "seqstart_q", "seqstart_k"})
_ROWLESS = frozenset({"seqused_k", "seqused_q", "seqlen_k", "leftpad_k"})
_UNWRITTEN = "rows of no sequence may be left as they were in memory"
_IDLE = frozenset(
    {"max_seqlen_q", "max_seqlen_k", "max_q", "max_k", "return_softmax", "return_debug_mask", "deterministic"}
)
_IDLE |= frozenset({"compute_logsumexp", "compute_log_sumexp", "num_splits", "pack_gqa", "sm_margin", "enable_gqa"})
_NOTHING = (None, -1, (-1, -1), [-1, -1])  # as a mask, a window or an offset


@dataclass(frozen=True)
class _Kernel:
    """``layouts`` by number of axes of q."""

    name: str
    layouts: Mapping[int, str]


_FLASH = {3: "s h d", 4: "b s h d"}
_HEADS_FIRST = {4: "b h s d"}
_PUBLIC = (
    _Kernel("flash_attn::_flash_attn_forward", _FLASH),
    _Kernel("flash_attn::_flash_attn_varlen_forward", _FLASH),
    _Kernel("flash_attn_3::_flash_attn_forward", _FLASH),
    _Kernel("flash_attn_3::fwd", _FLASH),
    _Kernel("xformers::efficient_attention_forward_cutlass", {4: "b s h d", 5: "b s h0 h1 d"}),
    _Kernel("xformers::efficient_attention_forward_ck", {4: "b s h d", 5: "b s h0 h1 d"}),
    _Kernel("xformers_flash::flash_fwd", _FLASH),
    _Kernel("aten::_scaled_dot_product_flash_attention", _HEADS_FIRST),
    _Kernel("aten::_scaled_dot_product_flash_attention_for_cpu", _HEADS_FIRST),
    _Kernel("aten::_scaled_dot_product_efficient_attention", _HEADS_FIRST),
    _Kernel("aten::_scaled_dot_product_cudnn_attention", _HEADS_FIRST),
    _Kernel("aten::_scaled_dot_product_fused_attention_overrideable", _HEADS_FIRST),
    _Kernel("aten::_scaled_dot_product_attention_math", _HEADS_FIRST),
    _Kernel("aten::_flash_attention_forward", _FLASH),
    _Kernel("aten::_efficient_attention_forward", _FLASH),
)


def _pattern(kernel: _Kernel) -> Pattern:
    def match(view: GraphView, node: Node) -> Match | Miss:
        return _by_schema(view, node, kernel.layouts)

    return Pattern(kernel.name, frozenset({kernel.name.removeprefix("aten::")}), match)


PUBLIC: tuple[Pattern, ...] = tuple(map(_pattern, _PUBLIC))


def described_by_schema(view: GraphView, node: Node) -> Match | Miss:
    """An op nobody described, whose schema calls its arguments q, k, v (or query, key, value): an attention kernel."""
    found = _by_schema(view, node, {})
    return found.with_note("recognised by its schema (q, k, v)") if isinstance(found, Match) else found


def _by_schema(view: GraphView, node: Node, layouts: Mapping[int, str]) -> Match | Miss:
    declared = schema(node)
    if declared is None:
        return Miss(node, "no schema", quiet=True)
    order = [entry.name for entry in declared.arguments]
    names = next((names for names in (("q", "k", "v"), ("query", "key", "value")) if set(names) <= set(order)), None)
    if names is None:
        return Miss(node, "its schema has no q, k, v", quiet=True)
    q, k, v = names
    given = dict(zip(order, args(node), strict=False)) | node.kwargs
    causal, scale, dropout = (
        next((name for name in known if name in order), None) for known in (_CAUSAL, _SCALE, _DROPOUT)
    )
    kernel = attention_op(
        declared.name,
        q=q,
        k=k,
        v=v,
        output=0 if len(declared.returns) > 1 else None,
        layout=layouts.get(len(shape(given.get(q)) or ())),
        causal=causal,
        scale=scale,
        dropout=dropout or 0.0,
    )
    found = kernel.match(view, node)
    return _cautious(found, given, {*names, causal, scale, dropout}) if isinstance(found, Match) else found


def _cautious(match: Match, given: Mapping[str, Any], understood: set[str | None]) -> Match:
    """Without the laws and recomputed rows that further arguments break, or may break if their meaning is not known."""
    defaults = {e.name: e.default_value for e in schema(match.anchor).arguments if e.has_default_value()}
    active = {
        name: x
        for name, x in given.items()
        if name not in understood | _IDLE
        and not (isinstance(x, Node) and shape(x) is None)
        and not _is_idle(name, x, defaults.get(name))
    }
    if not active:
        return match
    facts = dict(match.facts)
    broken: dict[str, str] = {}
    for name, x in active.items():
        if name in _CAPS:
            facts["softcap"] = float(x) if isinstance(x, int | float) else None
            broken |= dict.fromkeys(
                NO_BIAS_PAIR, "the logits are capped: a shift of all keys moves each logit differently"
            )
        elif name in _SINKS:
            facts["sinks"] = True
            broken |= dict.fromkeys(
                (*NO_BIAS_PAIR, "law/value_mass"), f"sink logits (`{name}`) take a share of each row"
            )
        elif name in _MASKS:
            facts["masked"] = True
            broken.setdefault("law/value_mass", "a mask may empty whole rows")
        elif name in _ROWLESS:
            broken.setdefault("law/value_mass", "a mask may empty whole rows")
            broken.setdefault("law/hull", _UNWRITTEN)
        elif name in _PACKED:
            broken.setdefault("law/hull", _UNWRITTEN)
        elif isinstance(x, Node) or "cap" in name:
            broken |= dict.fromkeys(match.laws, f"what the kernel's argument `{name}` means is not known")
            facts["causal"] = None
    note = f"no recomputed rows: the kernel's arguments {', '.join(active)} are not followed"
    broken.setdefault("law/shadow", note)
    laws = {law: reason or broken.get(law, "") for law, reason in match.laws.items()}
    return replace(match, facts={**facts, "recompute": False}, laws=laws).with_note(note)


def _is_idle(name: str, given: Any, default: Any) -> bool:
    if isinstance(given, Node):
        return False
    return given == default or given in _NOTHING or (name not in _MASKS and given in (0.0, False))
