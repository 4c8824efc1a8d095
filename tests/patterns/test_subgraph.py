"""Patterns shown as functions: every spelling of the same subgraph is found, a different one is not, and the reason is said."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody writes it

from foreshock import PatternError
from foreshock.patterns import ANY, GraphView, Match, explain, find, maybe, register, subgraph
from foreshock.patterns import find as _find
from foreshock.patterns.subgraph import NearMiss

B, H, S, D = 2, 3, 5, 8


@subgraph("norm", facts=lambda at: {"channels": at["x"].shape[-1]}, weights=("weight",))
def rms_norm(x, weight, *, eps=ANY):
    return {"out": x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight}


@subgraph("products")
def attend(q, k, v, *, scale=ANY):
    p = torch.softmax(q @ k.transpose(-2, -1) * scale, -1)
    return {"p": p, "out": p @ v}


def _x() -> torch.Tensor:
    return torch.randn(B, S, D, requires_grad=True)


def _weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(D))


def _qkv(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(B, H, S, D, requires_grad=True) for _ in range(count)]


def _only(capture, pattern, call, *args) -> Match:
    found = [
        match for match in capture(call, *args, extra=(pattern,)).findings.matches if match.pattern == pattern.name
    ]
    (match,) = found
    return match


def _none(capture, pattern, call, *args) -> None:
    found = capture(call, *args, extra=(pattern,)).findings
    assert [match for match in found.matches if match.pattern == pattern.name] == []
    assert found.errors == ()


NORMS = {
    "as shown": lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w,
    "other order": lambda x, w: w * (torch.rsqrt(1e-5 + x.pow(2).mean(dim=-1, keepdim=True)) * x),
    "operators": lambda x, w: w * (x * (torch.mean(x**2, 2, True) + 1e-5) ** -0.5),
    "casts": lambda x, w: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype),
    "in place": lambda x, w: x.square().mean(-1, keepdim=True).add_(1e-5).rsqrt_().mul(x).mul_(w),
    "copies": lambda x, w: (x * torch.rsqrt(F.dropout(x.square().mean(-1, keepdim=True), 0.0) + 1e-5)).contiguous() * w,
}
OTHERS = {
    "another axis": lambda x, w: x * torch.rsqrt(x.square().mean(-2, keepdim=True) + 1e-5) * w,
    "another power": lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-5) * w,
    "no keepdim": lambda x, w: x * torch.rsqrt(x.square().mean(-1).sum() + 1e-5) * w,
    "another tensor": lambda x, w: x * torch.rsqrt((x + 1).square().mean(-1, keepdim=True) + 1e-5) * w,
    "no weight": lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) + w,
    "real dropout": lambda x, w: F.dropout(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5), 0.1) * w,
}


@pytest.mark.parametrize("spelling", NORMS)
def test_every_spelling_is_found(capture, spelling: str) -> None:
    x, weight = _x(), _weight()
    match = _only(capture, rms_norm, NORMS[spelling], x, weight)
    assert match.kind == "norm"
    assert set(match.roles) == {"x", "weight", "out"}
    assert match.facts == {"eps": 1e-5, "channels": D, "dtype": "float32"}
    assert match.tapped == "out"
    assert match.roles["out"].meta["example_value"].shape == x.shape
    assert match.weights["weight_weight"].factors().shape == (1, 1, D)


@pytest.mark.parametrize("spelling", OTHERS)
def test_what_is_different_is_not(capture, spelling: str) -> None:
    _none(capture, rms_norm, OTHERS[spelling], _x(), _weight())


def _scores_in_place(q, k, v):
    scores = q @ k.mT
    scores *= 0.5
    return scores.softmax(3) @ v


def _written_later(q, k, v):
    scores = torch.matmul(q, k.transpose(3, 2))
    scores.mul_(0.5)
    return torch.softmax(scores, dim=-1) @ v


ATTENTIONS = {
    "divided": lambda q, k, v: torch.matmul(F.softmax(q @ k.mT / 2, dim=-1), v),
    "permuted": lambda q, k, v: torch.softmax(0.5 * (q @ k.permute(0, 1, 3, 2)), -1).matmul(v),
    "in fp32": lambda q, k, v: F.softmax(q @ k.transpose(2, 3) * 0.5, dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "operator in place": _scores_in_place,
    "method in place, result unused": _written_later,
}


@pytest.mark.parametrize("spelling", ATTENTIONS)
def test_numbers_are_captured(capture, spelling: str) -> None:
    match = _only(capture, attend, ATTENTIONS[spelling], *_qkv())
    assert match.facts["scale"] == 0.5
    assert [match.roles[role].op for role in ("q", "k", "v")] == ["placeholder"] * 3


def test_roles_are_what_they_say(capture) -> None:
    captured = capture(lambda q, k, v: torch.softmax(q @ k.mT * 2.0, -1) @ v, *_qkv(), extra=(attend,))
    (match,) = (match for match in captured.findings.matches if match.pattern == "attend")
    assert [match.roles[role].name for role in ("q", "k", "v")] == ["l_q_", "l_k_", "l_v_"]
    assert match.roles["out"] is captured.output


def test_an_own_kind_takes_nothing_from_the_known_ones(capture) -> None:
    found = capture(lambda q, k, v: torch.softmax(q @ k.mT * 0.5, -1) @ v, *_qkv(), extra=(attend,)).findings
    assert sorted(match.kind for match in found.matches) == ["attention", "products"]
    shown = capture(lambda q, k, v: torch.softmax(q @ k.mT * 0.5, -1) @ v, *_qkv(), extra=(my_attention,)).match
    assert shown.pattern == "my_attention"


def test_one_tensor_may_play_two_roles(capture) -> None:
    match = _only(capture, attend, lambda q, k: torch.softmax(q @ k.mT * 2.0, -1) @ k, *_qkv(2))
    assert match.roles["k"] is match.roles["v"]


def test_the_same_role_is_the_same_tensor(capture) -> None:
    @subgraph("gate")
    def gate(x):
        return x.sigmoid() * x.tanh()

    assert _only(capture, gate, lambda x: x.tanh() * x.sigmoid(), _x())
    _none(capture, gate, lambda x: x.tanh() * (x + 1).sigmoid(), _x())


def test_sizes_of_the_pattern_fit_any_number(capture) -> None:
    @subgraph("scaled")
    def scaled(q, k):
        return (q @ k.mT) * q.shape[-1] ** -0.5

    assert _only(capture, scaled, lambda q, k: (q @ k.transpose(-1, -2)) / 7.0, *_qkv(2))


def test_optional_steps(capture) -> None:
    @subgraph("scores")
    def scores(q, k, *, cap=ANY):
        return torch.softmax(maybe(lambda s: torch.tanh(s / cap) * cap, q @ k.mT), -1)

    plain = _only(capture, scores, lambda q, k: torch.softmax(q @ k.mT, -1), *_qkv(2))
    capped = _only(capture, scores, lambda q, k: torch.softmax(torch.tanh(q @ k.mT / 30.0) * 30.0, -1), *_qkv(2))
    assert "cap" not in plain.facts
    assert capped.facts["cap"] == pytest.approx(30.0)
    _none(capture, scores, lambda q, k: torch.softmax(torch.tanh(q @ k.mT / 30.0) * 20.0, -1), *_qkv(2))


def test_defaults_are_part_of_the_pattern(capture) -> None:
    @subgraph("slope")
    def slope(x, negative=0.2):
        return F.leaky_relu(x, negative).exp()

    assert _only(capture, slope, lambda x: torch.exp(F.leaky_relu(x, negative_slope=0.2)), _x())
    _none(capture, slope, lambda x: torch.exp(F.leaky_relu(x)), _x())


def test_a_cast_that_is_named_must_be_there(capture) -> None:
    @subgraph("narrow")
    def narrow(x):
        return x.to(torch.bfloat16).exp()

    assert _only(capture, narrow, lambda x: x.bfloat16().contiguous().exp(), _x())
    _none(capture, narrow, lambda x: x.half().exp(), _x())
    _none(capture, narrow, lambda x: x.exp(), _x())


def test_all_places_of_a_graph(capture) -> None:
    def twice(x, w):
        for _ in range(2):
            x = NORMS["as shown"](x, w)
        return x

    found = capture(twice, _x(), _weight(), extra=(rms_norm,)).findings.matches
    assert len(found) == 2
    assert found[0].roles["out"] is found[1].roles["x"]


def test_two_readings_at_one_anchor(capture) -> None:
    def two(q, k, v, w):
        p = torch.softmax(q @ k.mT * 2.0, -1)
        return p @ v, p @ w

    found = [match for match in capture(two, *_qkv(4), extra=(attend,)).findings.matches if match.kind == "products"]
    assert sorted(match.roles["v"].name for match in found) == ["l_v_", "l_w_"]
    assert len({match.roles["out"] for match in found}) == 2


def test_finding_again_changes_nothing(capture) -> None:
    captured = capture(NORMS["casts"], _x(), _weight(), extra=(rms_norm,))
    before = str(captured.module.graph)
    assert len(_find(captured.view, [rms_norm]).matches) == 1
    assert str(captured.module.graph) == before


def test_a_near_miss_says_how_far_it_got(capture) -> None:
    call = lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w  # noqa: E731
    found = capture(call, _x(), _weight(), extra=(rms_norm,)).findings
    (miss,) = (miss for miss in found.misses if isinstance(miss, NearMiss))
    assert not miss
    assert not miss.quiet
    assert miss.reason.startswith(
        "3 of 6 steps of the pattern `rms_norm` are here; not found: pow(self=add, exponent=-0.5)"
    )
    assert "torch.rsqrt(x.square()" in miss.reason  # the pattern's line
    assert "read by pow(self=add, exponent=0.5)" in miss.reason  # what stands there
    assert "test_subgraph.py" in str(miss)  # the model's line


def test_unrelated_ops_are_quiet(capture) -> None:
    assert capture(lambda x: x.mean(-1, keepdim=True), _x(), extra=(rms_norm,)).findings.misses == ()


def test_explain_finds_and_tells() -> None:
    found = explain(rms_norm, NORMS["casts"], _x(), _weight())
    assert found
    assert "norm: x = " in str(found)
    missed = explain(rms_norm, OTHERS["another power"], _x(), _weight())
    assert not missed
    assert "nearest misses" in str(missed)
    assert "exponent=2" in str(missed)
    nothing = explain(rms_norm, lambda x: x.softmax(-1), _x())
    assert "no captured graph calls mean" in str(nothing)


def test_matching_is_linear_where_everybody_reads_one_tensor(capture) -> None:
    """A rotary table that every layer reads must not lead from one layer to all others."""

    @subgraph("rotary")
    def rotary(x, angle):
        return x * angle.cos() + torch.cat([-x, x], -1) * angle.sin()

    def calls(layers: int) -> int:
        """Of functions, those of C included."""
        count = 0

        def profile(frame, event, argument) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        def call(x, angle):
            cos, sin = angle.cos(), angle.sin()
            for _ in range(layers):
                x = x * cos + torch.cat([-x, x], -1)[..., :D] * sin
            return x

        view = capture(call, _x(), torch.randn(D)).view
        find(view, [rotary])  # which traces the pattern, once
        sys.setprofile(profile)
        try:
            find(GraphView(view.graph, view.parameters, view.names), [rotary])
        finally:
            sys.setprofile(None)
        return count

    assert calls(160) <= 4.2 * calls(40)


@subgraph("attention", facts={"causal": False})
def my_attention(q, k, v, *, scale=ANY):
    logits = q @ k.transpose(-2, -1) * scale
    return {"logits": logits, "out": torch.softmax(logits, -1) @ v}


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H * D, H * D, bias=False) for _ in range(3))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (H, D)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return F.softmax(torch.matmul(q, k.mT) / 2.0, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def test_an_attention_has_the_facts_weights_and_laws_of_the_built_in_one(capture) -> None:
    x = torch.randn(B, S, H * D)
    match = _only(capture, my_attention, Written(), x)
    known = capture(lambda m, x: F.scaled_dot_product_attention(*_heads(m, x), scale=0.5), Written(), x).match
    for fact in ("heads", "kv_heads", "head_dim", "value_dim", "scale", "dropout", "dtype", "causal"):
        assert match.facts[fact] == known.facts[fact], fact
    assert match.laws == known.laws
    assert set(match.laws.values()) == {""}
    assert match.weights["q_weight"].names == ("q.weight",)
    assert match.weights["k_weight"].heads == H
    for role in ("q", "k", "v"):
        edge = match.edge(role)
        assert edge.source is match.roles[role]


def _heads(model, x):
    return (p(x).unflatten(-1, (H, D)).transpose(1, 2) for p in (model.q, model.k, model.v))


def test_an_attention_that_caps_its_logits_keeps_the_laws_that_hold(capture) -> None:
    @subgraph("attention")
    def capped(q, k, v, *, softcap=ANY):
        return torch.softmax(torch.tanh(q @ k.mT / softcap) * softcap, -1) @ v

    match = _only(capture, capped, lambda q, k, v: (torch.tanh(q @ k.mT / 30.0) * 30.0).softmax(-1) @ v, *_qkv())
    assert match.facts["softcap"] == pytest.approx(30.0)
    assert "capped" in match.laws["law/key_shift"]
    assert match.laws["law/value_mass"] == match.laws["law/euler"] == ""


def test_a_form_shown_goes_before_a_built_in_one_that_begins_elsewhere(capture) -> None:
    @subgraph("attention")
    def fancy(q, k, v):
        return torch.softmax(torch.special.expit(q @ k.mT), -1) @ v

    def call(q, k, v):
        return torch.softmax(torch.special.expit(q @ k.mT), -1) @ v

    assert fancy.anchors != {"softmax"}
    assert _only(capture, fancy, call, *_qkv())
    assert [match.pattern for match in capture(call, *_qkv(), extra=(fancy,)).findings.matches] == ["fancy"]


def test_a_tensor_that_enters_twice_is_not_tapped(capture) -> None:
    @subgraph("attention")
    def sharpened(q, k, v):
        return torch.softmax((q @ k.mT) * q.sum(-1, keepdim=True), -1) @ v

    match = _only(
        capture, sharpened, lambda q, k, v: torch.softmax(torch.sum(q, 3, True) * (q @ k.mT), -1) @ v, *_qkv()
    )
    assert match.operands == {}
    assert "q enters at several places" in match.laws["law/euler"]


def test_an_attention_lies_as_the_layout_says(capture) -> None:
    def call(q, k, v):
        return my_attention_of_three(q, k, v)

    def my_attention_of_three(q, k, v):
        return torch.softmax(q @ k.mT * 0.5, -1) @ v

    qkv = [torch.randn(B * H, S, D, requires_grad=True) for _ in range(3)]
    axes = f"(b h={H}) s d"
    merged = subgraph("attention", layout=dict.fromkeys(("q", "k", "v", "out"), axes))(my_attention_of_three)
    assert _only(capture, merged, call, *qkv).facts["heads"] == H
    silent = subgraph("attention")(my_attention_of_three)
    assert "say how it lies with layout={'q': ...}" in str(explain(silent, call, *qkv))


def test_a_router(capture) -> None:
    @subgraph("router")
    def my_router(logits):
        scores = torch.sigmoid(logits)
        gates, indices = scores.max(-1, keepdim=True)
        return {"scores": scores, "indices": indices, "gates": gates}

    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(D, 4, bias=False)

        def forward(self, x):
            gates, chosen = torch.sigmoid(self.gate(x)).max(dim=-1, keepdim=True)
            return gates, chosen

    match = _only(capture, my_router, Switch(), torch.randn(S, D))
    assert {fact: match.facts[fact] for fact in ("experts", "top_k", "scoring")} == {
        "experts": 4,
        "top_k": 1,
        "scoring": "sigmoid",
    }
    assert match.tapped == "logits"
    assert match.weights["weight"].names == ("gate.weight",)


@pytest.mark.parametrize(
    ("kind", "function", "says"),
    [
        ("attention", lambda q, k: q @ k.mT, "an attention needs the role `v`; it has k, out, q"),
        ("router", lambda logits: logits.softmax(-1), "a router needs the role `indices`"),
        ("attention", lambda x, k, v: {"q": x.exp(), "out": x.exp() @ k.mT @ v}, "`q` enters an attention"),
    ],
)
def test_a_known_kind_needs_its_roles(kind: str, function, says: str) -> None:
    with pytest.raises(PatternError, match=says):
        subgraph(kind)(function)


def _branches(x):
    return x if x.sum() > 0 else -x


BAD = {
    "control flow": (_branches, "no `if` on tensors"),
    "nothing returned": (lambda x: None, "it returns nothing"),
    "a tuple": (lambda x: (x.exp(), x.sin()), "return its tensors by role"),
    "unused": (lambda x, y: x.exp(), "depends on the parameter `y`"),
    "no op": (lambda x: {"out": x}, "depends on the parameter `x`"),
    "a number": (lambda x: {"out": 3.0}, "is float, no tensor"),
    "two subgraphs": (lambda x, y: {"a": x.exp(), "b": y.sin()}, "make them two patterns"),
    "a tensor of its own": (lambda x: x + torch.ones(3), "no tensors made elsewhere"),
    "an unnamed role": (lambda *x: x[0].exp(), "names no role"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_wrong_pattern_is_refused_when_declared(mistake: str) -> None:
    function, says = BAD[mistake]
    with pytest.raises(PatternError, match=says.replace("(", r"\(")):
        subgraph("x")(function)


def test_a_wrong_role_is_refused() -> None:
    with pytest.raises(PatternError, match="layout names the role 'y'; its roles are out, x"):
        subgraph("x", layout={"y": "b s d"})(lambda x: x.exp())


def test_a_pattern_prints_its_graph() -> None:
    assert "rsqrt = pow(self=add, exponent=-0.5)" in str(rms_norm)
    assert "# role `out`" in str(rms_norm)


def test_registered_like_any_pattern(capture, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["foreshock.patterns.find"], "_registered", [])
    register(rms_norm)
    assert capture(NORMS["as shown"], _x(), _weight()).match.pattern == "rms_norm"
