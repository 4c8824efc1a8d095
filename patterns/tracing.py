"""From a plain Python function that shows a subgraph to the graphs it stands for: one, or several where steps may be left out."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from foreshock.errors import PatternError
from foreshock.patterns.forms import ANY
from foreshock.patterns.ops import op

MOST_OPTIONAL = 4
_NUMBERS = frozenset({"attr.shape", "attr.dtype", "attr.device", "attr.ndim", "size", "dim", "numel"})
_choices: ContextVar[list[bool]] = ContextVar("choices")
_asked: ContextVar[list[None]] = ContextVar("asked")


@dataclass(frozen=True)
class Traced:
    """One graph that a function stands for. ``parameters`` and ``results`` are its roles; ``live`` the nodes they rest on."""

    graph: Graph
    parameters: Mapping[str, Node]
    results: Mapping[str, Node]
    live: set[Node]


def maybe(step: Callable[[Any], Any], x: Any) -> Any:
    """``step(x)``, or ``x``: in a function that shows a subgraph, a step that may be missing. At most four in one function."""
    asked, choices = _asked.get([]), _choices.get([])
    asked.append(None)
    return x if len(asked) <= len(choices) and not choices[len(asked) - 1] else step(x)


def trace(function: Callable[..., Any], name: str) -> list[Traced]:
    """Every graph that ``function`` stands for, the one with all its steps first. Raises PatternError."""
    everything, optional = _trace(function, name, [])
    if optional > MOST_OPTIONAL:
        raise PatternError(
            f"tracing the pattern `{name}`: {optional} optional steps; at most {MOST_OPTIONAL} can be tried"
        )
    choices = sorted(itertools.product([True, False], repeat=optional), key=sum, reverse=True)[1:]
    return [everything, *(_trace(function, name, list(choice))[0] for choice in choices)]


class _Tracer(GraphAppendingTracer):
    """Writes each op down with its line in ``file``; numbers that depend on shapes are wildcards, as is `ANY`."""

    def __init__(self, file: str) -> None:
        super().__init__(Graph())
        self.file = file

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        inputs = node.all_input_nodes
        if (
            node.op != "placeholder"
            and (op(node) in _NUMBERS or inputs)
            and (op(node) in _NUMBERS or all(source.meta.get("any") for source in inputs))
        ):
            node.meta["any"] = True
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        node.meta["line"] = frame.f_lineno
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            raise TypeError("a tensor that is none of the parameters")
        return self.wildcard("any") if a is ANY else super().create_arg(a)

    def wildcard(self, name: str) -> Node:
        """A number of any value."""
        node = self.graph.placeholder(name)
        node.meta["any"] = True
        return node


def _trace(function: Callable[..., Any], name: str, choices: list[bool]) -> tuple[Traced, int]:
    tracer = _Tracer(getattr(getattr(function, "__code__", None), "co_filename", ""))
    nodes, positional, named = _parameters(function, name, tracer)
    asked: list[None] = []
    tokens = _choices.set(choices), _asked.set(asked)
    try:
        result = function(*positional, **named)
    except Exception as error:
        raise PatternError(
            f"tracing the pattern `{name}`: {type(error).__name__}: {str(error).strip()}{_line(error, tracer.file)}\n"
            "Write it with torch ops on its parameters alone: no `if` on tensors, no tensors made elsewhere, no `math` on sizes; "
            f"a number that may vary is a parameter with the default ANY.\nTraced so far:\n{_shown(tracer.graph)}"
        ) from error
    finally:
        _choices.reset(tokens[0])
        _asked.reset(tokens[1])
    results = _results(result, name, nodes)
    live = set(results.values())
    for node in reversed(tracer.graph.nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return Traced(tracer.graph, nodes, results, live), len(asked)


def _parameters(
    function: Callable[..., Any], name: str, tracer: _Tracer
) -> tuple[dict[str, Node], list[Any], dict[str, Any]]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise PatternError(
            f"tracing the pattern `{name}`: received {function!r}; give a plain Python function"
        ) from error
    nodes: dict[str, Node] = {}
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for key, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise PatternError(f"tracing the pattern `{name}`: *{key} names no role; write every parameter by name")
        if parameter.default is ANY:
            nodes[key] = tracer.wildcard(key)
        elif parameter.default is parameter.empty:
            nodes[key] = tracer.create_node("placeholder", key, (), {})
        else:
            continue
        given = Proxy(nodes[key], tracer)
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[key] = given
        else:
            positional.append(given)
            named.update({key: positional.pop()} if parameter.kind is not parameter.POSITIONAL_ONLY else {})
    return nodes, positional, named


def _results(result: Any, name: str, parameters: Mapping[str, Node]) -> dict[str, Node]:
    named = {"out": result} if isinstance(result, Proxy) else result
    if not isinstance(named, Mapping) or not named:
        raise PatternError(
            f'tracing the pattern `{name}`: it returns {_kind(result)}; return its tensors by role, {{"out": ...}}'
        )
    found = {}
    for role, proxy in named.items():
        if not isinstance(proxy, Proxy):
            raise PatternError(
                f"tracing the pattern `{name}`: its role {role!r} is {_kind(proxy)}, no tensor of the subgraph"
            )
        if role in parameters and parameters[role] is not proxy.node:
            raise PatternError(
                f"tracing the pattern `{name}`: the role {role!r} is both a parameter and another result"
            )
        found[str(role)] = proxy.node
    return found


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _line(error: BaseException, file: str) -> str:
    """Where in the function it happened."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            found = f" (line {trace.tb_lineno} of {file})"
        trace = trace.tb_next
    return found


def _shown(graph: Graph) -> str:
    return "\n".join(f"    {node.format_node()}" for node in graph.nodes) or "    nothing"
