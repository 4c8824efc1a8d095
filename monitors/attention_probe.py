"""What is measured at an attention boundary: tensor statistics, sampled rows recomputed in fp32, and the laws' sums.

Both parts are in two stages: the first goes over the tensors and leaves sums over positions or over channels, ``[B, H, d]`` and
``[B, H, S]``; the rest makes sums a head of these.

Shape suffixes: B batch, S queries, T keys, H query heads, G key/value heads, h head dim, v value dim. Definitions and sources:
`foreshock.monitors.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from foreshock.layout import canonical
from foreshock.monitors.sampled_rows import measured, take
from foreshock.records import Array, Facts, Probe, Tensors
from foreshock.stages import TwoStages

_ROLES = ("q", "k", "v", "out")
_LARGEST = (
    1e15  # of a finite gradient as the laws count it: a flipped exponent bit would hide behind an infinite square
)
_SMALLEST = 1e-30  # sum of squares that a residual is taken of


def _heads_first(facts: Facts, tensors: Tensors) -> dict[str, Tensor]:
    layout = facts["layout"]
    return {role: canonical(x, layout[role]) if role in layout else x for role, x in tensors.items()}


# Whatever is asked of all entries of a head goes over positions first: one order for all of it is one pass over the tensor.


def _count(where_BHSd: Tensor) -> Tensor:
    """A whole number, and exact."""
    return where_BHSd.sum(2, dtype=torch.int32)


def _whole(counts_BHd: Tensor) -> Tensor:
    return counts_BHd.sum().float()


def _forward_first(facts: Facts, tensors: Tensors, rows: Tensor) -> Mapping[str, Tensor]:
    t = _heads_first(facts, tensors)
    found: dict[str, Tensor] = {}
    for role in (role for role in _ROLES if role in t):
        x, size = t[role], t[role].abs()
        found[f"{role}_square"] = x.float().square().sum(2)
        if role != "v" or "out" not in t:
            found[f"{role}_largest"] = size.amax(2)
        found[f"{role}_lost"] = _count(~torch.isfinite(x))
        found[f"{role}_near"] = _count(size > torch.finfo(x.dtype).max / 2)
        found[f"{role}_positions"] = torch.full((), x.shape[0] * x.shape[2], dtype=torch.float32, device=x.device)
    if "out" in t:
        out = torch.where(t["out"] == t["out"], t["out"], 0.0)  # `isnan` is no vector instruction
        found |= {"out_high": out.amax(2), "out_low": out.amin(2), "v_high": t["v"].amax(2), "v_low": t["v"].amin(2)}
    return found | (take(facts, t, rows) if facts["rows"] else {})


def _forward_rest(facts: Facts, p: Tensors) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    present = [role for role in _ROLES if f"{role}_square" in p]
    positions = [p[f"{role}_positions"] for role in present]
    near = []
    for role in present:  # means count by their positions: microbatches may differ
        square = p[f"{role}_square"]
        largest = p[f"{role}_largest"] if f"{role}_largest" in p else torch.maximum(p["v_high"], -p["v_low"])
        found[f"{role}_mean_square"] = square.sum((0, 2)) / square.shape[2]
        found[f"{role}_absmax"] = largest.amax((0, 2)).float()
        near.append(_whole(p[f"{role}_near"]) / (square.shape[1] * square.shape[2]))
    if "out_high" in p:
        found["hull"] = _beyond_hull(p["out_high"], p["out_low"], p["v_high"], p["v_low"])
    found["positions"] = torch.stack(positions)
    found["nonfinite"] = torch.stack([_whole(p[f"{role}_lost"]) for role in present])
    found["near_overflow"] = torch.stack(near)
    return found | (measured(facts, p) if facts["rows"] else {})


forward = TwoStages(_forward_first, _forward_rest)
"""Sums over batch and positions, a head each; sampled rows where logits are at hand, or causality, mask and scale are known.

