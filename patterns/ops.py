"""One vocabulary for all spellings of an op.

``torch.softmax``, ``F.softmax``, ``Tensor.softmax`` and ``aten::softmax`` are all ``"softmax"``; an op of another library keeps
its qualified name, ``"namespace::name"``. Arguments keep their position: a method's ``self`` stands where the function has
its first argument.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Node

_TORCH_MODULES = (
    "torch",
    "torch._C._nn",
    "torch.nn.functional",
    "torch.functional",
    "torch._VF",
    "_operator",
    "builtins",
    "math",
)

_ALIASES = {
    "truediv": "div", "divide": "div", "true_divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg",
    "float": "cast", "half": "cast", "bfloat16": "cast", "double": "cast", "to": "cast", "type": "cast", "type_as": "cast",
    "_to_copy": "cast", "view": "reshape", "_unsafe_view": "reshape", "view_as": "reshape", "reshape_as": "reshape",
    "flatten": "reshape", "unflatten": "reshape", "unsqueeze": "reshape", "squeeze": "reshape",
    "contiguous": "identity", "clone": "identity", "detach": "identity", "alias": "identity", "lift_fresh_copy": "identity",
    "swapaxes": "transpose", "moveaxis": "movedim", "swapdims": "transpose", "expand_as": "expand", "broadcast_to": "expand",
    "split_with_sizes": "split", "__getitem__": "getitem", "concat": "cat", "concatenate": "cat",
    "attr.T": "t", "attr.mT": "mT", "attr.data": "identity", "numpy_T": "t",
    "_softmax": "softmax", "mm": "matmul", "bmm": "matmul", "feature_dropout": "dropout", "native_dropout": "dropout",
    "select_scatter": "other", "torch.distributed.tensor._api::from_local": "from_local",
}  # fmt: skip


def op(node: Node) -> str:
    """The canonical name of what ``node`` does; ``"placeholder"`` and ``"output"`` for those; ``""`` if it has no name."""
    if node.op == "call_method" or node.op == "call_function":
        attribute = node.args[1] if node.target is getattr else None
        return _canonical(node.target, str(attribute) if attribute is not None else None)
    return node.op


@functools.lru_cache(maxsize=4096)
def _canonical(target: Any, attribute: str | None) -> str:
    name = target if isinstance(target, str) else f"attr.{attribute}" if attribute else _function_name(target)
    if "::" not in name:
        name = _strip_inplace(name)
    return _ALIASES.get(name, name)


def _strip_inplace(name: str) -> str:
    if name.endswith("_") and not name.endswith("__"):
        return name[:-1]
    return name[1:] if name in ("iadd", "isub", "imul") else "div" if name == "itruediv" else name


def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        qualified = str(packet._qualified_op_name)
        return qualified.removeprefix("aten::")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target.name()}"
    name = getattr(target, "__name__", "")
    return (
        name
        if getattr(target, "__module__", None) in _TORCH_MODULES
        else f"{getattr(target, '__module__', '')}::{name}"
    )


def schema(node: Node) -> Any:
    """The schema of a library op, also where it is called without naming its only overload; None for anything else."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = target.overloads()
        target = getattr(target, overloads[0]) if len(overloads) == 1 else None
    return getattr(target, "_schema", None)


def args(node: Node) -> tuple[Any, ...]:
    """The positional arguments, without FX's union of all that an argument can be."""
    return node.args


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """The argument called ``name``, or standing at ``position``, else ``default``."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if position < len(node.args) else default


def described(node: Node, where: int | str) -> Any:
    """The argument of a library op at a place or of a name, however it was passed; left out, its default of the schema."""
    declared = getattr(schema(node), "arguments", ())
    order = [entry.name for entry in declared]
    place = where if isinstance(where, int) else order.index(where) if where in order else len(node.args)
    name = where if isinstance(where, str) else order[where] if where < len(order) else ""
    default = next(
        (entry.default_value for entry in declared if entry.name == name and entry.has_default_value()), None
    )
    return argument(node, place, name, default)


def value(node: Any) -> Any:
    """The fake value that Dynamo recorded for ``node``, or None."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor of ``node``, or None when it yields no tensor."""
    found = value(node)
    return found if isinstance(found, torch.Tensor) else None


def dtype(node: Any) -> str:
    """The dtype of ``node``'s tensor as its name says it: "float32" also where it is none."""
    return str(getattr(tensor(node), "dtype", "float32")).removeprefix("torch.")


def shape(node: Any) -> tuple[int, ...] | None:
    """Concrete sizes (hints where symbolic); a complex tensor shows its real and imaginary part as a last axis of 2."""
    found = node.meta.get("example_value") if isinstance(node, Node) else None
    if not isinstance(found, torch.Tensor):
        return None
    sizes = tuple([size if type(size) is int else hint(size) for size in found.shape])
    return (*sizes, 2) if found.is_complex() else sizes


def hint(size: Any) -> int:
    """A size as a number: a symbolic one as it was in the capture."""
    return int(size) if isinstance(size, int) else int(size.node.hint if size.node.hint is not None else 2)
