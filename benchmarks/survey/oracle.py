"""Counts the attentions and routers that a run evaluates, by watching its tensors instead of its graph.

This shares nothing with foreshock's matcher: each result of a torch function is tagged with what it was made from, and a softmax
(by any spelling) of a product of data that enters a second product with data is an attention.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_PRODUCTS = frozenset({"matmul", "bmm", "einsum", "baddbmm", "mm", "__matmul__", "__rmatmul__"})
_PROJECTIONS = frozenset(
    {"linear", "addmm", "embedding", "conv1d", "conv2d", "conv3d", "addmv", "bilinear", "gru", "lstm"}
)
_CALLS = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"})
_PRODUCT, _WEIGHT = "product", "weight"


class Oracle(TorchFunctionMode):
    """``attentions``: by module path, how often one was evaluated. ``shapes``: of those that are one call, heads, key heads,
    head and value channels. ``routers``: by module path."""

    def __init__(self, model: nn.Module | None = None, experts: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.tags: Any = WeakIdKeyDictionary()
        self.paths = {} if model is None else {module: name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.experts = experts
        self.events: dict[int, str] = {}  # softmaxes that have entered no product yet
        self.numbers = itertools.count()
        self.attentions: Counter[str] = Counter()
        self.routers: Counter[str] = Counter()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.ran: set[str] = set()

    def __enter__(self) -> Any:
        hooks = torch.nn.modules.module
        self.hooks = [
            hooks.register_module_forward_pre_hook(lambda module, _: self.stack.append(module)),
            hooks.register_module_forward_hook(self._leave),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def _leave(self, module: nn.Module, _: Any, result: Any) -> None:
        self.stack.pop()
        if hasattr(module, "config_class") and hasattr(module, "config"):
            self.ran.add(getattr(module.config, "model_type", ""))
        if self._gate(module) and not any(map(self._gate, self.stack)):
            sizes = [x.shape[-1] for x in _tensors(result) if x.dim() and x.is_floating_point()]
            if self.experts & set(sizes):
                self.routers[self._path(module)] += 1

    def _gate(self, module: nn.Module) -> bool:
        last = self._path(module).rpartition(".")[2]
        words = f"{type(module).__name__} {last}".lower()
        return bool(re.search("gate|gating|router", words)) and not re.search(
            "gated?_?(mlp|proj)|shared_expert|gatedattention", words
        )

    def _path(self, module: nn.Module | None = None) -> str:
        module = module if module is not None else self.stack[-1] if self.stack else None
        return self.paths.get(module, "?") if module is not None else ""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        if name in ("__get__", "__set__") or name.startswith(
            ("is_", "size", "stride", "dim", "register_", "requires_grad")
        ):
            if name == "__get__" and isinstance(result, Tensor) and result.dim() > 1 and isinstance(args[0], Tensor):
                self._put(result, self._of(args[0]))  # .T, .mT, .data
            return result
        if name in _CALLS:
            self._called(name, [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)])
            return result
        given = list(_tensors((args, kwargs)))
        outputs = [x for x in _tensors(result) if x.is_floating_point() or x.is_complex()]
        if name in ("__setitem__", "copy", "index_copy", "index_put", "masked_scatter") and given:
            outputs = [x for x in (given[0], given[0]._base) if x is not None]
        if not given or not outputs:
            return result
        tags = self._through(name, given, args, outputs)
        for x in outputs:
            self._put(x, tags)
        return result

    def _through(self, name: str, given: list[Tensor], args: Any, outputs: list[Tensor]) -> set[Any]:
        each = [self._of(x) for x in given]
        tags: set[Any] = set().union(*each) - {_WEIGHT}
        if all(_WEIGHT in own for own in each) and name not in (*_PRODUCTS, *_PROJECTIONS):
            tags.add(_WEIGHT)
        data = [own for own in each if _WEIGHT not in own]
        events = {tag for tag in tags if isinstance(tag, int)}
        if name in _PRODUCTS:
            factors = data[-2:] if name == "baddbmm" else data
            met = [own for own in factors if any(isinstance(tag, int) for tag in own)]
            if met and len(factors) >= 2 and len(met) < len(factors):
                self._count({tag for own in met for tag in own if isinstance(tag, int)})
            return {_PRODUCT} if len(factors) >= 2 else set()
        if name in _PROJECTIONS:
            return set()
        if name in ("softmax", "exp", "exp2", "log_softmax") and _PRODUCT in tags and outputs[0].dim() >= 3:
            return {self._event()}
        if name in ("mul", "__mul__", "__rmul__") and len(data) == 2:
            wider = all(outputs[0].numel() > x.numel() for x in given)
            if wider and not events:
                return tags | {"pairs"}
            if events and wider and sum(any(isinstance(tag, int) for tag in own) for own in data) == 1:
                return tags | {("values", tag) for tag in events}
        if name == "sum" and any(isinstance(tag, tuple) for tag in tags):
            self._count({tag[1] for tag in tags if isinstance(tag, tuple)})
            return set()
        if name == "sum" and "pairs" in tags:
            return (tags - {"pairs"}) | {_PRODUCT}
        return tags

    def _called(self, name: str, given: list[Tensor]) -> None:
        path = self._path()
        self.attentions[path] += 1
        if name == "scaled_dot_product_attention" and all(x.dim() == 4 for x in given[:3]):
            q, k, v = given[:3]
            self.shapes[path] = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])

    def _event(self) -> int:
        event = next(self.numbers)
        self.events[event] = self._path()
        return event

    def _count(self, events: set[int]) -> None:
        """One attention for all softmaxes that enter one product together: their pieces are one row."""
        counted = [self.events.pop(event, None) for event in events]
        for path in [path for path in counted if path is not None][:1]:
            self.attentions[path] += 1

    def _of(self, x: Tensor) -> set[Any]:
        found: set[Any] = self.tags.get(x, set())
        return found | {_WEIGHT} if isinstance(x, nn.Parameter) else found

    def _put(self, x: Tensor, tags: set[Any]) -> None:
        if tags or x in self.tags:
            self.tags[x] = set(tags)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for value in list(x.values()):
            yield from _tensors(value)
    elif isinstance(x, list | tuple):
        for value in x:
            yield from _tensors(value)
