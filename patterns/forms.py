"""What a node computes, however it was written: the form in which a pattern and a graph are compared.

``F.softmax(x, dim=-1)``, ``torch.softmax(x, -1)`` and ``x.softmax(3)`` have one form, and so have ``x / 8`` and ``x * 0.125``,
``x.square()`` and ``x ** 2``, ``k.mT`` and ``k.transpose(-2, -1)``. Arguments go by the names of the ATen schema; what equals
its default is left out.
"""

from __future__ import annotations

import functools
import inspect
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from foreshock.patterns.ops import op, schema, tensor, value


class _Any:
    def __repr__(self) -> str:
        return "ANY"


ANY: Any = _Any()
"""Stands in a pattern for a constant of any value; as the default of a parameter it also names what it stood for."""

COMMUTATIVE = frozenset(
    {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or", "logical_xor", "bitwise_and"}
    | {"bitwise_or", "bitwise_xor", "and", "or", "xor"}
)
# Several ops of one form: which ops a form may come from.
SPELLINGS: Mapping[str, frozenset[str]] = {
    "mul": frozenset({"mul", "div"}),
    "add": frozenset({"add", "sub"}),
    "pow": frozenset({"pow", "square", "sqrt", "rsqrt", "reciprocal"}),
    "transpose": frozenset({"transpose", "mT", "t", "permute"}),
    "maximum": frozenset({"maximum", "max"}),
    "minimum": frozenset({"minimum", "min"}),
}
_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
_INVERSE = {"div": "mul", "sub": "add"}
_DIMENSIONS = frozenset({"dim", "dim0", "dim1", "dims", "start_dim", "end_dim"})
_RENAMED = {
    "input": "self",
    "tensor": "self",
    "a": "self",
    "b": "other",
    "axis": "dim",
    "training": "train",
    "mat2": "other",
}
_RENAMED |= {"split_size_or_sections": "split_size", "split_sizes": "split_size", "keepdims": "keepdim"}
_IGNORED = frozenset({"_stacklevel", "stacklevel", "inplace", "out", "memory_format"})
_VIEWS = frozenset({"reshape", "view", "_unsafe_view", "view_as", "reshape_as"})
_CASTS = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
}


class Operand(NamedTuple):
    """A node among the arguments. ``where``: position or keyword, None inside a list; ``inverse``: it divides or is taken away."""

    node: Node
    where: int | str | None
    inverse: bool = False


@dataclass(frozen=True)
class Form:
    """``operands`` and ``constants`` by argument name. ``rank`` is the number of axes that dimensions count, where known."""

    op: str
    operands: Mapping[str, Operand] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None

    def __str__(self) -> str:
        shown = [f"{name}={operand.node.name}" for name, operand in self.operands.items()]
        shown += [f"{name}={constant!r}" for name, constant in self.constants.items()]
        return f"{self.op}({', '.join(shown)})"


def form(node: Node) -> Form:
    """The form of ``node``. Placeholders and attributes have no arguments."""
    name = op(node)
    if node.op not in ("call_function", "call_method"):
        return Form(name)
    if name == "cast":
        return _cast(node)
    if name == "reshape":
        return _reshape(node)
    if name in ("expand", "identity"):
        return Form(name, {"self": Operand(node.args[0], 0)} if node.args and isinstance(node.args[0], Node) else {})
    operands: dict[str, Operand] = {}
    constants: dict[str, Any] = {}
    for argument, where, given in _named(node, name):
        _sort(argument, where, given, operands, constants)
    rank = _rank(operands.get("self"))
    if name in ("unsqueeze", "stack") and rank is not None:
        rank += 1
    if name in SPELLINGS["transpose"]:
        return _transpose(node, name, operands, constants, rank)
    if name in _POWERS:
        name, constants = "pow", {"exponent": _POWERS[name]}
    elif name in _INVERSE and "alpha" not in constants and "rounding_mode" not in constants:
        name = _inverted(name, operands, constants)
    elif name in ("max", "min") and "other" in operands:
        name += "imum"
    elif name == "einsum" and isinstance(constants.get("0"), str):
        constants["0"] = _letters(constants["0"])
    return Form(name, operands, constants, rank)


