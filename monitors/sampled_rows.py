"""Rows of an attention recomputed in fp32: entropy, logsumexp, sink, and a shadow of the output.

Shape suffixes: B batch, S queries, T keys, H query heads, G key/value heads, h head dim, v value dim, N sampled sequences,
R sampled rows a sequence. `take` picks rows of the large tensors, `measured` works on these. Definitions:
`foreshock.monitors.metrics`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock.records import Facts, Tensors

_NOTHING = 1e30  # stands for the logarithm of no probability, whose share is zero
SEQUENCES = 4  # sampled sequences a call: rows of one sequence are correlated, copies of all keys are not free
HIDDEN = 9e3  # in logits as they were computed: a key so far below the row's largest, or below zero, is masked (by -1e4 or more)


def take(facts: Facts, t: Tensors, rows: Tensor) -> dict[str, Tensor]:
    """Of ``[B, H, S, d]`` tensors what the sampled rows need; keys and values of a kernel whole, for those are in memory."""
    q_BHSh, k_BGTh, v_BGTv = t["q"], t["k"], t["v"]
    queries, keys = q_BHSh.shape[2], k_BGTh.shape[2]
    batch = t["out"].shape[0] if "out" in t else q_BHSh.shape[0]
    sequences = min(SEQUENCES, batch, facts["rows"]) if isinstance(batch, int) else 1
    each = facts["rows"] // sequences
    b_N = (rows[facts["rows"] : facts["rows"] + sequences] * batch).long().clamp(max=batch - 1)
    strata = torch.arange(each, device=rows.device) + rows[: sequences * each].reshape(sequences, each)
    i_NR = (strata / each * queries).long().clamp(max=queries - 1)

    def pick(x_BHSd: Tensor) -> Tensor:  # [N, H, R, d]
        return x_BHSd.transpose(1, 2)[_sequence(x_BHSd, b_N).unsqueeze(1), i_NR].transpose(1, 2)

    found = {"b": b_N, "i": i_NR}
    if "logits" in t:
        row, first = pick(t["logits"]).float(), facts.get("first_key", 0)
        found |= {"row": row, "key_row": row[..., first : first + keys]}
    else:
        found |= {"q_row": pick(q_BHSh).float(), "k": k_BGTh}
        if (mask := t.get("mask")) is not None:
            while mask.ndim < 4:
                mask = mask.unsqueeze(0)
            picked = pick(mask.expand(batch, mask.shape[1], queries, keys))
            found["mask_row"] = picked if picked.dtype == torch.bool else picked.float()
    if _has_shadow(facts, t):
        whole = "logits" not in t
        found |= {"out_row": pick(t["out"]).float(), "v": v_BGTv if whole else _of_sequences(v_BGTv, b_N)}
    return found


def _has_shadow(facts: Facts, t: Tensors) -> bool:
    return facts["dropout"] == 0.0 and bool(facts.get("shadow", True)) and "out" in t


def _sequence(x_BH: Tensor, b_N: Tensor) -> Tensor:
    """``[N]``: one that serves the whole batch is every sequence's."""
    return b_N.clamp(max=x_BH.shape[0] - 1)


def _of_sequences(x_BGTd: Tensor, b_N: Tensor) -> Tensor:
    return x_BGTd.index_select(0, _sequence(x_BGTd, b_N)).float()


