"""Write out calls that hide an attention: `torch.nn.functional.multi_head_attention_forward` arrives as one opaque call, and the
operands of `einsum` may stand in a list, where no edge leads to them.

Its own Python code is run again on the fake tensors of the capture, and every torch function it calls becomes a node: what
AOTAutograd would see inside it anyway, in the same order, so that the numbers are the same to the last bit.
"""

from __future__ import annotations

import operator
from types import FunctionType
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from foreshock import _torch
from foreshock.passes.plan import before
from foreshock.patterns.ops import args as args_of
from foreshock.patterns.ops import op

EXPANDED = {"multi_head_attention_forward": functional.multi_head_attention_forward}


class _Write(TorchFunctionMode):
    """Appends a node for each torch function that is called on fake tensors with a node."""

    def __init__(self, graph: Graph, like: Node) -> None:
        super().__init__()
        self.graph, self.like = graph, like
        self.nodes: dict[int, tuple[Node, torch.Tensor]] = {}  # the tensor is kept, so that its id stays its own
        self.numbers: dict[Any, Node] = {}  # symbolic ones, by expression

    def learn(self, value: Any, node: Node) -> None:
        if isinstance(value, torch.Tensor):
            self.nodes[id(value)] = (node, value)
        elif isinstance(value, torch.SymInt | torch.SymFloat):
            self.numbers[value.node.expr] = node

    def node_of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.nodes[id(value)][0]
        return self._number(value.node.expr) if isinstance(value, torch.SymInt | torch.SymFloat) else value

    def _number(self, expression: Any) -> Any:
        """A symbolic number: an operand of the call, or made from sizes of tensors at hand."""
        if expression in self.numbers:
            return self.numbers[expression]
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            for node, tensor in self.nodes.values():
                for axis, size in enumerate(tensor.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == expression:
                        return self._call(torch.ops.aten.sym_size.int, (node, axis), size)
        combine = {sympy.Mul: operator.mul, sympy.Add: operator.add}.get(expression.func)
        if combine is None:
            raise NotImplementedError(f"writing out a call: {expression} is no sum or product of sizes")
        first, *rest = (self._number(part) for part in expression.args)
        for part in rest:
            first = self._call(combine, (first, part), None)
        return first

    def _call(self, target: Any, args: tuple[Any, ...], value: Any) -> Node:
        return self._mark(self.graph.call_function(target, args), value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(part, torch.Tensor) for part in _flat(result)):
            self._append(func, args, kwargs, result)
        return result

    def _append(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        args, kwargs = map_aggregate((args, kwargs), self.node_of)
        if _is_method(func) and hasattr(operator, func.__name__):
            node = self.graph.call_function(getattr(operator, func.__name__), args, kwargs)
        elif _is_method(func):
            node = self.graph.call_method(func.__name__, args, kwargs)
        else:
            node = self.graph.call_function(func, args, kwargs)
        self._mark(node, result)
        self.learn(result, node)
        if not isinstance(result, torch.Tensor):
            for i, part in enumerate(result):
                self.learn(part, self._call(operator.getitem, (node, i), part))

    def _mark(self, node: Node, value: Any) -> Node:
        """Nodes tell the same place in the user's code as the call."""
        node.meta.update({key: self.like.meta[key] for key in _KEPT if key in self.like.meta})
        node.meta["example_value"] = value
        return node


_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack")


def _is_method(func: Any) -> bool:
    return str(resolve_name(func)).startswith("torch.Tensor.")


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def expand(module: GraphModule) -> None:
    """Replace each such call in ``module`` and its bodies by what it does."""
    for graph in [part.graph for part in module.modules() if isinstance(part, GraphModule)]:
        for node in list(graph.nodes):
            if op(node) in EXPANDED:
                _expand(graph, node)
            elif op(node) == "einsum" and len(node.args) == 2 and isinstance(node.args[1], list | tuple):
                node.args = (node.args[0], *node.args[1])


def _expand(graph: Graph, call: Node) -> None:
    original = EXPANDED[op(call)]
    without_overrides = {**original.__globals__, "has_torch_function": lambda tensors: False}
    code = FunctionType(original.__code__, without_overrides, original.__name__, original.__defaults__)
    code.__kwdefaults__ = original.__kwdefaults__
    writer = _Write(graph, call)
    for source in call.all_input_nodes:
        writer.learn(source.meta["example_value"], source)
    args, kwargs = map_arg((call.args, call.kwargs), lambda n: n.meta["example_value"])
    fakes = [value for _, value in writer.nodes.values()]
    with before(graph, call), _torch.evaluating(fakes), writer:
        results = code(*args, **kwargs)
    outputs = [writer.node_of(result) for result in results]
    for user in list(call.users):
        user.replace_all_uses_with(outputs[args_of(user)[1]])
        graph.erase_node(user)
    graph.erase_node(call)
