"""Write ordinary torch code into a graph: values stand for nodes, and each op on them appends a node.

Every appended node gets its fake result at once, so that shapes are known (and mistakes found) while inserting, the
compile caches accept its method calls, and ``node.meta["foreshock"]`` says which pass wrote it for which site.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.overrides import TorchFunctionMode


class Value(Proxy):
    """A tensor of the graph. Static sizes are plain integers; symbolic ones are values themselves."""

    @property
    def fake(self) -> Any:
        return self.node.meta["example_value"]

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.size(axis) for axis in range(self.fake.dim()))

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.fake.dtype
        return found

    @property
    def device(self) -> torch.device:
        found: torch.device = self.fake.device
        return found

    @property
    def ndim(self) -> int:
        return int(self.fake.dim())

    def dim(self) -> int:
        return self.ndim

    def size(self, axis: int | None = None) -> Any:
        if axis is None:
            return self.shape
        static = self.fake.shape[axis]
        return static if isinstance(static, int) else self.tracer.create_proxy("call_method", "size", (self, axis), {})


_FACTORIES = frozenset({torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.linspace, torch.eye})


class _Factories(TorchFunctionMode):
    """Calls that take no value of the graph (`torch.arange`, `torch.zeros`) become nodes too, not constants."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.recorder.evaluating or func not in _FACTORIES:
            return func(*args, **kwargs)
        return self.recorder.create_proxy("call_function", func, args, kwargs)


class Recorder(GraphAppendingTracer):
    """Appends nodes to ``graph`` before a given node, and can take them back."""

    def __init__(self, graph: Graph, fake_mode: Any, written_by: str, site: str) -> None:
        super().__init__(graph)
        self.fake_mode = fake_mode
        self.mark = {"pass": written_by, "site": site}
        self.nodes: list[Node] = []
        self.evaluating = False

    def proxy(self, node: Node) -> Value:
        return Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        node.meta["foreshock"] = self.mark
        self.nodes.append(node)
        node.meta["example_value"] = self._evaluate(node)
        return node

    def _evaluate(self, node: Node) -> Any:
        if node.op not in ("call_function", "call_method") or "autocast" in getattr(node.target, "__name__", ""):
            return None
        args = map_arg(node.args, lambda n: n.meta["example_value"])
        kwargs = map_arg(node.kwargs, lambda n: n.meta["example_value"])
        self.evaluating = True
        try:
            with self.fake_mode, torch.no_grad():
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                target: Any = node.target
                return target(*args, **kwargs)
        finally:
            self.evaluating = False

    @contextlib.contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """Append in front of ``node``; if the block raises, nothing of it stays."""
        start = len(self.nodes)
        try:
            with self.graph.inserting_before(node), _Factories(self):
                yield
        except BaseException:
            for written in reversed(self.nodes[start:]):
                self.graph.erase_node(written)
            del self.nodes[start:]
            raise

    @contextlib.contextmanager
    def without_autocast(self, device_type: str, needed: bool) -> Iterator[None]:
        """Probes compute in the precision they name, also where the model runs under autocast."""
        if not needed:
            yield
            return
        module = torch.amp.autocast_mode
        mode = self.create_node("call_function", module._enter_autocast, (device_type, torch.bfloat16, False, True), {})
        with torch.autocast(device_type, enabled=False):
            yield
        self.create_node("call_function", module._exit_autocast, (mode,), {})
