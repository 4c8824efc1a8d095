"""The ops that foreshock puts into a graph: one reads a boundary forward, two read gradients there, one finishes for either.

``foreshock::read(tensors, rows, spec)`` returns a site's forward statistics as one vector.

``foreshock::enter(inputs, slot, spec)`` stands before the kernel, ``foreshock::leave(x, carriers, layout)`` behind it. Forward,
both are views. Backward, ``leave`` sees dO and hands dO and O back to ``enter`` as the "gradients" of two carriers (free
expanded views of an input); ``enter`` then holds every input, output and gradient of the kernel at once, computes the
site's statistics with the function registered for it, and returns them as the gradient of ``slot``. An operand that is made
only after another has entered (values after logits) takes the same way back as the output.

``foreshock::rest(partials, spec)`` is the second of `TwoStages` on CPU, which no compiler looks into.

The others are composite: autograd and the compilers see through them to ordinary torch ops, and the compile caches accept them as
ops, which they do not with Python functions in the graph. ``spec`` is a JSON string; it names the statistics and carries
everything they depend on, so that it is part of every cache key.
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

from foreshock.layout import canonical
from foreshock.stages import TwoStages

Spec = Mapping[str, Any]
Named = Mapping[str, Tensor]  # tensors by role
# (spec, tensors, gradients or random rows) -> statistics by name
Statistics = Callable[[Spec, Named, Any], Mapping[str, Tensor]]

_log = logging.getLogger("foreshock")
_statistics: dict[str, Statistics] = {}
_on_error: dict[str, Callable[[Exception], None]] = {}
_library = torch.library.Library("foreshock", "DEF")
_library.define("read(Tensor[] tensors, Tensor rows, str spec) -> Tensor")
_library.define("enter(Tensor[] inputs, Tensor slot, str spec) -> Tensor[]")
_library.define("leave(Tensor x, Tensor[] carriers, str layout) -> Tensor")
_library.define(
    "rest(Tensor[] partials, str spec) -> Tensor", tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
)


def register_statistics(name: str, function: Statistics, on_error: Callable[[Exception], None] | None = None) -> None:
    """Make ``function`` available to ops whose spec says ``{"statistics": {name: size}}``, size numbers in all.

    Where it fails, ``on_error`` is told (the log, if there is none), its numbers are NaN and the rest goes on.
    """
    _statistics[name] = function
    _on_error[name] = on_error or functools.partial(_warn, name)


def _warn(name: str, error: Exception) -> None:
    _log.warning("reading statistics with `%s` failed: %s; they are left out", name, error)


@functools.lru_cache(maxsize=4096)
def _parse(spec: str) -> Spec:
    parsed: Spec = json.loads(spec)
    return parsed


def packed(results: Mapping[str, Tensor]) -> Tensor:
    """Statistics as one fp32 vector."""
    return torch.cat([result.reshape(-1).float() for result in results.values()])


def _compute(spec: Spec, tensors: Named, more: Any, device: torch.device) -> Tensor:
    """What each of the spec's statistics says, one behind the other."""
    parts = [_one(name, size, spec, tensors, more, device) for name, size in spec["statistics"].items()]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _one(name: str, size: int, spec: Spec, tensors: Named, more: Any, device: torch.device) -> Tensor:
    try:
        with torch.autocast(device.type, enabled=False):  # in the precision that the probe names
            function = _statistics[name]
            if device.type != "cpu" or not isinstance(function, TwoStages):
                return packed(function(spec, tensors, more))
            partials = function.first(spec, tensors, more)
            rest = {**spec, "statistics": {name: size}, "partials": list(partials)}
            left: Tensor = REST(list(partials.values()), json.dumps(rest))
            return left
    except Exception as error:
        return _missing(name, size, device, error)


def _missing(name: str, size: int, device: torch.device, error: Exception) -> Tensor:
    _on_error[name](error)
    return torch.full((size,), math.nan, dtype=torch.float32, device=device)


