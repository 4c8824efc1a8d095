"""Descriptions of opaque ops are held against the op's schema: a mistake is named with what was meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foreshock import PatternError
from foreshock.patterns import attention_op, explain, router_op

H, D = 2, 4


@torch.library.custom_op("foreshock_described::attend", mutates_args=())
def attend(queries: Tensor, keys: Tensor, values: Tensor, softmax_scale: float, is_causal: bool = True) -> Tensor:
    return queries.clone()


@attend.register_fake
def _(queries, keys, values, softmax_scale, is_causal=True):
    return torch.empty_like(queries)


@torch.library.custom_op("foreshock_described::route", mutates_args=())
def route(gates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, chosen = gates.topk(k)
    return weights.clone(), chosen.clone()


@route.register_fake
def _(gates, k):
    return gates.new_empty(*gates.shape[:-1], k), gates.new_empty(*gates.shape[:-1], k, dtype=torch.long)


OPTIONS = {"q": "queries", "k": "keys", "v": "values", "output": None, "causal": "is_causal", "scale": "softmax_scale"}
WRONG = {
    "namespace": (
        {"name": "foreshock_descibed::attend"},
        "no op of this name .* did you mean 'foreshock_described::attend'",
    ),
    "name": (
        {"name": "foreshock_described::atend"},
        "no op of this name .* did you mean 'foreshock_described::attend'",
    ),
    "dot": ({"name": "foreshock_described.attend"}, "qualified name, 'namespace::name'; did you mean"),
    "argument": ({"q": "query"}, r"q='query' is none of its arguments; did you mean 'queries'(.|\n)*Tensor queries"),
    "position": ({"v": 7}, r"v=7 is beyond its 5 arguments \(queries, keys, values, softmax_scale, is_causal\)"),
    "causal": ({"causal": "causal"}, "did you mean 'is_causal'"),
    "result": ({"output": 1}, r"output=1 is beyond its 1 results"),
    "layout": ({"layout": "SBHD"}, "layout is 'SBHD'; give 'BHSD', 'BSHD'"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_description_is_refused_when_given(mistake: str) -> None:
    changed, says = WRONG[mistake]
    options = {"name": "foreshock_described::attend", **OPTIONS, **changed}
    with pytest.raises(PatternError, match=says):
        attention_op(options.pop("name"), **options)


def test_a_wrong_router_description_is_refused() -> None:
    with pytest.raises(PatternError, match=r"logits='gate' is none of its arguments; did you mean 'gates'"):
        router_op("foreshock_described::route", logits="gate")
    with pytest.raises(PatternError, match=r"indices=2 is beyond its 2 results"):
        router_op("foreshock_described::route", indices=2)


def test_an_op_to_come_is_not_refused() -> None:
    assert attention_op("a_library_not_imported_yet::attend", q="anything").anchors == {
        "a_library_not_imported_yet::attend"
    }


class Attention(nn.Module):
    def __init__(self, heads_first: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H * D, H * D) for _ in range(3))
        self.heads_first = heads_first

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (H, D)) for p in (self.q, self.k, self.v))
        if self.heads_first:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, 0.5).sum()


@pytest.mark.parametrize("right", ["BHSD", "BSHD"])
def test_a_layout_against_the_projections_is_refused(capture, right: str) -> None:
    model, x = Attention(right == "BHSD"), torch.randn(2, 5, H * D)
    wrong = "BSHD" if right == "BHSD" else "BHSD"
    found = capture(model, x, extra=(attention_op("foreshock_described::attend", layout=wrong, **OPTIONS),)).findings
    ((name, error),) = found.errors
    assert name == "foreshock_described::attend"
    assert f"did you mean '{right}'" in str(error)
    fine = capture(model, x, extra=(attention_op("foreshock_described::attend", layout=right, **OPTIONS),))
    assert fine.match.facts["heads"] == H


def test_explaining_a_description() -> None:
    found = explain(
        attention_op("foreshock_described::attend", layout="BHSD", **OPTIONS), Attention(True), torch.randn(2, 5, H * D)
    )
    assert "1 found" in str(found)
    absent = explain(attention_op("elsewhere::attend"), Attention(True), torch.randn(2, 5, H * D))
    assert "no captured graph calls elsewhere::attend" in str(absent)
    assert "Opaque ops in it: foreshock_described::attend" in str(absent)
