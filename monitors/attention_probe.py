"""What is measured at an attention boundary: tensor statistics, sampled rows recomputed in fp32, and the laws' sums.

Shape suffixes: B batch, S queries, T keys, H query heads, G key/value heads, h head dim, v value dim, N sampled sequences,
R sampled rows a sequence. Definitions and sources: `foreshock.monitors.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from foreshock.layout import canonical
from foreshock.records import Array, Facts, Probe, Tensors

SEQUENCES = 4  # sampled sequences a call: rows of one sequence are correlated, copies of all keys are not free
_ROLES = ("q", "k", "v", "out")
_LARGEST = (
    1e15  # of a finite gradient as the laws count it: a flipped exponent bit would hide behind an infinite square
)
_SMALLEST = 1e-30  # sum of squares that a residual is taken of
_HIDDEN = 9e3  # in logits as they were computed: a key so far below the row's largest, or below zero, is masked (by -1e4 or more)


def _heads_first(facts: Facts, tensors: Tensors) -> dict[str, Tensor]:
    layout = facts["layout"]
    return {role: canonical(x, layout[role]) if role in layout else x for role, x in tensors.items()}


# Whatever is asked of all entries of a head goes over positions first: one order for all of it is one pass over the tensor.


def _sum(x_BHSd: Tensor) -> Tensor:
    """``[H]``"""
    return x_BHSd.sum(2).sum((0, 2))


def _largest(x_BHSd: Tensor) -> Tensor:
    """``[H]``"""
    return x_BHSd.amax(2).amax((0, 2)).float()


def _count(where_BHSd: Tensor) -> Tensor:
    """A whole number, and exact."""
    return where_BHSd.sum(2, dtype=torch.int32).sum().float()


def forward(facts: Facts, tensors: Tensors, rows: Tensor) -> Mapping[str, Tensor]:
    """Sums over batch and positions, a head each; sampled rows where logits are at hand, or causality, mask and scale are known.

    Roles are q, k, v and, where they have tensors of their own, out, logits (``[B, H, S, T]`` as they enter the softmax) and mask.
    """
    t = _heads_first(facts, tensors)
    found: dict[str, Tensor] = {}
    present = [role for role in _ROLES if role in t]
    positions = [torch.ones_like(t[role][:, 0, :, 0], dtype=torch.float32).sum() for role in present]
    lost, near = [], []
    for role, many in zip(present, positions, strict=True):  # means count by their positions: microbatches may differ
        x, size = t[role].float(), t[role].abs()
        found[f"{role}_mean_square"] = _sum(x.square()) / (x.numel() / x.shape[1]) * many
        found[f"{role}_absmax"] = _largest(size)
        lost.append(_count(~torch.isfinite(t[role])))
        near.append(_count(size > torch.finfo(size.dtype).max / 2) / x.numel() * many)
    if "out" in t:
        found["hull"] = _beyond_hull(t["out"], t["v"])
    found["positions"] = torch.stack(positions)
    found["nonfinite"] = torch.stack(lost)
    found["near_overflow"] = torch.stack(near)
    if facts["rows"]:
        found.update(_sampled_rows(facts, t, rows))
    return found


def _beyond_hull(out_BHSv: Tensor, v_BGTv: Tensor) -> Tensor:
    """How far an output lies beyond the smallest or largest of its channel's values, in units of the channel's largest: ``[H]``.

    Zero counts as a value: a row without keys is zero, and columns that are no keys (sinks) take part of each row. A row of NaN,
    which some kernels make of no keys, says nothing here; a NaN is an event of its own.
    """
    each, tiny = out_BHSv.shape[1] // v_BGTv.shape[1], torch.finfo(v_BGTv.dtype).tiny
    low, high = (
        x.float().unsqueeze(2).expand(-1, -1, each, -1).flatten(1, 2)
        for x in (v_BGTv.amin(2).clamp(max=0), v_BGTv.amax(2).clamp(min=0))
    )
    told = torch.where(out_BHSv == out_BHSv, out_BHSv, 0.0)  # `isnan` is no vector instruction
    over, under = told.amax(2).float() - high, low - told.amin(2).float()
    beyond = torch.maximum(over, under) / torch.maximum(high, -low).clamp(min=tiny)
    return torch.where(torch.isnan(beyond), 0.0, beyond).clamp(min=0).amax((0, 2))


def _sampled_rows(facts: Facts, t: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    q_BHSh, k_BGTh, v_BGTv = t["q"], t["k"], t["v"]
    heads, queries = q_BHSh.shape[1], q_BHSh.shape[2]
    groups, keys = k_BGTh.shape[1], k_BGTh.shape[2]
    batch = t["out"].shape[0] if "out" in t else q_BHSh.shape[0]
    sequences = min(SEQUENCES, batch, facts["rows"]) if isinstance(batch, int) else 1
    each = facts["rows"] // sequences
    b_N = (rows[facts["rows"] : facts["rows"] + sequences] * batch).long().clamp(max=batch - 1)
    strata = torch.arange(each, device=rows.device) + rows[: sequences * each].reshape(sequences, each)
    i_NR = (strata / each * queries).long().clamp(max=queries - 1)

    def sequence(x_BH: Tensor) -> Tensor:  # [N]: one that serves the whole batch is every sequence's
        return b_N.clamp(max=x_BH.shape[0] - 1)

    def pick(x_BHSd: Tensor) -> Tensor:  # [N, H, R, d], fp32
        return x_BHSd.transpose(1, 2)[sequence(x_BHSd).unsqueeze(1), i_NR].transpose(1, 2).float()

    def grouped(groups: int) -> tuple[int, int, int]:
        return sequences, groups, (heads // groups) * each

    beside: Tensor | None = None  # columns of the softmax that are no keys
    visible: Tensor | None
    if "logits" in t:
        first, row = facts.get("first_key", 0), pick(t["logits"])
        top = row.amax(-1, keepdim=True)
        hidden = (row <= top - _HIDDEN) | (top < -_HIDDEN)
        logits = row[..., first : first + keys]
        if facts.get("sinks"):
            beside = torch.cat([row[..., :first], row[..., first + keys :]], -1)
        visible, bias = ~hidden[..., first : first + keys], None
    else:
        q_NGQh = pick(q_BHSh).reshape(*grouped(groups), -1)
        k_NGTh = k_BGTh.index_select(0, sequence(k_BGTh)).float()
        logits = (q_NGQh @ k_NGTh.transpose(2, 3) * facts["scale"]).reshape(sequences, heads, each, keys)
        visible, bias = _visible(facts, t.get("mask"), b_N, i_NR, (batch, queries, keys))
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = torch.where(visible, logits, float("-inf"))
        visible_count = visible.sum(-1, keepdim=True).float().expand(sequences, heads, each, 1)[..., 0]
    else:
        visible_count = torch.full_like(logits[..., 0], keys)
    alive = (visible_count > 0) & torch.isfinite(logits.amax(-1))
    every = logits if beside is None else torch.cat([logits, beside], -1)
    top = torch.where(alive, every.amax(-1), 0.0).unsqueeze(-1)
    log_sum = torch.where(alive.unsqueeze(-1), (every - top).exp().sum(-1, keepdim=True), 1.0).log()
    lse = torch.where(alive, (top + log_sum)[..., 0], 0.0)
    log_p = logits - top - log_sum  # and not less lse: digits of a large logit would be lost
    p = torch.where(alive.unsqueeze(-1), log_p.exp(), 0.0)
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    first_visible = (
        torch.zeros_like(logits[..., :1]).long()
        if visible is None
        else (visible.float().argmax(-1, keepdim=True).expand(sequences, heads, each, 1))
    )
    sink = p.gather(-1, first_visible)[..., 0]
    log_visible = torch.where(visible_count > 1, visible_count, 2.0).log()
    several = alive & (visible_count > 1)
    found = {
        "row_count": alive.float().sum((0, 2)),
        "row_logit_max": logits.amax((0, 2, 3)),
        "row_entropy": entropy.sum((0, 2)),
        "row_entropy_norm": torch.where(several, entropy / log_visible, 0.0).sum((0, 2)),
        "row_several": several.float().sum((0, 2)),
        "row_sink": sink.sum((0, 2)),
        "row_lse": lse.sum((0, 2)),
        "row_lse_max": torch.where(alive, lse, float("-inf")).amax((0, 2)),
        **{
            f"row_{name}_variance": _scatter(x, alive)
            for name, x in (("entropy", entropy), ("sink", sink), ("lse", lse))
        },
    }
    if facts["dropout"] == 0.0 and facts.get("shadow", True) and "out" in t:
        v_NGTv = v_BGTv.index_select(0, sequence(v_BGTv)).float()
        shadow = (p.reshape(*grouped(v_BGTv.shape[1]), keys) @ v_NGTv).reshape(sequences, heads, each, -1)
        error = torch.where(alive.unsqueeze(-1), pick(t["out"]) - shadow, 0.0)
        found["shadow_along"] = (error * shadow).sum((0, 2, 3))
        found["shadow_square"] = shadow.square().sum((0, 2, 3))
        found["shadow_error"] = error.square().sum((0, 2, 3))
    return found


def _scatter(x_NHR: Tensor, alive_NHR: Tensor) -> Tensor:
    """n times the variance of each head's rows in this call, ``[H]``; NaN for a single row, of which it is not known.

    Each call draws its own rows, and every call of a step counts: what they differ by from each other is no error of a mean.
    """
    n = alive_NHR.float().sum((0, 2))
    mean = torch.where(alive_NHR, x_NHR, 0.0).sum((0, 2)) / n.clamp(min=1)
    squares = torch.where(alive_NHR, x_NHR - mean[:, None], 0.0).square().sum((0, 2))
    return torch.where(n > 1, squares * n / (n - 1).clamp(min=1), torch.where(n == 1, float("nan"), 0.0))


def _visible(
    facts: Facts, mask: Tensor | None, b_N: Tensor, i_NR: Tensor, sizes: tuple[int, int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Which keys each sampled row sees, and what is added to its logits; each broadcasts to ``[N, H, R, T]``."""
    visible = bias = None
    batch, queries, keys = sizes
    if facts["causal"]:
        visible = (torch.arange(keys, device=i_NR.device) <= i_NR.unsqueeze(-1)).unsqueeze(1)
    if mask is not None:
        while mask.ndim < 4:
            mask = mask.unsqueeze(0)
        picked = (
            mask.expand(batch, mask.shape[1], queries, keys).transpose(1, 2)[b_N.unsqueeze(1), i_NR].transpose(1, 2)
        )
        if picked.dtype == torch.bool:
            seen = picked
        else:
            seen, bias = picked > -_HIDDEN, picked.float()
        visible = seen if visible is None else visible & seen
    return visible, bias