def measured(facts: Facts, p: Tensors) -> dict[str, Tensor]:
    """Sums and maxima over the rows that `take` took, ``[H]`` each. Rows that see no key, or no number, are left out."""
    i_NR = p["i"]
    sequences, each = i_NR.shape
    beside: Tensor | None = None  # columns of the softmax that are no keys
    visible: Tensor | None
    if "row" in p:
        row, logits, first = p["row"], p["key_row"], facts.get("first_key", 0)
        keys, top = logits.shape[-1], row.amax(-1, keepdim=True)
        hidden = (row <= top - HIDDEN) | (top < -HIDDEN)
        if facts.get("sinks"):
            beside = torch.cat([row[..., :first], row[..., first + keys :]], -1)
        visible, bias = ~hidden[..., first : first + keys], None
    else:
        q_row, k_NGTh = p["q_row"], _chosen(p["k"], p["b"])
        keys = k_NGTh.shape[2]
        q_NGQh = q_row.reshape(sequences, k_NGTh.shape[1], -1, q_row.shape[3]) * facts["scale"]
        logits = (q_NGQh @ k_NGTh.transpose(2, 3)).reshape(sequences, -1, each, keys)
        visible, bias = _visible(facts, p.get("mask_row"), i_NR, keys)
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = torch.where(visible, logits, float("-inf"))
    heads = logits.shape[1]
    seen_NHR = _count_visible(visible, i_NR, keys).expand(sequences, heads, each)
    largest_NHR = logits.amax(-1)
    alive = (seen_NHR > 0) & torch.isfinite(largest_NHR)
    every = logits if beside is None else torch.cat([logits, beside], -1)
    log_p = every.log_softmax(
        -1
    )  # less the largest first, then less the sum's logarithm: no digit of a large logit is lost
    lse = (largest_NHR if beside is None else every.amax(-1)) - log_p.amax(-1)
    log_p = log_p[..., :keys]
    p_NHRT = every.softmax(-1)[..., :keys]
    entropy = -(p_NHRT * log_p.clamp(min=-_NOTHING)).sum(-1)
    if "mask_row" in p or "row" in p:
        assert visible is not None
        first_visible = visible.float().argmax(-1, keepdim=True).expand(sequences, heads, each, 1)
        sink = p_NHRT.gather(-1, first_visible)[..., 0]
    else:
        sink = p_NHRT[..., 0]
    several = alive & (seen_NHR > 1)
    found = {
        "row_logit_max": largest_NHR.amax((0, 2)),
        "row_lse_max": torch.where(alive, lse, float("-inf")).amax((0, 2)),
        "row_entropy_norm": torch.where(several, entropy / seen_NHR.clamp(min=2.0).log(), 0.0).sum((0, 2)),
        "row_several": several.sum((0, 2)).float(),
    }
    count = alive.sum((0, 2)).float()
    means = torch.where(alive, torch.stack([entropy, sink, lse]), 0.0)
    sums, scatter = means.sum((1, 3)), _scatter(means, alive, count)
    found["row_count"] = count
    for index, name in enumerate(("entropy", "sink", "lse")):
        found |= {f"row_{name}": sums[index], f"row_{name}_variance": scatter[index]}
    if "out_row" in p:
        v_NGTv = _chosen(p["v"], p["b"]) if "row" not in p else p["v"]
        p_NGQT = p_NHRT.reshape(sequences, v_NGTv.shape[1], -1, keys)
        shadow = torch.where(alive.unsqueeze(-1), (p_NGQT @ v_NGTv).reshape(sequences, heads, each, -1), 0.0)
        error = torch.where(alive.unsqueeze(-1), p["out_row"] - shadow, 0.0)
        found["shadow_along"] = (error * shadow).sum((0, 2, 3))
        found["shadow_square"] = shadow.square().sum((0, 2, 3))
        found["shadow_error"] = error.square().sum((0, 2, 3))
    return found


def _chosen(x_BGTd: Tensor, b_N: Tensor) -> Tensor:
    """Keys or values of the sampled sequences, fp32; no copy where there is one sequence for all."""
    one = b_N.shape[0] == 1 and x_BGTd.shape[0] == 1
    return x_BGTd.float() if one else _of_sequences(x_BGTd, b_N)


def _count_visible(visible: Tensor | None, i_NR: Tensor, keys: int) -> Tensor:
    """How many keys each row sees, fp32: broadcasts to ``[N, H, R]``."""
    if visible is not None:
        return visible.sum(-1).float()
    return torch.full_like(i_NR, keys, dtype=torch.float32).unsqueeze(1)


def _scatter(x_KNHR: Tensor, alive_NHR: Tensor, n_H: Tensor) -> Tensor:
    """n times the variance of each head's rows in this call, ``[K, H]``; NaN for a single row, of which it is not known.

    Each call draws its own rows, and every call of a step counts: what they differ by from each other is no error of a mean.
    """
    mean = x_KNHR.sum((1, 3)) / n_H.clamp(min=1)
    squares = torch.where(alive_NHR, x_KNHR - mean[:, None, :, None], 0.0).square().sum((1, 3))
    return torch.where(n_H > 1, squares * n_H / (n_H - 1).clamp(min=1), torch.where(n_H == 1, float("nan"), 0.0))


def _visible(facts: Facts, mask_row: Tensor | None, i_NR: Tensor, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """Which keys each sampled row sees, and what is added to its logits; each broadcasts to ``[N, H, R, T]``."""
    visible = bias = None
    if facts["causal"]:
        visible = (torch.arange(keys, device=i_NR.device) <= i_NR.unsqueeze(-1)).unsqueeze(1)
    if mask_row is not None:
        if mask_row.dtype == torch.bool:
            seen = mask_row
        else:
            seen, bias = mask_row > -HIDDEN, mask_row
        visible = seen if visible is None else visible & seen
    return visible, bias
