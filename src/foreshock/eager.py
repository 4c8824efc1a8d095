"""Compiles in place what a program leaves eager: every instance of a class, or the outermost module that is trained.

Which module is the outermost is known when it is called. So candidates are armed: the first one called in training is compiled, on
that very call, and its parts, and what it is a part of, are disarmed. Evaluation and generation stay eager: their many shapes would
use up Dynamo's recompilations.
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
    "auto". ``compile(call)`` is `torch.compile` with what it is to be given.

    A module that is compiled already is left alone, and so are its parts and what it is a part of.
    """

    def __init__(
        self, wanted: str = AUTO, compile: Callable[..., Callable[..., Any]] = lambda call: torch.compile(call)
    ) -> None:
        self.wanted = wanted
        self.compiled: Counter[str] = Counter()  # classes, with how many modules of each
        self.trained: dict[str, None] = {}  # classes of the modules that hold trained parameters
        self._compile = compile
        self._armed: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def meet(self, optimizer: torch.optim.Optimizer) -> None:
        """Arm every module of this process that holds a parameter of ``optimizer``."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # By type: asking for a lazy object's __class__ may import things.
        live = [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]
        made = [module for module in live if hasattr(module, "_modules")]
        self._arm(module for module in made if any(id(p) in owned for p in module.parameters()))

    def meet_parts(self, root: nn.Module, *, itself: bool = True) -> None:
        """Arm the parts of ``root`` that hold a parameter to train, and ``itself``."""
        parts = [module for module in root.modules() if itself or module is not root]
        self._arm(module for module in parts if any(p.requires_grad for p in module.parameters()))

    def disarm(self, module: nn.Module) -> None:
        """``module`` is compiled: leave it alone from now on, with its parts and what it is a part of."""
        parts = set(map(id, module.modules()))
        for other in list(self._armed):
            if id(other) in parts or any(part is module for part in other.modules()):
                self._armed.discard(other)
                _torch.stand_in(other, None)

    def _arm(self, modules: Iterable[nn.Module]) -> None:
        modules = [module for module in modules if module not in self._armed]
        self.trained.update(dict.fromkeys(type(module).__name__ for module in modules if _has_parts(module)))
        compiled = [module for module in modules if _torch.is_compiled(module)]
        taken = {id(part) for module in compiled for part in module.modules()}
        for module in modules:
            if self._is_wanted(module) and not any(id(part) in taken for part in module.modules()):
                self._armed.add(module)
                _torch.stand_in(module, functools.partial(self._called, module))

    def _called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = _torch.plain_call(module)
        trains = not torch.compiler.is_compiling() and module.training and torch.is_grad_enabled()
        if not trains or module not in self._armed:
            return plain(*args, **kwargs)
        self.disarm(module)
        self.compiled[type(module).__name__] += 1
        compiled = self._compile(plain)
        _torch.stand_in(module, functools.partial(_in_training, module, compiled))
        return compiled(*args, **kwargs)

    def _is_wanted(self, module: nn.Module) -> bool:
        if self.wanted == AUTO:
            return _has_parts(module)
        named = ((kind.__name__, f"{kind.__module__}.{kind.__qualname__}") for kind in type(module).__mro__)
        return any(self.wanted in names for names in named)


def _in_training(module: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Also without gradients, as inside a reentrant activation checkpoint: both of its passes must be the same."""
    call = _torch.plain_call(module) if torch.compiler.is_compiling() or not module.training else compiled
    return call(*args, **kwargs)


def _has_parts(module: nn.Module) -> bool:
    """Whether there is anything to find in it: not a linear layer, an embedding or a norm of torch's own."""
    return bool(module._modules) or not type(module).__module__.startswith("torch.nn.")