def backward(facts: Facts, tensors: Tensors, gradients: Tensors) -> Mapping[str, Tensor]:
    """The laws' sums, a key/value head each, and gradient statistics. Without ``out``, those that need only q, k and v."""
    t = {role: x.float() for role, x in _heads_first(facts, tensors).items()}
    raw = _heads_first(facts, {role: gradients[role] for role in _ROLES if role in gradients})
    g = {role: bounded(x.float()) for role, x in raw.items()}
    q, k, dq, dk, dv = t["q"], t["k"], g["q"], g["k"], g["v"]
    groups, scale = k.shape[1], facts["scale"] or 1.0
    dk_sum, dv_sum = dk.sum(2), dv.sum(2)
    q_dq, k_dk, q_square = (q * dq).sum(3), (k * dk).sum(3), q.square().sum(3)
    key_norm = _sum(dk.square())
    noise_q, noise_k = _sum((q * dq).square()), _sum((k * dk).square())
    if smallest := tiny(gradients["q"]):
        noise_q = noise_q + smallest * q_square.sum((0, 2))
    if smallest := tiny(gradients["k"]):
        noise_k = noise_k + smallest * _sum(k.square())
    found = {
        "key_shift": dk_sum.square().sum((0, 2)),
        "key_norm": key_norm,
        "euler_q": _per_group(q_dq.sum((0, 2)), groups),
        "euler_k": k_dk.sum((0, 2)),
        "euler_norm": _per_group(q_dq.square().sum((0, 2)), groups) + k_dk.square().sum((0, 2)),
        "euler_noise": _per_group(noise_q, groups) + noise_k,
        "grad_q": _sum(dq.square()),
        "grad_v": _sum(dv.square()),
    }
    if "out" in t:
        do, do_o = g["out"], g["out"] * t["out"]
        do_sum = _like(_heads_together(do.sum(2), dv.shape[1]), dv_sum)
        delta = do_o.sum(3)
        u = _like(_heads_together((delta.unsqueeze(3) * q).sum(2), groups), dk_sum) * scale
        unsure = do_o.square().sum(3) * q_square  # of rowsum(dO * O), O rounded, and what it does to dK
        found |= {
            "value_mass": (dv_sum - do_sum).square().sum((0, 2)),
            "value_norm": do_sum.square().sum((0, 2))
            + dv_sum.square().sum((0, 2))
            + underflow(gradients["v"]) / dv.shape[1],
            "bias_num": -(dk_sum * u).sum((0, 2)),
            "bias_den": u.square().sum((0, 2)),
            "key_noise": _per_group(unsure.sum((0, 2)), groups) * scale**2 + underflow(gradients["k"]) / groups,
            "delta": delta.sum((0, 2)),
            "delta_sign": delta.sign().sum((0, 2)),
            "delta_rows": torch.ones_like(delta).sum((0, 2)),
            "grad_out": _sum(do.square()),
        }
    found["grad_nonfinite"] = torch.stack([_count(~torch.isfinite(x)) for x in raw.values()])
    found["grad_absmax"] = torch.stack([_largest(x.abs()).amax() for x in raw.values()])
    return found


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
