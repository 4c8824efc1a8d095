"""What one would do without foreshock: hooks around kernels and routers that compute the same statistics.

They are kept out of the compiled graphs with `torch._dynamo.disable`, as hooks that collect numbers must be, and so break them.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformer import Kernel, Router

from foreshock.monitors.attention_probe import ATTENTION
from foreshock.monitors.router_probe import ROUTER

ROWS = 16


class Collected:
    """The statistics of the step under way, a packed vector each, as foreshock has them."""

    def __init__(self, model: nn.Module) -> None:
        self.vectors: list[Tensor] = []
        _give_own_code(model)
        for module in model.modules():
            if isinstance(module, Kernel):
                module.register_forward_hook(torch._dynamo.disable(self._around_kernel))
            if isinstance(module, Router):
                module.register_forward_hook(torch._dynamo.disable(self._behind_router))

    def numbers(self) -> list[Any]:
        """Everything of the step on the host; the next one begins empty."""
        found = [vector.to("cpu", torch.float64).numpy() for vector in self.vectors]
        self.vectors.clear()
        return found

    def _around_kernel(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        tensors = dict(zip("qkv", args, strict=True)) | {"out": out}
        facts = {"rows": ROWS, "causal": True, "scale": 1 / math.sqrt(args[0].shape[-1]), "dropout": 0.0, "layout": {}}
        self._read(ATTENTION, facts, tensors, ("q", "k", "v", "out"))

    def _behind_router(self, module: nn.Module, args: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
        logits, scores, _, indices = results
        facts = {"experts": logits.shape[-1], "top_k": indices.shape[-1], "scoring": "softmax"}
        tensors = {"logits": logits, "scores": scores, "indices": indices, "input": args[0]}
        self._read(ROUTER, facts, tensors, ("logits",))

    def _read(self, probe: Any, facts: Any, tensors: dict[str, Tensor], roles: tuple[str, ...]) -> None:
        detached = {role: x.detach() for role, x in tensors.items()}
        with torch.no_grad():
            self._keep(probe.forward(facts, detached, torch.rand(2 * ROWS, device=detached[roles[0]].device)))
        gradients: dict[str, Tensor] = {}

        def arrived(role: str, gradient: Tensor | None) -> None:
            # None: the router is a graph of its own, inside of which all of its logits' gradient stays
            gradients[role] = torch.zeros_like(detached[role]) if gradient is None else gradient
            if len(gradients) == len(roles):
                with torch.no_grad():
                    self._keep(probe.backward(facts, detached, gradients))

        for role in roles:
            tensors[role].register_hook(lambda gradient, role=role: arrived(role, gradient))

    def _keep(self, found: Any) -> None:
        self.vectors.append(torch.cat([x.reshape(-1).float() for x in found.values()]))


def _give_own_code(model: nn.Module) -> None:
    """Dynamo remembers of a code object that the loop in it is broken, and would split the graphs of models without hooks too."""
    own: dict[Any, Any] = {}
    for module in model.modules():
        forward: Any = type(module).forward
        if forward not in own:
            own[forward] = types.FunctionType(
                forward.__code__.replace(),
                forward.__globals__,
                argdefs=forward.__defaults__,
                closure=forward.__closure__,
            )
            own[forward].__kwdefaults__ = forward.__kwdefaults__
        module.forward = types.MethodType(own[forward], module)