Roles are q, k, v and, where they have tensors of their own, out, logits (``[B, H, S, T]`` as they enter the softmax) and mask.
"""


def _beyond_hull(out_high_BHv: Tensor, out_low_BHv: Tensor, v_high_BGv: Tensor, v_low_BGv: Tensor) -> Tensor:
    """How far an output lies beyond the smallest or largest of its channel's values, in units of the channel's largest: ``[H]``.

    Zero counts as a value: a row without keys is zero, and columns that are no keys (sinks) take part of each row. A row of NaN,
    which some kernels make of no keys, says nothing here; a NaN is an event of its own.
    """
    each, tiny = out_high_BHv.shape[1] // v_high_BGv.shape[1], torch.finfo(v_high_BGv.dtype).tiny
    low, high = (
        x.float().repeat_interleave(each, 1) if each > 1 else x.float()
        for x in (v_low_BGv.clamp(max=0), v_high_BGv.clamp(min=0))
    )
    beyond = torch.maximum(out_high_BHv.float() - high, low - out_low_BHv.float())
    beyond = beyond / torch.maximum(high, -low).clamp(min=tiny)
    return torch.where(torch.isnan(beyond), 0.0, beyond).clamp(min=0).amax((0, 2))


def _backward_first(facts: Facts, tensors: Tensors, gradients: Tensors) -> Mapping[str, Tensor]:
    t = {role: x.float() for role, x in _heads_first(facts, tensors).items()}
    raw = _heads_first(facts, {role: gradients[role] for role in _ROLES if role in gradients})
    g = {role: bounded(x.float()) for role, x in raw.items()}
    q, k, dq, dk = t["q"], t["k"], g["q"], g["k"]
    found = {"dk_sum": dk.sum(2), "dv_sum": g["v"].sum(2)}
    found |= {f"{role}_square": x.square().sum(2) for role, x in g.items()}
    found |= {f"{role}_lost": _count(~torch.isfinite(x)) for role, x in raw.items()}
    found |= {f"{role}_largest": x.abs().amax(2) for role, x in raw.items()}
    found |= {"q_dq": (q * dq).sum(3), "k_dk": (k * dk).sum(3)}
    for role, x, dx in (("q", q, dq), ("k", k, dk)):
        found[f"{role}_noise"] = (x * dx).square().sum(2)
        if smallest := tiny(gradients[role]):
            found[f"{role}_noise"] += smallest * x.square().sum(2)
    for role in ("k", "v"):
        if lost := underflow(gradients[role]):
            found[f"{role}_underflow"] = torch.full((), lost, dtype=torch.float32, device=q.device)
    if "out" in t:
        do, do_o = g["out"], g["out"] * t["out"]
        delta = do_o.sum(3)
        found |= {"do_sum": do.sum(2), "delta": delta, "delta_q": (delta.unsqueeze(3) * q).sum(2)}
        found["unsure"] = do_o.square().sum(3) * q.square().sum(3)
    return found


def _backward_rest(facts: Facts, p: Tensors) -> Mapping[str, Tensor]:
    dk_sum, dv_sum, q_dq, k_dk = p["dk_sum"], p["dv_sum"], p["q_dq"], p["k_dk"]
    groups, scale = dk_sum.shape[1], facts["scale"] or 1.0
    key_norm = p["k_square"].sum((0, 2))
    found = {
        "key_shift": dk_sum.square().sum((0, 2)),
        "key_norm": key_norm,
        "euler_q": _per_group(q_dq.sum((0, 2)), groups),
        "euler_k": k_dk.sum((0, 2)),
        "euler_norm": _per_group(q_dq.square().sum((0, 2)), groups) + k_dk.square().sum((0, 2)),
        "euler_noise": _per_group(p["q_noise"].sum((0, 2)), groups) + p["k_noise"].sum((0, 2)),
        "grad_q": p["q_square"].sum((0, 2)),
        "grad_v": p["v_square"].sum((0, 2)),
    }
    if "delta" in p:
        delta, value_heads = p["delta"], dv_sum.shape[1]
        do_sum = _like(_heads_together(p["do_sum"], value_heads), dv_sum)
        u = _like(_heads_together(p["delta_q"], groups), dk_sum) * scale
        unsure = _per_group(p["unsure"].sum((0, 2)), groups)  # of rowsum(dO * O), O rounded, and what it does to dK
        found |= {
            "value_mass": (dv_sum - do_sum).square().sum((0, 2)),
            "value_norm": do_sum.square().sum((0, 2)) + dv_sum.square().sum((0, 2)),
            "bias_num": -(dk_sum * u).sum((0, 2)),
            "bias_den": u.square().sum((0, 2)),
            "key_noise": unsure * scale**2,
            "delta": delta.sum((0, 2)),
            "delta_sign": delta.sign().sum((0, 2)),
            "delta_rows": torch.full_like(delta[0, :, 0], delta.shape[0] * delta.shape[2]),
            "grad_out": p["out_square"].sum((0, 2)),
        }
        if "v_underflow" in p:
            found["value_norm"] += p["v_underflow"] / value_heads
        if "k_underflow" in p:
            found["key_noise"] += p["k_underflow"] / groups
    present = [role for role in _ROLES if f"{role}_square" in p]
    found["grad_nonfinite"] = torch.stack([_whole(p[f"{role}_lost"]) for role in present])
    found["grad_absmax"] = torch.stack([p[f"{role}_largest"].amax().float() for role in present])
    return found


backward = TwoStages(_backward_first, _backward_rest)
"""The laws' sums, a key/value head each, and gradient statistics. Without ``out``, those that need only q, k and v."""


def bounded(x: Tensor) -> Tensor:
    """Finite entries cut to a size whose squares can be summed; what is not finite stays so, and makes sums that are not judged."""
    return torch.where(x.abs() < float("inf"), x.clamp(-_LARGEST, _LARGEST), x)


