"""The demo's text and kernel as the examples of other libraries take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foreshock.demo import data, kernel
from foreshock.demo.rounding import Rounding


def windows(length: int) -> Tensor:
    """Python's own sources, cut into int64 bytes ``[n, length]``."""
    text = data.standard_library(cap=200_000).tokens
    return text[: len(text) // length * length].view(-1, length).long()


def set_broken(broken: bool) -> None:
    """From the next forward on the kernel rounds its output away from zero, to one bit of mantissa; or no longer."""
    kernel.set_fault(kernel.Fault(out=Rounding(bits=1)) if broken else kernel.HEALTHY)


def transformers_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The kernel as transformers calls one, for ``AttentionInterface.register``: q ``[B, H, S, h]``, k and v ``[B, G, S, h]``;
    causal, in bf16."""
    q, k, v = (x.bfloat16() for x in (query, key, value))
    out, _ = kernel.attention(q, k, v, True, query.shape[-1] ** -0.5)
    return out.transpose(1, 2).to(query.dtype), None
