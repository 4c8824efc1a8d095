"""What a user says of an opaque op, held against the op's schema: mistakes are named as soon as the op is known."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from foreshock.errors import PatternError
from foreshock.patterns.graph import GraphView
from foreshock.patterns.ops import schema, shape
from foreshock.patterns.provenance import Origin, trace_heads


def check_op(name: str, arguments: Mapping[str, int | str | None], results: Mapping[str, int | None]) -> None:
    """Raises PatternError if ``name`` is no qualified name, if it misspells a registered op, or if that op has no such
    argument or result. An op that nobody has registered yet is checked when it is met."""
    if name.count("::") != 1:
        raise PatternError(f"describing {name!r}: give the op's qualified name, 'namespace::name'{_meant(name)}")
    declared = _registered(name)
    if declared is not None:
        check_schema(name, declared, arguments, results)
    elif _meant(name):
        raise PatternError(
            f"describing {name!r}: no op of this name is registered{_meant(name)}"
            " If it is another op, import the library that registers it first."
        )


def check_node(
    name: str, node: Node, arguments: Mapping[str, int | str | None], results: Mapping[str, int | None]
) -> None:
    """The same for the op that ``node`` calls."""
    declared = schema(node)
    if declared is not None:
        check_schema(name, declared, arguments, results)


def check_schema(
    name: str, declared: Any, arguments: Mapping[str, int | str | None], results: Mapping[str, int | None]
) -> None:
    """Raises PatternError for an argument or a result that the schema does not have, showing the schema."""
    order = [entry.name for entry in declared.arguments]
    for role, where in arguments.items():
        if isinstance(where, str) and where not in order:
            raise PatternError(
                f"describing {name}: {role}={where!r} is none of its arguments{_nearest(where, order)}\n    {declared}"
            )
        if isinstance(where, int) and not 0 <= where < len(order):
            raise PatternError(
                f"describing {name}: {role}={where} is beyond its {len(order)} arguments ({', '.join(order)})\n    {declared}"
            )
    for role, index in results.items():
        if index is not None and not 0 <= index < max(len(declared.returns), 1):
            raise PatternError(
                f"describing {name}: {role}={index} is beyond its {len(declared.returns)} results\n    {declared}"
            )


def check_layout(name: str, view: GraphView, q: Any, layout: str) -> None:
    """Raises PatternError if, by the projections, the heads of ``q`` lie on the other axis than ``layout`` says."""
    sizes = shape(q)
    if sizes is None or len(sizes) != 4:
        return
    heads = {axis: trace_heads(view, q, axis) for axis in (1, 2)}
    found = {axis: len(np.unique(o.index, axis=0)) for axis, o in heads.items() if isinstance(o, Origin)}
    said = layout.index("H")
    if found.get(said) == 1 and found.get(3 - said, 1) > 1:
        raise PatternError(
            f"describing {name}: layout={layout!r}, but its q {list(sizes)} has {found[3 - said]} heads on axis {3 - said};"
            f" did you mean {'BSHD' if said == 1 else 'BHSD'!r}?"
        )


def _registered(name: str) -> Any:
    """The schema of the only overload of a registered op."""
    namespace, _, short = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), short, None)
    overloads = list(packet.overloads()) if packet is not None else []
    return getattr(packet, overloads[0])._schema if len(overloads) == 1 else None


def _meant(name: str) -> str:
    """Registered ops of almost this name."""
    known = {entry.partition(".")[0] for entry in torch._C._dispatch_get_all_op_names()}
    own = [entry for entry in known if not entry.startswith(("aten::", "prims::", "prim::"))]
    return "" if name in known else _nearest(name, own, listed=False)


def _nearest(given: str, names: list[str], *, listed: bool = True) -> str:
    """Names like ``given``; without any, all of them if they may be ``listed``."""
    close = difflib.get_close_matches(given, names, n=2, cutoff=0.4 if listed else 0.8)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there are {', '.join(names)}" if listed else ""
