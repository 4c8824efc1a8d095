"""Put gradient taps on the edges into and out of each site's kernel, fed from one slot per graph."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from foreshock.passes.plan import Plan, Quantity, SitePlan
from foreshock.passes.record import Recorder, Value
from foreshock.passes.taps import ENTER, EXIT, register_statistics


def insert_taps(plan: Plan) -> None:
    """A failing site keeps its forward probes; the rest go on."""
    for site in plan.sites:
        if site.probe.backward is None or not _differentiable(site):
            continue
        try:
            written = [user for node in _tapped_nodes(site) for user in _readers(node) if _writes(user)]
            if written:
                raise ValueError(
                    f"`{written[0].name}` writes into it in place; a tap's output is a view and must not be written"
                )
            sizes = _sizes(plan, site)
            _tap(plan, site, sizes)
        except Exception as error:
            plan.fail(f"gradient tap at {site.label}", error)


def _tapped(site: SitePlan) -> list[str]:
    return list(site.match.operands) or [role for role in (site.match.tapped,) if role]


def _tapped_nodes(site: SitePlan) -> list[Node]:
    """What gets a view in front of its readers: the kernel's output, or the tensor tapped itself."""
    return [site.match.roles["out"]] if site.match.operands else [site.match.roles[role] for role in _tapped(site)]


def _writes(node: Node) -> bool:
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    return (name.endswith("_") and not name.endswith("__")) or name in ("iadd", "isub", "imul", "itruediv", "setitem")


def _differentiable(site: SitePlan) -> bool:
    fakes = [site.match.roles[role].meta.get("example_value") for role in _tapped(site)]
    return bool(fakes) and all(isinstance(fake, torch.Tensor) and fake.requires_grad for fake in fakes)


def _sizes(plan: Plan, site: SitePlan) -> dict[str, int]:
    """Run the statistics on fake tensors: the sizes of its results, and an early failure if it cannot run."""
    backward = site.probe.backward
    assert backward is not None
    fakes = {role: site.match.roles[role].meta["example_value"].detach() for role in _tapped(site)}
    if site.match.operands:
        fakes["out"] = site.match.roles["out"].meta["example_value"].detach()
    with plan.fake_mode, torch.no_grad(), torch.autocast(plan.device.type, enabled=False):
        results = backward(site.facts, fakes, fakes)
    return {name: int(result.numel()) for name, result in results.items()}


def _tap(plan: Plan, site: SitePlan, sizes: dict[str, int]) -> None:
    match, probe = site.match, site.probe
    assert probe.backward is not None
    backward = probe.backward
    name = f"{probe.name}:{getattr(backward, '__qualname__', '')}:{_version(backward)}"
    report = plan.report and functools.partial(plan.report, f"gradient statistics of probe `{probe.name}`")
    register_statistics(name, lambda spec, tensors, grads: list(backward(spec, tensors, grads).values()), report)
    roles = _tapped(site)
    spec: dict[str, Any] = {**site.facts, "statistics": name, "roles": roles}
    if match.operands:
        spec["carrier_width"] = int(match.facts["value_dim"])
    recorder = Recorder(plan.graph, plan.fake_mode, "insert_taps", site.label)
    first = match.anchor if match.operands else match.roles[roles[0]].next
    users = _readers(match.roles[roles[0]]) if not match.operands else []
    piece_fake = plan.fake_mode.from_tensor(torch.zeros(sum(sizes.values()), device=plan.device), static_shapes=True)
    with recorder.before(first):
        piece = recorder.create_node("call_function", _placeholder_piece, (), {})
        piece.meta["example_value"] = piece_fake
        inputs = [Value(_source(site, role), recorder) for role in roles]
        entered: Any = recorder.create_proxy(
            "call_function", ENTER, (inputs, Value(piece, recorder), json.dumps(spec)), {}
        )
        views = [entered[i] for i in range(len(roles) + (2 if match.operands else 0))]
    if match.operands:
        for view, role in zip(views, roles, strict=False):
            _replace_operand(match.anchor, match.operands[role], view.node)
        out = match.roles["out"]
        readers = _readers(out)
        with recorder.before(out.next):
            left = recorder.create_proxy("call_function", EXIT, (Value(out, recorder), views[len(roles) :]), {})
        for reader in readers:
            reader.replace_input_with(out, left.node)
    else:
        for user in users:
            user.replace_input_with(match.roles[roles[0]], views[0].node)
    plan.pieces.append(piece)
    for name, size in sizes.items():
        plan.backward.append(Quantity(site.index, name, size, "max" if name in probe.maxima else "sum"))


def _placeholder_piece() -> None:
    """Stands for a site's piece of the slot until the slot's size is known."""


@functools.cache
def _version(function: Callable[..., Any]) -> str:
    """Changes when the statistics' source does, so that no cache serves a graph compiled with an older one."""
    try:
        text = inspect.getsource(sys.modules[function.__module__])
    except (OSError, TypeError, KeyError):
        text = repr(getattr(function, "__code__", function))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source(site: SitePlan, role: str) -> Node:
    """What enters the kernel as ``role`` now: a neighbouring site's tap may stand before it already."""
    if role not in site.match.operands:
        return site.match.roles[role]
    where, anchor = site.match.operands[role], site.match.anchor
    found = anchor.kwargs[where] if isinstance(where, str) else anchor.args[where]
    assert isinstance(found, Node)
    return found


def _readers(node: Node) -> list[Node]:
    """Users of ``node`` that are not probes: probes read the raw tensor."""
    return [user for user in node.users if user.meta.get("foreshock", {}).get("pass") != "insert_probes"]


def _replace_operand(anchor: Node, where: int | str, new: Node) -> None:
    if isinstance(where, str):
        anchor.kwargs = {**anchor.kwargs, where: new}
    else:
        anchor.args = (*anchor.args[:where], new, *anchor.args[where + 1 :])


def feed_slot(plan: Plan, slot: Node) -> None:
    """Cut the slot into pieces with one split, whose backward is one concatenation: all statistics arrive in one vector."""
    if not plan.pieces:
        return
    lengths = [piece.meta["example_value"].shape[0] for piece in plan.pieces]
    recorder = Recorder(plan.graph, plan.fake_mode, "insert_taps", "")
    with recorder.before(slot.next):
        whole = torch.split(Value(slot, recorder), lengths)  # type: ignore[arg-type]  # a Value is traced like a tensor
        for index, piece in enumerate(plan.pieces):
            cut = recorder.create_node("call_function", operator.getitem, (whole.node, index), {})  # type: ignore[attr-defined]
            piece.replace_all_uses_with(cut)
            plan.graph.erase_node(piece)