def tiny(x: Tensor) -> float:
    """The square of the smallest normal number of a gradient that may underflow (float16 without loss scaling), else 0.

    Below it an entry's error is absolute, as large as one rounding of that number.
    """
    return torch.finfo(x.dtype).tiny ** 2 if x.dtype == torch.float16 else 0.0


def underflow(x: Tensor) -> float:
    """`tiny` summed over all entries."""
    return x.numel() * tiny(x) if x.dtype == torch.float16 else 0.0


def _per_group(x_H: Tensor, groups: int) -> Tensor:
    """Sums over the query heads of each of ``groups`` key or value heads."""
    return x_H.reshape(groups, -1).sum(1)


def _heads_together(x_BHd: Tensor, groups: int) -> Tensor:
    """As `_per_group`, a batch and a channel each."""
    summed: Tensor = x_BHd.unflatten(1, (groups, -1)).sum(2)
    return summed


def _like(x_BG: Tensor, of_keys: Tensor) -> Tensor:
    """Summed over the batch where one set of keys or values serves all of it."""
    return x_BG.sum(0, keepdim=True) if of_keys.shape[0] == 1 else x_BG


def finish(facts: Facts, q: Mapping[str, Array]) -> Mapping[str, Array]:
    """Merged sums -> metrics. 0/0 is NaN: not available."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: dict[str, Array] = {}
        if "positions" in q:
            present = [role for role in _ROLES if f"{role}_absmax" in q]
            for role, positions in zip(present, q["positions"], strict=True):
                found[f"attention/{role}_rms"] = np.sqrt(q[f"{role}_mean_square"] / positions)
                found[f"attention/{role}_absmax"] = q[f"{role}_absmax"]
            found["attention/nonfinite"] = q["nonfinite"]
            found["attention/near_overflow"] = q["near_overflow"] / q["positions"]
        if "hull" in q:
            found["law/hull"] = q["hull"]
        if "row_count" in q and (q["row_count"].any() or q["nonfinite"].any()):  # else every sampled row was masked
            n = q["row_count"]
            found |= {
                "attention/logit_max": _where_seen(q["row_logit_max"], n),
                "attention/entropy_norm": q["row_entropy_norm"] / q["row_several"],
                "attention/lse_max": _where_seen(q["row_lse_max"], n),
            }
            for name in ("entropy", "sink", "lse"):
                found[f"attention/{name}"] = q[f"row_{name}"] / n
                found[f"attention/{name}_se"] = np.sqrt(q[f"row_{name}_variance"]) / n
        if "shadow_square" in q:
            found["attention/shadow_bias"] = q["shadow_along"] / q["shadow_square"]
            found["attention/shadow_rms"] = found["law/shadow"] = np.sqrt(q["shadow_error"] / q["shadow_square"])
        if "key_norm" in q:
            found |= _finish_backward(facts, q)
    return found


def _where_seen(largest: Array, rows: Array) -> Array:
    """NaN where a maximum is one of nothing: no row saw a key, and nothing else is the matter."""
    return np.where((rows == 0) & (largest == -np.inf), np.nan, largest)


def told(norm: Array) -> Array:
    """NaN for a sum of squares so small that float32 has lost part of them."""
    return np.where(norm > _SMALLEST, norm, np.nan)


def _finish_backward(facts: Facts, q: Mapping[str, Array]) -> dict[str, Array]:
    found = {
        "law/key_shift": np.sqrt(q["key_shift"] / told(q["key_norm"])),
        "law/euler": np.abs(q["euler_q"] - q["euler_k"]) / np.sqrt(told(q["euler_norm"])),
        "law/euler_gain": np.sqrt(q["euler_noise"] / told(q["euler_norm"])),
        "attention/grad_q_norm": np.sqrt(q["grad_q"]),
        "attention/grad_k_norm": np.sqrt(q["key_norm"]),
        "attention/grad_v_norm": np.sqrt(q["grad_v"]),
        "attention/grad_nonfinite": q["grad_nonfinite"],
        "attention/grad_absmax": q["grad_absmax"],
    }
    if "value_norm" in q:
        found |= {
            "law/value_mass": np.sqrt(q["value_mass"] / told(q["value_norm"])),
            "law/key_gain": np.sqrt(q["key_noise"] / told(q["key_norm"])),
            "law/bias_num": q["bias_num"],
            "law/bias_den": q["bias_den"],
            "attention/grad_delta": q["delta"] / q["delta_rows"],
            "attention/grad_delta_sign": q["delta_sign"] / q["delta_rows"],
            "attention/grad_out_norm": np.sqrt(q["grad_out"]),
        }
    return found


ATTENTION = Probe(
    name="attention",
    kind="attention",
    forward=forward,
    finish=finish,
    backward=backward,
    maxima=frozenset(
        {"q_absmax", "k_absmax", "v_absmax", "out_absmax", "hull", "row_logit_max", "row_lse_max", "grad_absmax"}
    ),
)
