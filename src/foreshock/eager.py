"""Compiles in place what a program leaves eager: every instance of a class, or the outermost module that is trained.

Which module is the outermost is known when it is called. So the modules that hold an optimizer's parameters are armed: the first
one called in training is compiled, on that very call, and its parts, and what it is a part of, are disarmed.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from foreshock import _torch

AUTO = "auto"


class Eager:
    """``wanted``: a class, as ``Class`` or ``package.module.Class``, whose instances are compiled, those of subclasses included; or
    "auto". ``compile(module)`` compiles in place.

    A module that is compiled already is left alone, and so are its parts and what it is a part of.
    """

    def __init__(
        self, wanted: str = AUTO, compile: Callable[[nn.Module], None] = lambda module: module.compile()
    ) -> None:
        self.wanted = wanted
        self.compiled: Counter[str] = Counter()  # classes, with how many modules of each
        self.trained: dict[str, None] = {}  # classes of the modules that hold trained parameters
        self._compile = compile
        self._armed: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def meet(self, optimizer: torch.optim.Optimizer) -> None:
        """Arm the modules of this process that hold a parameter of ``optimizer``."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # By type: asking for a lazy object's __class__ may import things.
        live = [
            found for found in gc.get_objects() if issubclass(type(found), nn.Module) and hasattr(found, "_modules")
        ]
        self.arm(module for module in live if any(id(p) in owned for p in module.parameters()))

    def arm(self, modules: Iterable[nn.Module]) -> None:
        """Compile, of ``modules``, those that are called in training before what they are part of."""
        modules = [module for module in modules if module not in self._armed]
        self.trained.update(dict.fromkeys(type(module).__name__ for module in modules if _has_parts(module)))
        compiled = [module for module in modules if _torch.is_compiled(module)]
        taken = {id(part) for module in compiled for part in module.modules()}
        for module in modules:
            if self._is_wanted(module) and not any(id(part) in taken for part in module.modules()):
                self._armed.add(module)
                _torch.stand_in(module, functools.partial(self._called, module))

    def disarm(self, module: nn.Module) -> None:
        """``module`` is compiled: leave it alone from now on, with its parts and what it is a part of."""
        parts = set(map(id, module.modules()))
        for other in list(self._armed):
            if id(other) in parts or any(part is module for part in other.modules()):
                self._armed.discard(other)
                _torch.stand_in(other, None)

    def _called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        trains = not torch.compiler.is_compiling() and module.training and torch.is_grad_enabled()
        if not trains or module not in self._armed:
            return _torch.call_plainly(module, args, kwargs)
        self.disarm(module)
        self.compiled[type(module).__name__] += 1
        self._compile(module)
        return module(*args, **kwargs)

    def _is_wanted(self, module: nn.Module) -> bool:
        if self.wanted == AUTO:
            return _has_parts(module)
        return any(
            self.wanted in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}") for kind in type(module).__mro__
        )


def _has_parts(module: nn.Module) -> bool:
    """Whether there is anything to find in it: not a linear layer, an embedding or a norm of torch's own."""
    return bool(module._modules) or not type(module).__module__.startswith("torch.nn.")
