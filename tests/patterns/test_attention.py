"""Attention sites: what is recognised, what is not and why, and the factors read from the weights behind it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from projected import HIDDEN, Attention, B, D, G, H, S
from projected import x as _x
from torch import nn
from torch.nn import functional

from foreshock import patterns
from foreshock.errors import PatternError
from foreshock.layout import canonical
from foreshock.patterns import Match, Miss, Pattern, attention_op
from foreshock.patterns.ops import op

sdpa = functional.scaled_dot_product_attention


MASK = torch.ones(S, S).tril().bool()

FORMS = {
    "positional": (lambda q, k, v: sdpa(q, k, v), {"causal": False, "dropout": 0.0, "scale": D**-0.5}),
    "keyword": (lambda q, k, v: sdpa(query=q, key=k, value=v), {"causal": False}),
    "mixed": (lambda q, k, v: sdpa(q, value=v, key=k), {"causal": False}),
    "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), {"causal": True}),
    "all positional": (
        lambda q, k, v: sdpa(q, k, v, None, 0.0, True, scale=0.5), {"causal": True, "scale": 0.5},
    ),
    "scale": (lambda q, k, v: sdpa(q, k, v, scale=0.25), {"scale": 0.25}),
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), {"dropout": 0.5}),
    "positional dropout": (lambda q, k, v: sdpa(q, k, v, None, 0.25), {"dropout": 0.25}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_call_is_one_site(capture, form: str) -> None:
    call, facts = FORMS[form]
    match = capture(Attention(call), _x()).match
    assert (match.kind, match.pattern, match.layout["k"]) == ("attention", "scaled_dot_product_attention", "b h s d")
    assert match.facts.items() >= {**facts, "heads": H, "kv_heads": H, "head_dim": D, "value_dim": D}.items()
    assert [match.roles[role].meta["example_value"].shape[1] for role in "qkv"] == [H, H, H]
    assert match.weights["q_weight"].names == ("q.weight",)
    assert match.weights["k_weight"].names == ("k.weight",)
    anchor = match.anchor
    for role, where in match.operands.items():
        held = anchor.kwargs[where] if isinstance(where, str) else anchor.args[where]
        assert held is match.roles[role]


def test_finding_twice_changes_nothing(capture) -> None:
    captured = capture(Attention(), _x())
    before = str(captured.module.graph)
    again = patterns.find(captured.view)
    assert [match.anchor for match in again.matches] == [captured.match.anchor]
    assert str(captured.module.graph) == before


@pytest.mark.parametrize("mask", [MASK, torch.zeros(S, S), torch.zeros(B, 1, S, S)])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_mask_is_a_role(capture, mask: torch.Tensor, by_name: bool) -> None:
    def call(q, k, v):
        return sdpa(q, k, v, attn_mask=mask) if by_name else sdpa(q, k, v, mask)

    match = capture(Attention(call), _x()).match
    assert match.roles["mask"].meta["example_value"].shape == mask.shape
    assert "mask" in match.laws["law/value_mass"]
    assert match.laws["law/key_shift"] == match.laws["law/euler"] == ""


def test_grouped_queries(capture) -> None:
    match = capture(Attention(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), kv_heads=G), _x()).match
    assert (match.facts["heads"], match.facts["kv_heads"]) == (H, G)
    assert match.weights["k_weight"].heads == G
    assert match.weights["k_weight"].read_by(H) == (0, 0, 1, 1)


def test_repeated_keys_keep_the_count_of_the_weights(capture) -> None:
    def call(q, k, v):
        k, v = (x[:, :, None].expand(B, G, H // G, S, D).reshape(B, H, S, D) for x in (k, v))
        return sdpa(q, k, v)

    match = capture(Attention(call, kv_heads=G), _x()).match
    assert (match.facts["heads"], match.facts["kv_heads"]) == (H, G)
    assert match.weights["k_weight"].read_by(H) == (0, 0, 1, 1)


@pytest.mark.parametrize("repeat", ["repeat", "repeat_interleave"])
def test_queries_without_a_weight_have_the_heads_of_the_kernel(capture, repeat: str) -> None:
    """JetMoE: a graph break cuts the queries off, and keys are repeated for their experts."""

    class Cut(Attention):
        def forward(self, x, q):
            k, v = (self.heads(y(x)) for y in (self.k, self.v))
            twice = (
                (lambda x: x.repeat(1, H // G, 1, 1))
                if repeat == "repeat"
                else lambda x: x.repeat_interleave(H // G, 1)
            )
            return self.call(q, twice(k), twice(v))

    match = capture(Cut(lambda q, k, v: sdpa(q, k, v), kv_heads=G), _x(), torch.randn(B, H, S, D)).match
    assert (match.facts["heads"], match.facts["kv_heads"]) == (H, G)
    assert match.weights["k_weight"].read_by(H) == ((0, 1, 0, 1) if repeat == "repeat" else (0, 0, 1, 1))


def test_dropout_breaks_the_mass_law_alone(capture) -> None:
    laws = capture(Attention(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5)), _x()).match.laws
    assert "dropout" in laws["law/value_mass"]
    assert laws["law/key_shift"] == laws["law/euler"] == laws["law/bias"] == ""


def test_without_gradients_no_law_holds(capture) -> None:
    class Frozen(Attention):
        def forward(self, x):
            return self.call(self.heads(self.q(x)), self.heads(self.k(x)).detach(), self.heads(self.v(x)))

    match = capture(Frozen(), _x()).match
    lost = {law for law, reason in match.laws.items() if reason == "no gradient reaches k"}
    assert lost == {*match.laws} - {"law/hull", "law/shadow"}


def test_cross_attention_with_other_lengths_and_value_width(capture) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(HIDDEN, H * D), nn.Linear(HIDDEN, H * D)
            self.v = nn.Linear(HIDDEN, H * 3)

        def forward(self, x, memory):
            q, k = (y.view(B, -1, H, D).transpose(1, 2) for y in (self.q(x), self.k(memory)))
            return sdpa(q, k, self.v(memory).view(B, -1, H, 3).transpose(1, 2))

    match = capture(Cross(), _x(), torch.randn(B, 9, HIDDEN)).match
    assert (match.facts["head_dim"], match.facts["value_dim"]) == (D, 3)
    assert match.weights["q_weight"].names == ("q.weight",)


class Shaped(nn.Module):
    """Heads cut and put wherever ``shape`` puts them; ``[B, S, H, h]`` comes in."""

    def __init__(self, shape, call=sdpa):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, H * D, bias=False) for _ in range(3))
        self.shape, self.call = shape, call

    def forward(self, x):
        return self.call(*(self.shape(y(x).view(*x.shape[:2], H, D)) for y in (self.q, self.k, self.v)))


LIES = {
    "heads before batch": (lambda y: y.permute(2, 0, 1, 3), "h b s d", H, D),
    "one head, no axis for it": (lambda y: y.flatten(2), "b s d", 1, H * D),
    "heads merged into the batch": (lambda y: y.transpose(1, 2).flatten(0, 1), f"(b h={H}) s d", H, D),
    "batch merged into heads": (lambda y: y.permute(2, 0, 1, 3).flatten(0, 1), f"(h={H} b) s d", H, D),
    "heads in groups": (lambda y: y.transpose(1, 2).unflatten(1, (2, 2)), "b h0 h1 s d", H, D),
    "windows": (lambda y: y.unflatten(1, (2, S // 2)).transpose(2, 3), "b0 b1 h s d", H, D),
    "windows merged into the batch": (
        lambda y: y.unflatten(1, (2, S // 2)).flatten(0, 1).transpose(1, 2), "b h s d", H, D,
    ),
    "a batch instead of heads": (lambda y: y.flatten(2).unflatten(1, (2, S // 2)), "b0 b1 s d", 1, H * D),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_heads_are_told_from_batches_by_the_weights(capture, lie: str) -> None:
    shape, layout, heads, head_dim = LIES[lie]
    model, x = Shaped(shape), _x()
    captured = capture(model, x)
    match = captured.match
    assert set(match.layout.values()) == {layout}
    assert (match.facts["heads"], match.facts["head_dim"]) == (heads, head_dim)
    assert set(match.laws.values()) == {""}
    q = canonical(shape(model.q(x).view(B, S, H, D)), layout)
    for head in range(heads):
        made = x @ match.weights["q_weight"].factor(head)
        torch.testing.assert_close(q[:, head].reshape(B, S, head_dim), made)


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [((S, D), "s d"), ((B, S, D), "b s d"), ((B, H, S, D), "b h s d"), ((B, 3, H, S, D), "b0 b1 h s d")],
)
def test_without_weights_heads_stand_before_positions(capture, sizes: tuple[int, ...], layout: str) -> None:
    q = torch.randn(sizes, requires_grad=True)
    assert set(capture(sdpa, q, q, q).match.layout.values()) == {layout}


def test_shared_keys_without_weights_are_heads_in_a_batch_of_one(capture) -> None:
    """The vision towers of EXAONE and LFM: a graph break cuts all trails, and heads are told by their place alone."""
    q, k = torch.randn(1, H, S, D, requires_grad=True), torch.randn(1, G, S, D, requires_grad=True)
    match = capture(lambda q, k: sdpa(q, k, k, enable_gqa=True), q, k).match
    assert (match.facts["heads"], match.facts["kv_heads"]) == (H, G)
    assert canonical(torch.empty(1, G, S, D), match.layout["k"]).shape == (1, G, S, D)


def test_a_mask_lies_as_the_frame_does(capture) -> None:
    def call(q, k, v):
        return sdpa(q, k, v, attn_mask=torch.zeros(B, 1, 1, S))

    match = capture(Attention(call), _x()).match
    assert match.layout["mask"].split()[-1] == "d"
    assert canonical(torch.zeros(B, 1, 1, S), match.layout["mask"]).shape == (B, 1, 1, S)
    assert not match.facts["masked"]  # zeros hide nothing
    assert "recompute" not in match.facts


def test_a_mask_that_differs_over_part_of_the_batch_keeps_recomputed_rows_out(capture) -> None:
    def call(q, k, v):
        return sdpa(q, k, v, attn_mask=torch.zeros(2, 1, 1, S // 2, S // 2))

    match = capture(Shaped(LIES["windows"][0], call), _x()).match
    assert "mask" not in match.roles
    assert match.facts["recompute"] is False
    assert any("mask" in note for note in match.notes)


def test_keys_of_one_sequence_serve_a_batch(capture) -> None:
    class Shared(Attention):
        def forward(self, x):
            return self.call(self.heads(self.q(x)), self.heads(self.k(x[:1])), self.heads(self.v(x[:1])))

    match = capture(Shared(lambda q, k, v: sdpa(q, k, v)), _x()).match
    assert set(match.laws.values()) == {""}
    assert match.weights["k_weight"].names == ("k.weight",)


def test_a_query_serves_a_batch(capture) -> None:
    class Pooling(Attention):
        def forward(self, x):
            return self.call(self.heads(self.q(x[:1])), self.heads(self.k(x)), self.heads(self.v(x)))

    match = capture(Pooling(lambda q, k, v: sdpa(q, k, v)), _x()).match
    assert set(match.operands) == {"q", "k", "v"}
    assert set(match.laws.values()) == {""}


def test_near_misses_say_why(capture) -> None:
    other = capture(lambda q, k: sdpa(q, k, k), torch.randn(B, 1, S, D), torch.randn(B, H, S, D))
    assert other.findings.matches == ()
    assert "heads do not fit" in other.reasons[0]
    assert not other.findings.misses[0]
    assert "scaled_dot_product_attention" in str(other.findings.misses[0])


def test_inputs_without_a_weight_are_a_site_with_a_note(capture) -> None:
    q, k, v = (torch.randn(B, H, S, D, requires_grad=True) for _ in range(3))
    match = capture(lambda q, k, v: sdpa(q, k, v), q, k, v).match
    assert match.weights == {}
    assert len(match.notes) == 2
    assert all("was not traced to a weight" in note for note in match.notes)


# -- patterns of the user's own -----------------------------------------------------------------------------------------


@pytest.fixture
def registry() -> Iterator[list[Pattern]]:
    from foreshock.patterns import find

    module = __import__("sys").modules[find.__module__]
    kept = list(module._registered)
    yield module._registered
    module._registered[:] = kept


def _relu_site(view, node) -> Match | Miss:
    if node.args[0].op != "placeholder" and op(node.args[0]) != "linear":
        return Miss(node, "not behind a linear layer")
    return Match("activation", "relu site", node, {"out": node})


def test_a_pattern_of_the_users_own(capture, registry) -> None:
    mine = Pattern("relu site", frozenset({"relu"}), _relu_site)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh())
    assert capture(model, torch.randn(2, 4)).findings.matches == ()
    assert patterns.register(mine) is mine
    patterns.register(mine)
    assert registry == [mine]
    match = capture(model, torch.randn(2, 4)).match
    assert (match.kind, op(match.anchor)) == ("activation", "relu")
    missed = capture(nn.Sequential(nn.Tanh(), nn.ReLU()), torch.randn(2, 4))
    assert missed.findings.matches == ()
    assert missed.reasons == ["not behind a linear layer"]
    with pytest.raises(PatternError, match="Pattern"):
        patterns.register("relu")


def test_a_registered_pattern_goes_before_the_built_in_one(capture, registry) -> None:
    patterns.register(attention_op("mine::sdpa"))
    other = Pattern(
        "mine",
        frozenset({"scaled_dot_product_attention"}),
        lambda view, node: Match("other", "mine", node, {"out": node}),
    )
    patterns.register(other)
    assert capture(Attention(), _x()).match.kind == "other"


def test_a_pattern_that_fails_is_reported_and_the_next_one_tried(capture) -> None:
    def fail(view, node):
        raise RuntimeError("boom")

    broken = Pattern("broken", frozenset({"scaled_dot_product_attention"}), fail)
    captured = capture(Attention(), _x(), extra=(broken,))
    assert captured.match.pattern == "scaled_dot_product_attention"
    ((name, error),) = captured.findings.errors
    assert (name, str(error)) == ("broken", "boom")


def test_under_autocast_the_site_has_the_dtype_that_the_kernel_computes_in(capture) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    match = capture(attend, *(torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))).match
    assert str(match.roles["q"].meta["example_value"].dtype) == "torch.float32"
    assert match.facts["dtype"] == "bfloat16"
