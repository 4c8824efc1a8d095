"""Gradient taps: two functional ops that read gradients where they enter and leave a kernel.

``foreshock::enter(inputs, slot, spec)`` stands before the kernel, ``foreshock::exit(out, carriers)`` behind it. Forward, both
are views. Backward, ``exit`` sees dO and hands dO and O back to ``enter`` as the "gradients" of two carriers (free
expanded views of the first input); ``enter`` then holds every input, output and gradient of the kernel at once, computes the
site's statistics with the function registered for it, and returns them as the gradient of ``slot``.

Both ops are composite: autograd and the compilers see through them to ordinary torch ops, and the compile caches accept
them as ops, which they do not with Python functions in the graph. ``spec`` is a JSON string; it names the statistics and
carries everything they depend on, so that it is part of every cache key.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Spec = Mapping[str, Any]
# (spec, tensors by role, gradients by role) -> tensors whose concatenation is the site's piece of the slot
Statistics = Callable[[Spec, Mapping[str, Tensor], Mapping[str, Tensor]], list[Tensor]]

_log = logging.getLogger("foreshock")
_statistics: dict[str, Statistics] = {}
_on_error: dict[str, Callable[[Exception], None]] = {}
_library = torch.library.Library("foreshock", "DEF")
_library.define("enter(Tensor[] inputs, Tensor slot, str spec) -> Tensor[]")
_library.define("exit(Tensor out, Tensor[] carriers) -> Tensor")


def register_statistics(name: str, function: Statistics, on_error: Callable[[Exception], None] | None = None) -> None:
    """Make ``function`` available to taps whose spec says ``{"statistics": name}``.

    Where it fails, ``on_error`` is told (the log, if there is none), the site's piece is NaN and the backward goes on.
    """
    _statistics[name] = function
    _on_error[name] = on_error or functools.partial(_warn, name)


def _warn(name: str, error: Exception) -> None:
    _log.warning("reading gradients with `%s` failed: %s; they are left out", name, error)


@functools.lru_cache(maxsize=4096)
def _parse(spec: str) -> Spec:
    parsed: Spec = json.loads(spec)
    return parsed


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: str, slot: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.spec, ctx.slot_size = spec, slot.shape[0]
        ctx.set_materialize_grads(False)
        views = tuple(x.view_as(x) for x in inputs)
        width = _parse(spec).get("carrier_width")
        if width is None:
            return views
        first = inputs[0]
        carrier = first[..., :1].expand(*first.shape[:-1], width)
        return (*views, carrier, carrier.view_as(carrier))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        spec = _parse(ctx.spec)
        roles = spec["roles"]
        tensors = dict(zip(roles, inputs, strict=True))
        arrived = dict(zip(roles, grads[: len(inputs)], strict=True))
        if "carrier_width" in spec:
            arrived["out"] = grads[len(inputs)]
            tensors["out"] = grads[len(inputs) + 1]
        passed_on = grads[: len(inputs)]
        if any(grad is None for grad in (*arrived.values(), *tensors.values())):
            return (None, None, *passed_on)
        detached = {role: grad.detach() for role, grad in arrived.items() if grad is not None}
        try:
            pieces = _statistics[spec["statistics"]](spec, tensors, detached)
            stats = torch.cat([piece.reshape(-1).float() for piece in pieces])
        except Exception as error:
            _on_error[spec["statistics"]](error)
            stats = torch.full((ctx.slot_size,), math.nan, device=inputs[0].device)
        return (None, stats, *passed_on)


class _Exit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *carriers: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        ctx.dtype = carriers[0].dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (out,) = ctx.saved_tensors
        return grad, grad.to(ctx.dtype), out.to(ctx.dtype)


def _enter(inputs: list[Tensor], slot: Tensor, spec: str) -> list[Tensor]:
    apply: Any = _Enter.apply
    return list(apply(spec, slot, *inputs))


def _exit(out: Tensor, carriers: list[Tensor]) -> Tensor:
    apply: Any = _Exit.apply
    result: Tensor = apply(out, *carriers)
    return result


_library.impl("enter", _enter, "CompositeImplicitAutograd")
_library.impl("exit", _exit, "CompositeImplicitAutograd")

ENTER = torch.ops.foreshock.enter.default
EXIT = torch.ops.foreshock.exit.default
