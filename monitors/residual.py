"""Massive activations of the residual stream (arXiv 2402.17762): few channels, the same for all inputs, far larger than the rest.

Read where an attention's projected output is added to the stream, before the sum. Size of a channel: its largest magnitude over
all tokens. Typical size: the median over channels of a channel's mean magnitude; unlike the median of all entries, which the
paper takes (0.85 of it where entries are normal), it adds up over microbatches.

Shape suffixes: B batch, S sequence, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from foreshock.records import Array, Facts, Probe, Tensors

MASSIVE = 100.0  # times the typical size, as in arXiv 2402.17762
TOP = 5  # channels that are named


def forward(facts: Facts, tensors: Tensors, rows: Tensor) -> Mapping[str, Tensor]:
    """Of each channel its largest magnitude and the sum of magnitudes, ``[D]``; nothing where no stream was found."""
    if "residual" not in tensors:
        return {}
    size_TD = tensors["residual"].float().abs().flatten(0, -2)
    return {
        "residual_absmax": size_TD.amax(0),
        "residual_sum": size_TD.sum(0),
        "residual_square": size_TD.square().sum(),
        "residual_tokens": torch.ones((), dtype=torch.float32, device=size_TD.device) * size_TD.shape[0],
    }


def finish(facts: Facts, q: Mapping[str, Array]) -> Mapping[str, Array]:
    """Merged sums -> metrics. Where a channel holds NaN there is no typical size, and ratios are NaN."""
    if "residual_tokens" not in q:
        return {}
    largest_D, tokens = q["residual_absmax"], q["residual_tokens"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_D = largest_D / np.median(q["residual_sum"] / tokens)
        top = np.argsort(-largest_D, kind="stable")[:TOP]
        known = not np.isnan(ratio_D).any()
        return {
            "residual/rms": np.sqrt(q["residual_square"] / tokens / len(largest_D)),
            "residual/absmax": largest_D.max(keepdims=True),
            "residual/massive_channels": np.array([np.sum(ratio_D > MASSIVE) if known else np.nan], dtype=np.float64),
            "residual/top_channels": top.astype(np.float64),
            "residual/top_ratio": ratio_D[top],
        }


RESIDUAL = Probe("residual", "attention", forward, finish, maxima=frozenset({"residual_absmax"}))