def is_scalar(node: Node) -> bool:
    """Whether ``node`` stands for a number: a symbolic one in a graph, a wildcard constant in a pattern."""
    if node.meta.get("any"):
        return True
    found = value(node)
    return isinstance(found, int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def same(name: str, wanted: Any, found: Any, rank: int | None) -> bool:
    """Whether a constant of a pattern agrees with one of a graph."""
    if wanted is ANY:
        return True
    if name.partition(".")[0] in _DIMENSIONS:
        return bool(_axes(wanted, rank) == _axes(found, rank))
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        pairs = zip(wanted, found, strict=False)
        return len(wanted) == len(found) and all(same("", one, other, rank) for one, other in pairs)
    numbers = (int, float)
    if isinstance(wanted, numbers) and isinstance(found, numbers):
        return wanted == found or math.isclose(wanted, found, rel_tol=1e-6)
    return bool(wanted == found)


def _axes(dims: Any, rank: int | None) -> Any:
    listed = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, list | tuple) else None
    if listed is None or not all(isinstance(dim, int) for dim in listed):
        return dims
    return sorted(dim % rank if rank else dim for dim in listed)


def _rank(operand: Operand | None) -> int | None:
    found = tensor(operand.node) if operand is not None else None
    return None if found is None else found.dim()


def _sort(
    name: str, where: int | str | None, given: Any, operands: dict[str, Operand], constants: dict[str, Any]
) -> None:
    """Into nodes and constants; lists and slices that hold nodes are taken apart."""
    if isinstance(given, Node):
        operands[name] = Operand(given, where)
    elif isinstance(given, list | tuple) and any(isinstance(part, Node | slice | list | tuple) for part in given):
        for position, part in enumerate(given):
            _sort(f"{name}.{position}", None, part, operands, constants)
    elif isinstance(given, slice):
        for end in ("start", "stop", "step"):
            _sort(f"{name}.{end}", None, getattr(given, end), operands, constants)
    elif given is not None or where is None:
        constants[name] = given


def _named(node: Node, name: str) -> Iterator[tuple[str, int | str, Any]]:
    """The arguments that differ from their defaults, by their common names."""
    given, named = node.args, dict(node.kwargs)
    names, defaults = _parameters(node, name)
    if len(given) > len(names):
        names = tuple(map(str, range(len(given))))
    for position, argument in enumerate(given):
        if not _is_default(names[position], argument, defaults):
            yield names[position], position, argument
    for keyword, argument in named.items():
        common = _RENAMED.get(keyword, keyword)
        if common not in _IGNORED and not _is_default(common, argument, defaults):
            yield common, keyword, argument


def _is_default(name: str, given: Any, defaults: Mapping[str, Any]) -> bool:
    if name in _IGNORED:
        return True
    return (
        name in defaults
        and not isinstance(given, Node)
        and type(given) is type(defaults[name])
        and given == defaults[name]
    )


def _parameters(node: Node, name: str) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    declared = schema(node)
    if declared is not None:
        return _of_schema(declared)
    if name == "getitem" or name.startswith("attr."):
        return ("self", "other"), {}
    signature = _signature(node.target) if node.op == "call_function" else None
    if signature is not None:
        return signature
    numbers = tuple(isinstance(argument, int | float) for argument in node.args)
    return _of_aten(name, numbers, frozenset(_RENAMED.get(keyword, keyword) for keyword in node.kwargs))


def _of_schema(declared: Any) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    entries = [(_RENAMED.get(entry.name, entry.name), entry) for entry in declared.arguments]
    defaults = {name: entry.default_value for name, entry in entries if entry.has_default_value()}
    return tuple(name for name, entry in entries), defaults


@functools.lru_cache(maxsize=4096)
def _signature(target: Any) -> tuple[tuple[str, ...], Mapping[str, Any]] | None:
    """Of a function written in Python; None for built-in ones."""
    if not inspect.isfunction(target):
        return None
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    names = {parameter: _RENAMED.get(parameter.name, parameter.name) for parameter in parameters}
    return tuple(names.values()), {n: p.default for p, n in names.items() if p.default is not p.empty}


