"""A flash-shaped attention kernel as a third party would ship it, with a list of ways to get it wrong.

Like flash attention it goes over the keys in blocks with a running maximum, keeps the output and each row's logsumexp, and
recomputes P in the backward. It works in float32 inside and speaks the dtype of its inputs at the boundary. It shares nothing
with foreshock and knows of no law. A `Fault` changes one thing; `CORRECT` changes none.

Shapes: B batch, H query heads, G key/value heads, R = H / G, S positions, h head dim, N a block of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 16
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Fault:
    """What the kernel gets wrong; the defaults are right.

    ``delta`` multiplies D = rowsum(dO * O) in the backward. ``p_bits`` and ``k_bits``: P and K are truncated to so many mantissa
    bits. ``blocks_lost``: that many blocks at the end of the keys are never read. ``stale``: the backward reads the logsumexp of
    the call before. ``ahead``: a row sees so many keys beyond itself. ``heads_swapped``: each query head of a group of two gets
    the other's output. ``exp_clamp``: P is exponentiated without the row's maximum and cut off there. ``normalised``: the output
    is divided by its row's mass. ``dk_scale`` multiplies dK. ``flipped``: that bit of one entry of dV.
    """

    delta: float = 1.0
    p_bits: int = 23
    k_bits: int = 23
    blocks_lost: int = 0
    stale: bool = False
    ahead: int = 0
    heads_swapped: bool = False
    exp_clamp: float = math.inf
    normalised: bool = True
    dk_scale: float = 1.0
    flipped: int | None = None


CORRECT = Fault()
_fault = CORRECT
_lse_before: Tensor | None = None
_lse_now: Tensor | None = None


def use(fault: Fault) -> None:
    """Compute with ``fault`` from the next call on."""
    global _fault, _lse_before, _lse_now
    _fault, _lse_before, _lse_now = fault, None, None


def truncated(x: Tensor, bits: int) -> Tensor:
    return (x.contiguous().view(torch.int32) & -(1 << (23 - bits))).view(torch.float32)


def _in_groups(x_BHSh: Tensor, groups: int) -> Tensor:
    return x_BHSh.float().unflatten(1, (groups, -1))


def _queries(x_BGRSh: Tensor) -> Tensor:
    return x_BGRSh.flip(2) if _fault.heads_swapped else x_BGRSh


def _keys(k_BGSh: Tensor) -> Tensor:
    return truncated(k_BGSh.float(), _fault.k_bits).unsqueeze(2)


def _logits(q_BGRSh: Tensor, k_BG1Nh: Tensor, start: int, causal: bool, scale: float) -> Tensor:
    logits = q_BGRSh @ k_BG1Nh.mT * scale
    if causal:
        rows, columns = torch.arange(logits.shape[-2])[:, None], start + torch.arange(logits.shape[-1])
        logits = logits.masked_fill(columns > rows + _fault.ahead, -torch.inf)
    return logits


@torch.library.custom_op("thirdparty::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q ``[B, H, S, h]``, k and v ``[B, G, S, h]`` -> out like q, logsumexp ``[B, H, S]`` in float32."""
    global _lse_before, _lse_now
    q_BGRSh, k_BG1Sh, v_BG1Sh = _queries(_in_groups(q, k.shape[1])), _keys(k), v.float().unsqueeze(2)
    top = torch.full_like(q_BGRSh[..., :1], -torch.inf if _fault.exp_clamp == math.inf else 0.0)
    mass, out = torch.zeros_like(top), torch.zeros_like(q_BGRSh)
    for start in range(0, k.shape[2] - _fault.blocks_lost * BLOCK, BLOCK):
        logits = _logits(q_BGRSh, k_BG1Sh[..., start : start + BLOCK, :], start, causal, scale)
        higher = torch.maximum(top, logits.amax(-1, keepdim=True)) if _fault.exp_clamp == math.inf else top
        p = (logits - higher).exp().clamp(max=_fault.exp_clamp)
        shrink = (top - higher).exp()
        mass = mass * shrink + p.sum(-1, keepdim=True)
        out = out * shrink + truncated(p, _fault.p_bits) @ v_BG1Sh[..., start : start + BLOCK, :]
        top = higher
    lse = (top + mass.log()).flatten(1, 2).squeeze(-1)
    _lse_before, _lse_now = lse if _lse_now is None else _lse_now, lse
    return (out / mass if _fault.normalised else out).flatten(1, 2).to(q.dtype), lse


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("thirdparty::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtypes."""
    groups, kept = k.shape[1], k.shape[2] - _fault.blocks_lost * BLOCK
    if _fault.stale and _lse_before is not None:
        lse = _lse_before
    q_BGRSh, k_BG1Sh = _queries(_in_groups(q, groups)), _keys(k)[..., :kept, :]
    v_BG1Sh = v.float().unsqueeze(2)[..., :kept, :]
    dout_BGRSh, out_BGRSh = _in_groups(dout, groups), _in_groups(out, groups)
    delta = (dout_BGRSh * out_BGRSh).sum(-1, keepdim=True) * _fault.delta
    logits = _logits(q_BGRSh, k_BG1Sh, 0, causal, scale)
    logits = logits.clamp(max=math.log(_fault.exp_clamp))
    p = truncated((logits - _in_groups(lse.unsqueeze(-1), groups)).exp(), _fault.p_bits)
    ds = p * (dout_BGRSh @ v_BG1Sh.mT - delta) * scale
    dq = _queries(ds @ k_BG1Sh).flatten(1, 2).to(q.dtype)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dk[..., :kept, :] = (ds.mT @ q_BGRSh).sum(2) * _fault.dk_scale
    dv[..., :kept, :] = (p.mT @ dout_BGRSh).sum(2)
    if _fault.flipped is not None:
        entry = dv[0, 0, 3, 1].float().reshape(1)
        dv[0, 0, 3, 1] = (entry.view(torch.int32) ^ (1 << _fault.flipped)).view(torch.float32)[0].to(dv.dtype)
    return dq, dk, dv


@attend_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *attend_backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


attend.register_autograd(_backward, setup_context=_setup)
