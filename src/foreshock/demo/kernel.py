"""A flash-shaped attention kernel as a third party would ship it: one opaque op with a backward of its own.

Like flash attention it keeps only the output and the row logsumexp, recomputes P in the backward, and corrects the
softmax gradient with ``D = rowsum(dO * O)`` taken from the *stored* O. It works in fp32 inside and speaks bf16 at the
boundary. Healthy rounding is nearest-even to bf16. `set_fault` makes a running kernel round with a bias instead; as the
op is opaque, no graph changes and nothing is recompiled.

Shapes: B batch, H query heads, G key/value heads, R = H / G, S sequence, h head dim.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreshock.demo.rounding import Flip, Rounding, Stochastic, nearest_even


@dataclass(frozen=True)
class Fault:
    """What the kernel gets wrong: how it rounds the stored O, the O that only the backward's D reads, P, and K.

    ``scale``: a factor on the softmax scale. ``diagonal``: how many keys beyond its own a causal row sees. ``noisy_delta``:
    the error of ``delta`` with a sign drawn for each row, as large and without a bias. ``exact_delta``: D from an O that was
    never rounded. ``flip_out``, ``flip_dk``: what befalls the stored O and dK. ``layer`` limits the fault to one of the
    ``layers`` calls that make up a forward (and, in reverse, a backward).
    """

    out: Rounding | Stochastic | None = None
    delta: Rounding | None = None
    p: Rounding | None = None
    k: Rounding | None = None
    scale: float = 1.0
    diagonal: int = 0
    noisy_delta: bool = False
    exact_delta: bool = False
    flip_out: Flip | None = None
    flip_dk: Flip | None = None
    layer: int | None = None
    layers: int = 1


HEALTHY = Fault()
_fault = HEALTHY
_turns: dict[bool, Iterator[int]] = {}


def set_fault(fault: Fault) -> None:
    """Switch the kernel's behaviour from the next forward on."""
    global _fault
    _fault = fault
    layers = range(fault.layers)
    _turns.update({True: itertools.cycle(layers), False: itertools.cycle(reversed(layers))})


def _current(forward: bool) -> Fault:
    if _fault.layer is None or next(_turns[forward]) == _fault.layer:
        return _fault
    return HEALTHY


def _logits(q_BGRSh: Tensor, k_BG1Sh: Tensor, causal: bool, scale: float, diagonal: int) -> Tensor:
    logits = (q_BGRSh @ k_BG1Sh.mT) * scale
    if causal:
        length = logits.shape[-1]
        mask = torch.full((length, length), float("-inf"), device=logits.device).triu(1 + diagonal)
        mask[0, 0] = 0.0  # a row that sees nothing has no softmax
        logits += mask
    return logits


def _key(k_BG1Sh: Tensor, fault: Fault) -> Tensor:
    return fault.k(k_BG1Sh) if fault.k else k_BG1Sh


def _delta(dout: Tensor, out: Tensor, p: Tensor, v: Tensor, fault: Fault) -> Tensor:
    """``D = rowsum(dO * O)``, [..., S, 1], or what the fault makes of it."""
    if fault.exact_delta:
        return (dout * (p @ v)).sum(-1, keepdim=True)
    exact = (dout * out).sum(-1, keepdim=True)
    if fault.delta is None:
        return exact
    wrong = (dout * fault.delta(out)).sum(-1, keepdim=True)
    if not fault.noisy_delta:
        return wrong
    return torch.where(torch.rand_like(exact) < 0.5, wrong, 2 * exact - wrong)


def _grouped(x_BHSh: Tensor, kv_heads: int) -> Tensor:
    batch, heads, length, head_dim = x_BHSh.shape
    return x_BHSh.float().reshape(batch, kv_heads, heads // kv_heads, length, head_dim)


@torch.library.custom_op("flashlite::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, H, S, h], k and v [B, G, S, h] -> out [B, H, S, h] in q's dtype, logsumexp [B, H, S] in fp32."""
    fault = _current(forward=True)
    groups = k.shape[1]
    logits = _logits(_grouped(q, groups), _key(_grouped(k, groups), fault), causal, scale * fault.scale, fault.diagonal)
    top = logits.amax(-1, keepdim=True)
    p = (logits - top).exp()
    mass = p.sum(-1, keepdim=True)
    out = (fault.p or nearest_even)(p) @ _grouped(v, groups) / mass
    lse = (top + mass.log()).squeeze(-1)
    out = (fault.out or nearest_even)(out)
    out = fault.flip_out(out) if fault.flip_out else out
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("flashlite::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtypes."""
    fault = _current(forward=False)
    groups = k.shape[1]
    q_, k_, v_ = (_grouped(x, groups) for x in (q, k, v))
    k_, scale = _key(k_, fault), scale * fault.scale
    dout_, out_ = _grouped(dout, groups), _grouped(out, groups)
    p = (_logits(q_, k_, causal, scale, fault.diagonal) - _grouped(lse.unsqueeze(-1), groups)).exp()
    p = (fault.p or nearest_even)(p)
    dv = (p.mT @ dout_).sum(2)
    ds = nearest_even(p * (dout_ @ v_.mT - _delta(dout_, out_, p, v_, fault))) * scale
    dq, dk = (ds @ k_).flatten(1, 2), (ds.mT @ q_).sum(2)
    dk = fault.flip_dk(dk) if fault.flip_dk else dk
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *attention_backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


attention.register_autograd(_backward, setup_context=_setup)