@functools.lru_cache(maxsize=4096)
def _of_aten(name: str, numbers: Sequence[bool], keywords: frozenset[str]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The first ATen overload that could take such arguments; a number is no tensor."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    for overload in packet.overloads() if packet is not None else ():
        declared = getattr(packet, overload)._schema
        names, defaults = _of_schema(declared)
        kinds = [str(entry.type) for entry in declared.arguments]
        fits = "Tensor" in "".join(kinds[:1]) and len(numbers) <= len(names) and keywords - _IGNORED <= set(names)
        if fits and not any(number and kind == "Tensor" for number, kind in zip(numbers[1:], kinds[1:], strict=False)):
            return names, defaults
    return ("self", *map(str, range(1, len(numbers)))), {}


def _cast(node: Node) -> Form:
    """A cast is to a dtype: in a graph that of its result, in a pattern the one written, ANY where it is another tensor's."""
    name = str(node.target)
    found = tensor(node)
    written = [given for given in (*node.args[1:], *node.kwargs.values()) if isinstance(given, torch.dtype)]
    dtype = found.dtype if found is not None else _CASTS.get(name) or (written[0] if written else ANY)
    return Form("cast", {"self": Operand(node.args[0], 0)} if isinstance(node.args[0], Node) else {}, {"dtype": dtype})


def _reshape(node: Node) -> Form:
    """``view`` and ``reshape`` in a pattern stand for any view; the named ones (``unsqueeze``) for themselves."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    name = str(name).rstrip("_")
    operands = {"self": Operand(node.args[0], 0)} if node.args and isinstance(node.args[0], Node) else {}
    if name in _VIEWS:
        return Form("reshape", operands, {"view": ANY})
    rank = _rank(operands.get("self"))
    rank = None if rank is None else rank + (name == "unsqueeze")
    written = [given for given in (*node.args[1:], *node.kwargs.values()) if isinstance(given, int | list | tuple)]
    return Form("reshape", operands, {"view": name, **{f"dim.{i}": given for i, given in enumerate(written)}}, rank)


def _transpose(
    node: Node, name: str, operands: Mapping[str, Operand], constants: Mapping[str, Any], rank: int | None
) -> Form:
    """Two axes that change places; any other permutation by its axes."""
    source = {"self": operands["self"]} if "self" in operands else {}
    if name == "permute":
        dims = constants.get("dims", [part for part in node.args[1:] if isinstance(part, int)])
        order = [int(dim) % len(dims) for dim in dims]
        moved = [axis for axis, dim in enumerate(order) if axis != dim]
        if len(moved) != 2:
            return Form("permute", source, {"order": tuple(order)}, rank)
        return Form("transpose", source, {"dims": [axis - len(order) for axis in moved]}, rank)
    first, second = (constants.get("dim0", -2), constants.get("dim1", -1)) if name == "transpose" else (-2, -1)
    return Form("transpose", source, {"dims": [first, second]}, rank)


def _inverted(name: str, operands: dict[str, Operand], constants: dict[str, Any]) -> str:
    """``x / c`` is ``x * (1 / c)`` and ``x - c`` is ``x + (-c)``, if c is a number."""
    number = constants.get("other")
    if isinstance(number, int | float) and (number or name == "sub"):
        constants["other"] = invert(_INVERSE[name], number)
        return _INVERSE[name]
    divisor = operands.get("other")
    if divisor is not None and is_scalar(divisor.node):
        operands["other"] = divisor._replace(inverse=True)
        return _INVERSE[name]
    return name


def invert(name: str, number: float) -> float:
    """The number that undoes ``number`` under multiplication or addition."""
    return -number if name == "add" else 1 / number


def _letters(equation: str) -> str:
    """An einsum's equation with its letters renamed in the order in which they appear."""
    seen: dict[str, str] = {}
    return "".join(
        seen.setdefault(sign, string.ascii_letters[len(seen)]) if sign.isalpha() else sign
        for sign in equation.replace(" ", "")
    )
