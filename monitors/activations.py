"""What the numbers at a boundary look like: size, tails, zeros, and how much of them a coarser dtype could not hold.

Each statistic is one series a site. Its values run over the tensors there: q, k, v and out of an attention, the input of a
router; shares of a dtype's range run over the tensors and then over `DTYPES`. Sums are taken over whole tensors, so that
they add up over microbatches of any size. Definitions: `foreshock.monitors.second_tier`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foreshock.monitors.second_tier import DTYPES
from foreshock.records import Array, Facts, Probe, Tensors

ROLES = ("q", "k", "v", "out", "input")


@dataclass(frozen=True, slots=True)
class Range:
    """Of a dtype the smallest normal number, the smallest subnormal one and the largest finite one."""

    normal: float
    subnormal: float
    largest: float


def range_of(dtype: str) -> Range:
    """The `Range` of a floating dtype by name. Exact in float32 for all of `DTYPES`."""
    found = torch.finfo(getattr(torch, dtype))
    return Range(found.smallest_normal, found.smallest_normal * found.eps, found.max)


RANGES = tuple(range_of(dtype) for dtype in DTYPES)


def forward(facts: Facts, tensors: Tensors, rows: Tensor) -> Mapping[str, Tensor]:
    """Over all entries of each of the n tensors present: ``[n]``, and counts beyond each dtype's range, ``[n * dtypes]``."""
    found = [_one(tensors[role]) for role in ROLES if role in tensors]
    return {name: torch.stack([one[name] for one in found]) for name in found[0]} if found else {}


def _one(x: Tensor) -> dict[str, Tensor]:
    size = x.float().abs()
    square = size.square()
    below = [(size < limit).sum() for reach in RANGES for limit in (reach.normal, reach.subnormal)]
    return {
        "activation_count": torch.ones((), dtype=torch.float32, device=x.device) * x.numel(),
        "activation_square": square.sum(),
        "activation_fourth": square.square().sum(),
        "activation_absmax": size.amax(),
        "activation_zero": (size == 0).sum(),
        "activation_below_normal": torch.stack(below[::2]),
        "activation_below_subnormal": torch.stack(below[1::2]),
        "activation_above": torch.stack([(size > reach.largest).sum() for reach in RANGES]),
    }


def finish(facts: Facts, q: Mapping[str, Array]) -> Mapping[str, Array]:
    """Merged sums -> metrics. 0/0 is NaN: not available."""
    if "activation_count" not in q:
        return {}
    count, square, zero = q["activation_count"], q["activation_square"], q["activation_zero"]
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "activation/rms": np.sqrt(square / count),
            "activation/absmax": q["activation_absmax"],
            "activation/kurtosis": count * q["activation_fourth"] / square**2,
            "activation/zero": zero / count,
            "activation/underflow": _share(q["activation_below_normal"], count - zero, zero),
            "activation/vanish": _share(q["activation_below_subnormal"], count - zero, zero),
            "activation/overflow": _share(q["activation_above"], count - zero),
        }


def _share(counts: Array, among: Array, less: Array | float = 0.0) -> Array:
    """``counts`` of each tensor and dtype, without ``less`` of each tensor, over ``among``; one row of values."""
    by_tensor = counts.reshape(len(among), -1) - np.reshape(less, (-1, 1))
    found: Array = (by_tensor / among[:, None]).reshape(-1)
    return found


def activations(kind: str) -> Probe:
    """The probe of sites of ``kind``."""
    return Probe("activations", kind, forward, finish, maxima=frozenset({"activation_absmax"}))
