"""The flex_attention higher-order op: ``flex_attention(q, k, v, score_mod, block_mask, scale, ...)``, all ``[B, heads, S, h]``.

What it adds to a plain attention stands in two small graphs, one that changes a score and one that says which keys a query sees.
They are read as far as they are plain: a sum, a factor, a cap; ``q_idx >= kv_idx`` and conjunctions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from foreshock.patterns.boundary import NO_BIAS_PAIR, attention_site
from foreshock.patterns.graph import GraphView
from foreshock.patterns.logits import constant
from foreshock.patterns.masks import HIDDEN
from foreshock.patterns.ops import args, op, tensor
from foreshock.patterns.pattern import Edge, Match, Miss, Pattern

_AND = frozenset({"and_", "bitwise_and", "logical_and", "and"})
_TRUE = frozenset({"new_ones", "ones", "ones_like"})
_COPIES = frozenset({"identity", "cast", "reshape"})


@dataclass(frozen=True)
class _Score:
    """What a score_mod makes of a score: ``scale`` times it (None: not known), ``plain`` if that is all."""

    scale: float | None = 1.0
    softcap: float | None = None
    plain: bool = True
    masked: bool = False
    bent: str = ""


def _match(view: GraphView, node: Node) -> Match | Miss:
    bodies = [_body(held) for held in (args(node)[3], args(node)[4][-1])]
    out = next((user for user in node.users if op(user) == "getitem" and args(user)[1] == 0), None)
    if tensor(out) is None:
        return Miss(node, "its output is not used")
    if any(tensor(x) is None for x in args(node)[:3]):
        return Miss(node, "q, k or v is no tensor of the graph")
    score = _score(bodies[0]) if bodies[0] is not None else _Score(bent="what its score_mod does is not known")
    terms = list(_terms(bodies[1])) if bodies[1] is not None else ["?"]
    causal = True if "causal" in terms else None if "?" in terms else False
    masked = score.masked or "?" in terms
    scale = constant(args(node)[5])
    facts: dict[str, Any] = {"masked": masked, "softcap": score.softcap}
    if not score.plain or masked:
        facts["recompute"] = False
    return attention_site(
        view,
        node,
        pattern="flex_attention",
        edges={role: Edge(node, place) for place, role in enumerate(("q", "k", "v"))},
        layout=dict.fromkeys(("q", "k", "v", "out"), "b h s d"),
        out=out,
        causal=causal,
        scale=float("nan") if scale is None or score.scale is None else scale * score.scale,
        facts=facts,
        broken={
            **dict.fromkeys(NO_BIAS_PAIR, score.bent),
            "law/value_mass": "a mask may empty whole rows" if masked else "",
        },
    )


FLEX = Pattern("flex_attention", frozenset({"higher_order::flex_attention"}), _match)


def _body(held: Any) -> GraphModule | None:
    owner = held.graph.owning_module if isinstance(held, Node) and held.op == "get_attr" else None
    body = getattr(owner, str(held.target), None) if owner is not None else None
    return body if isinstance(body, GraphModule) else None


def _ends(body: GraphModule) -> tuple[list[Node], Any]:
    """The inputs of a graph and its result."""
    result: Any = next(iter(reversed(body.graph.nodes))).args[0]
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    return inputs, result[0] if isinstance(result, list | tuple) else result


def _terms(body: GraphModule) -> Iterator[str]:
    """The conditions under which ``mask_mod(b, h, q_idx, kv_idx)`` shows a key, all of which must hold."""
    (_, _, q, k, *_), result = _ends(body)
    waiting = [result]
    while waiting:
        term = waiting.pop()
        if not isinstance(term, Node):
            yield "true" if term is True else "?"
            continue
        name, given = op(term), [_bare(x) for x in args(term)]
        if name in _COPIES:
            waiting.append(given[0])
        elif name in _AND:
            waiting += given
        elif (name in ("ge", "greater_equal") and given == [q, k]) or (
            name in ("le", "less_equal") and given == [k, q]
        ):
            yield "causal"
        else:
            yield "true" if name in _TRUE else "?"


def _bare(x: Any) -> Any:
    """An index without an offset of nothing."""
    while isinstance(x, Node) and op(x) in ("add", "sub", *_COPIES) and all(other == 0 for other in args(x)[1:]):
        x = args(x)[0]
    return x


def _score(body: GraphModule) -> _Score:
    """What ``score_mod(score, b, h, q_idx, kv_idx)`` does."""
    (score, *_), node = _ends(body)
    made_of = {score}
    for inner in body.graph.nodes:
        if not made_of.isdisjoint(inner.all_input_nodes):
            made_of.add(inner)
    scale, softcap, masked, plain, bent = 1.0, None, False, True, ""
    unknown = _Score(None, None, False, False, "what its score_mod does is not known")
    while node is not score:
        name = op(node) if isinstance(node, Node) else ""
        inner = [x for x in (args(node) if isinstance(node, Node) else ()) if isinstance(x, Node) and x in made_of]
        if len(inner) != 1:
            return unknown
        others = [x for x in args(node) if x is not inner[0]]
        number = constant(others[0]) if others else None
        if name in ("add", "sub"):
            plain = False
            scale = -scale if name == "sub" and args(node)[1] is inner[0] else scale
        elif (
            name in ("mul", "div")
            and number
            and args(node)[0 if name == "div" else args(node).index(inner[0])] is inner[0]
        ):
            scale *= number if name == "mul" else 1 / number
        elif name == "tanh":
            softcap, plain, bent = (
                abs(scale),
                False,
                "the scores are capped: a shift of all keys moves each score differently",
            )
        elif name == "where" and args(node)[0] is not inner[0]:
            fill = constant(next(x for x in args(node)[1:] if x is not inner[0]))
            if fill is None or fill > HIDDEN:
                return unknown
            plain, masked = False, True
        elif name not in _COPIES:
            return unknown
        node = inner[0]
    return _Score(scale, softcap, plain, masked, bent)