def _rest(partials: list[Tensor], spec: str) -> Tensor:
    parsed, device = _parse(spec), partials[0].device
    ((name, size),) = parsed["statistics"].items()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            rest: Any = _statistics[name]
            return packed(rest.rest(parsed, dict(zip(parsed["partials"], partials, strict=True))))
    except Exception as error:
        return _missing(name, size, device, error)


def _rest_of_fakes(partials: list[Tensor], spec: str) -> Tensor:
    (size,) = _parse(spec)["statistics"].values()
    return partials[0].new_empty(size, dtype=torch.float32)


def _read(tensors: list[Tensor], rows: Tensor, spec: str) -> Tensor:
    parsed = _parse(spec)
    named = {role: x.detach() for role, x in zip(parsed["roles"], tensors, strict=True)}
    return _compute(parsed, named, rows, rows.device)


def _carrier(late: Mapping[str, Any], named: Named, layout: Mapping[str, str]) -> Tensor:
    """A view of an input that lies as what comes back through it: like the input, but where ``sizes`` says otherwise with a number
    or with an axis of another input."""
    lead = canonical(named[late["like"]], layout[late["like"]])[..., :1]
    sizes = list(lead.shape[:-1])
    for axis, told in enumerate(late.get("sizes", ())):
        if told is None:
            continue
        lead = lead.narrow(axis, 0, 1)
        sizes[axis] = told if isinstance(told, int) else canonical(named[told[0]], layout[told[0]]).shape[told[1]]
    return lead.expand(*sizes, late["width"])


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: str, slot: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        parsed = _parse(spec)
        named = dict(zip(parsed["roles"], inputs, strict=True))
        carriers = []
        for late in parsed.get("late", ()):
            carrier = _carrier(late, named, parsed["layout"])
            carriers += [carrier, carrier.view_as(carrier)]
        return (*(x.view_as(x) for x in inputs), *carriers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, spec = ctx.saved_tensors, _parse(ctx.spec)
        tensors: dict[str, Tensor | None] = dict(zip(spec["roles"], inputs, strict=True))
        arrived = dict(zip(spec["roles"], grads[: len(inputs)], strict=True))
        for i, late in enumerate(spec.get("late", ())):
            arrived[late["role"]], tensors[late["role"]] = grads[len(inputs) + 2 * i : len(inputs) + 2 * i + 2]
        passed_on = grads[: len(inputs)]
        if any(grad is None for grad in (*arrived.values(), *tensors.values())):
            return (None, None, *passed_on)
        canonical_now = {late["role"]: "b h s d" for late in spec.get("late", ())}
        spec = {**spec, "layout": {**spec["layout"], **canonical_now}} if canonical_now else spec
        detached = {role: grad.detach() for role, grad in arrived.items() if grad is not None}
        known = {role: x for role, x in tensors.items() if x is not None}
        stats = _compute(spec, known, detached, inputs[0].device)
        return (None, stats, *passed_on)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: str, x: Tensor, *carriers: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layout, ctx.dtype = layout, carriers[0].dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return None, grad, *(canonical(t, ctx.layout).to(ctx.dtype) for t in (grad, x))


def _enter(inputs: list[Tensor], slot: Tensor, spec: str) -> list[Tensor]:
    apply: Any = _Enter.apply
    return list(apply(spec, slot, *inputs))


def _leave(x: Tensor, carriers: list[Tensor], layout: str) -> Tensor:
    apply: Any = _Leave.apply
    result: Tensor = apply(layout, x, *carriers)
    return result


_library.impl("read", _read, "CompositeImplicitAutograd")
_library.impl("enter", _enter, "CompositeImplicitAutograd")
_library.impl("leave", _leave, "CompositeImplicitAutograd")
_library.impl("rest", _rest, "CompositeExplicitAutograd")
torch.library.register_fake("foreshock::rest", _rest_of_fakes, lib=_library)

READ = torch.ops.foreshock.read.default
ENTER = torch.ops.foreshock.enter.default
LEAVE = torch.ops.foreshock.leave.default
REST = torch.ops.foreshock.rest.default
