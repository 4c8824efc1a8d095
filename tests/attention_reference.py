"""Every metric of the attention probe written out in float64, from the tensors at the boundary as they are.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads. Rows are all rows of all sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

HIDDEN = 9e3  # an additive mask below minus this hides a key


def shown(facts: Mapping[str, Any], t: Mapping[str, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits ``[B, H, S, T]`` with hidden keys at minus infinity, and which are visible."""
    repeat = t["q"].shape[1] // t["k"].shape[1]
    logits = t["q"].double() @ t["k"].double().repeat_interleave(repeat, 1).mT * facts["scale"]
    visible = torch.ones_like(logits, dtype=torch.bool)
    visible = visible.tril() if facts["causal"] else visible
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible, logits = visible & (mask > -HIDDEN), logits + mask.double()
    return logits.masked_fill(~visible, -math.inf), visible


def by_group(x_BH: Tensor, groups: int) -> Tensor:
    return x_BH.unflatten(1, (groups, -1)).sum(2)


def largest(x: Tensor) -> Tensor:
    """Over all but heads."""
    return x.flatten(3).amax((0, 2, 3)) if x.dim() > 3 else x.amax((0, 2))


def rows(facts: Mapping[str, Any], t: Mapping[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    logits, visible = shown(facts, t, mask)
    alive = visible.any(-1) & torch.isfinite(logits.amax(-1))
    n = alive.double().sum((0, 2))
    p = torch.where(alive[..., None], logits.softmax(-1), 0.0)
    lse = logits.logsumexp(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    first = visible.double().argmax(-1, keepdim=True)
    many = visible.sum(-1)
    several = alive & (many > 1)

    def mean(x: Tensor, over: Tensor = alive) -> Tensor:
        return torch.where(over, x, 0.0).sum((0, 2)) / over.double().sum((0, 2))

    def error(x: Tensor) -> Tensor:
        squares = torch.where(alive, (x - mean(x)[:, None]), 0.0).square().sum((0, 2))
        return (squares / (n - 1) / n).sqrt()

    sink = p.gather(-1, first)[..., 0]
    shadow = p @ t["v"].double().repeat_interleave(p.shape[1] // t["v"].shape[1], 1)
    off = torch.where(alive[..., None], t["out"].double() - shadow, 0.0)
    square = shadow.square().sum((0, 2, 3))
    rms = (off.square().sum((0, 2, 3)) / square).sqrt()
    unseen = torch.where(n > 0, 0.0, math.nan)
    return {
        "attention/logit_max": largest(logits) + unseen,
        "attention/entropy": mean(entropy),
        "attention/entropy_se": error(entropy),
        "attention/entropy_norm": mean(entropy / many.clamp(min=2).log(), several),
        "attention/sink": mean(sink),
        "attention/sink_se": error(sink),
        "attention/lse": mean(lse),
        "attention/lse_se": error(lse),
        "attention/lse_max": torch.where(alive, lse, -math.inf).amax((0, 2)) + unseen,
        "attention/shadow_bias": (off * shadow).sum((0, 2, 3)) / square,
        "attention/shadow_rms": rms,
        "law/shadow": rms,
    }


def tensors(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for role in ("q", "k", "v", "out"):
        x = t[role].double()
        found[f"attention/{role}_rms"] = x.square().mean((0, 2, 3)).sqrt()
        found[f"attention/{role}_absmax"] = largest(x.abs())
    every = [t[role] for role in ("q", "k", "v", "out")]
    found["attention/nonfinite"] = torch.stack([(~torch.isfinite(x)).sum() for x in every])
    half = [torch.finfo(x.dtype).max / 2 for x in every]
    found["attention/near_overflow"] = torch.stack(
        [(x.double().abs() > limit).double().mean() for x, limit in zip(every, half, strict=True)]
    )
    v, out = t["v"].double(), t["out"].double()
    repeat = out.shape[1] // v.shape[1]
    low, high = v.amin(2, keepdim=True).clamp(max=0), v.amax(2, keepdim=True).clamp(min=0)
    low, high = (x.repeat_interleave(repeat, 1) for x in (low, high))
    found["law/hull"] = largest(torch.maximum(out - high, low - out).clamp(min=0) / torch.maximum(high, -low))
    return found


def told(norm: Tensor) -> Tensor:
    """A sum of squares that float32 holds with all its terms, else not available."""
    return torch.where(norm > 1e-30, norm, math.nan)


def gradients(facts: Mapping[str, Any], t: Mapping[str, Tensor], g: Mapping[str, Tensor]) -> dict[str, Tensor]:
    q, k, out, dq, dk, dv, do = (x.double() for x in (t["q"], t["k"], t["out"], g["q"], g["k"], g["v"], g["out"]))
    groups, of_values = k.shape[1], dv.shape[1]
    half = t["q"].dtype == torch.float16
    tiny = torch.finfo(torch.float16).tiny ** 2 if half else 0.0
    found = {f"attention/grad_{role}_norm": g[role].double().square().sum((0, 2, 3)).sqrt() for role in g}
    found["attention/grad_nonfinite"] = torch.stack([(~torch.isfinite(g[r])).sum() for r in ("q", "k", "v", "out")])
    found["attention/grad_absmax"] = torch.stack([g[role].double().abs().max() for role in ("q", "k", "v", "out")])
    delta = (do * out).sum(-1)
    found["attention/grad_delta"] = delta.mean((0, 2))
    found["attention/grad_delta_sign"] = ((delta > 0).double() - (delta < 0).double()).mean((0, 2))
    key_norm = told(dk.square().sum((0, 2, 3)))
    found["law/key_shift"] = (dk.sum(2).square().sum((0, 2)) / key_norm).sqrt()
    mass, brought = dv.sum(2), by_group(do.sum(2), of_values)
    size = mass.square().sum((0, 2)) + brought.square().sum((0, 2)) + dv.numel() * tiny / of_values
    found["law/value_mass"] = ((mass - brought).square().sum((0, 2)) / told(size)).sqrt()
    by_q, by_k = (q * dq).sum(3), (k * dk).sum(3)
    size = told(by_group(by_q.square().sum(2), groups).sum(0) + by_k.square().sum((0, 2)))
    found["law/euler"] = (by_group(by_q.sum(2), groups).sum(0) - by_k.sum((0, 2))).abs() / size.sqrt()
    noise = by_group((q * dq).square().sum((2, 3)), groups).sum(0) + (k * dk).square().sum((0, 2, 3))
    noise = noise + tiny * (by_group(q.square().sum((2, 3)), groups).sum(0) + k.square().sum((0, 2, 3)))
    found["law/euler_gain"] = (noise / size).sqrt()
    unsure = (do * out).square().sum(3) * q.square().sum(3)
    unsure = by_group(unsure.sum(2), groups).sum(0) * facts["scale"] ** 2 + dk.numel() * tiny / groups
    found["law/key_gain"] = (unsure / key_norm).sqrt()
    u = by_group((delta[..., None] * q).sum(2), groups) * facts["scale"]
    found["law/bias_num"], found["law/bias_den"] = -(dk.sum(2) * u).sum((0, 2)), u.square().sum((0, 2))
    return found


def reference(
    facts: Mapping[str, Any], t: Mapping[str, Tensor], g: Mapping[str, Tensor], mask: Tensor | None = None
) -> dict[str, np.ndarray]:
    """All metrics by name, float64."""
    found = {**rows(facts, t, mask), **tensors(t), **gradients(facts, t, g)}
    return {name: x.double().numpy() for name, x in found.items()}
