"""Attention written out among other things: shared products and projections, mixed heads, what is read elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from foreshock import Watch

B, S, H, D, HIDDEN = 2, 6, 4, 8, 32
ADDED = torch.zeros(S, S).masked_fill(torch.ones(S, S).triu(1).bool(), -math.inf)


class Attention(nn.Module):
    """Separate projections; ``call(q, k, v)`` on ``[B, H, S, h]``."""

    def __init__(self, call=None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, H * D, bias=False) for _ in range(3))
        self.call = call

    def parts(self, x: Tensor) -> list[Tensor]:
        return [y(x).view(*x.shape[:2], H, D).transpose(1, 2) for y in (self.q, self.k, self.v)]

    def forward(self, x: Tensor):
        return self.call(*self.parts(x))


def _merged(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def test_two_attentions_of_one_product_do_not_vouch_for_shifts(capture) -> None:
    def twice(q, k, v):
        a = q @ k.mT
        return (a * 0.1).softmax(-1) @ v + (a * 0.2).softmax(-1) @ v

    matches = capture(Attention(twice), torch.randn(B, S, HIDDEN)).findings.matches
    assert [match.facts["scale"] for match in matches] == [0.1, 0.2]
    assert all("read elsewhere" in match.laws["law/key_shift"] for match in matches)
    assert all(match.laws["law/euler"] == "" for match in matches)


def test_one_projection_feeds_two_attentions(capture) -> None:
    def difference(q, k, v):
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        return (q1 @ k1.mT).softmax(-1) @ v - 0.5 * ((q2 @ k2.mT).softmax(-1) @ v)

    matches = capture(Attention(difference), torch.randn(B, S, HIDDEN)).findings.matches
    assert [match.facts["head_dim"] for match in matches] == [D // 2, D // 2]
    firsts, seconds = (match.weights["q_weight"].index for match in matches)
    assert (seconds - firsts == D // 2).all()
    assert all(set(match.laws.values()) == {""} for match in matches)


def test_two_softmaxes_in_one_product_are_two_sites_without_an_output(capture) -> None:
    """The differential transformer: what is multiplied with the values is a difference."""

    def difference(q, k, v):
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        return ((q1 @ k1.mT).softmax(-1) - 0.5 * (q2 @ k2.mT).softmax(-1)) @ v

    matches = capture(Attention(difference), torch.randn(B, S, HIDDEN)).findings.matches
    assert [match.facts["head_dim"] for match in matches] == [D // 2, D // 2]
    for match in matches:
        assert "out" not in match.roles
        assert {law for law, reason in match.laws.items() if not reason} == {"law/euler"}


def test_halves_of_one_softmax_in_one_product_are_one_site_of_all_heads(capture) -> None:
    """The differential transformer as published: neighbouring heads of one softmax, and values of twice the width."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(HIDDEN, H * D) for _ in range(3))

        def forward(self, x):
            q, k = (y(x).view(B, S, H, D).transpose(1, 2) for y in (self.q, self.k))
            v = self.v(x).view(B, S, H // 2, 2 * D).transpose(1, 2)
            p = (q @ k.mT * D**-0.5).softmax(-1).view(B, H // 2, 2, S, S)
            return (p[:, :, 0] - 0.3 * p[:, :, 1]) @ v

    model = Difference()
    match = capture(model, torch.randn(B, S, HIDDEN)).match
    assert (match.facts["heads"], match.facts["kv_heads"], match.facts["value_dim"]) == (H, H, 2 * D)
    assert match.weights["k_weight"].heads == H
    assert {law for law, reason in match.laws.items() if not reason} == {"law/euler"}
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        torch.compile(model, backend=watch.backend)(torch.randn(B, S, HIDDEN)).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        assert watch.series("law/euler")[1].max() < 1e-5


def test_keys_of_several_projections_say_so(capture) -> None:
    class Joint(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.k2 = nn.Linear(HIDDEN, H * D)

        def forward(self, x):
            q, k, v = self.parts(x)
            k = torch.cat([k, self.k2(x).view(*x.shape[:2], H, D).transpose(1, 2)], 2)
            return (q @ k.mT).softmax(-1) @ torch.cat([v, v], 2)

    match = capture(Joint(), torch.randn(B, S, HIDDEN)).match
    assert match.weights["k_weight"].names == ("k2.weight",)
    assert any("several projections" in note for note in match.notes)


@pytest.mark.parametrize("step", [lambda a: a, lambda a: a / 4, lambda a: a + torch.zeros(S, 1), lambda a: a.tanh()])
def test_a_single_key_is_an_attention(capture, step) -> None:
    def call(q, k, v):
        return step(q @ k[:, :, :1].mT).softmax(-1) @ v[:, :, :1]

    match = capture(Attention(call), torch.randn(B, S, HIDDEN)).match
    assert (match.facts["heads"], match.facts["head_dim"]) == (H, D)


def test_split_logits_of_a_decoupled_position_are_one_attention(capture) -> None:
    class Decoupled(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.qr, self.kr = nn.Linear(HIDDEN, H * 4), nn.Linear(HIDDEN, 4)

        def forward(self, x):
            q, k, v = self.parts(x)
            turned = self.qr(x).view(B, S, H, 4).transpose(1, 2) @ self.kr(x).view(B, S, 1, 4).transpose(1, 2).mT
            return ((q @ k.mT + turned) * 0.2).softmax(-1) @ v

    match = capture(Decoupled(), torch.randn(B, S, HIDDEN)).match
    assert (match.facts["head_dim"], match.facts["scale"], match.facts["masked"]) == (D, 0.2, False)
    assert match.weights["k_weight"].names == ("k.weight",)


@pytest.mark.parametrize("spelling", ["linear", "convolution"])
def test_mixed_heads(capture, spelling: str) -> None:
    class Talking(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(H, H) if spelling == "linear" else nn.Conv2d(H, H, 1)

        def mix(self, a):
            return self.before(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if spelling == "linear" else self.before(a)

        def forward(self, x):
            q, k, v = self.parts(x)
            return self.mix(q @ k.mT).softmax(-1) @ v

    match = capture(Talking(), torch.randn(B, S, HIDDEN)).match
    assert match.laws["law/key_shift"] == match.laws["law/value_mass"] == match.laws["law/euler"] == ""
    assert "mixed" in match.laws["law/bias"]
    assert match.layout["logits"] == "b h s d"


class _Backward(torch.autograd.Function):
    """Attention on merged heads with a backward of its own."""

    @staticmethod
    def forward(ctx, q, k, v):
        p = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.3 + ADDED, -1)
        ctx.save_for_backward(q, k, v, p)
        return torch.bmm(p, v)

    @staticmethod
    def backward(ctx, given):
        q, k, v, p = ctx.saved_tensors
        dp = torch.bmm(given, v.transpose(1, 2))
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * 0.3
        return torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), given)


def test_inside_an_autograd_function_laws_are_seen_from_outside_and_no_row_is_made_up(one_thread) -> None:
    model = Attention(lambda q, k, v: _Backward.apply(_merged(q), _merged(k), _merged(v)))
    with Watch(every=1, inner="aot_eager", strict=True, detectors=[]) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        compiled(torch.randn(B, S, HIDDEN)).square().sum().backward()
        optimizer.step()
        watch.flush()
        (status,) = watch.coverage
        assert (status.site.heads, status.site.scale, status.site.masked) == (H, 0.3, True)
        assert all((watch.series(f"law/{law}")[1] < 1e-5).all() for law in ("key_shift", "value_mass", "euler"))
        assert "attention/entropy" not in watch.metrics()


def test_a_learned_bias_hides_nothing(capture) -> None:
    class Biased(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(H, S, S))

        def forward(self, x):
            q, k, v = self.parts(x)
            return (q @ k.mT + self.bias).softmax(-1) @ v

    match = capture(Biased(), torch.randn(B, S, HIDDEN)).match
    assert (match.facts["causal"], match.facts["masked"]) == (False, False)
    assert set(match.laws.values()) == {""}


def test_a_learned_last_key_does_not_hide_the_projection(capture) -> None:
    class LastKey(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Parameter(torch.randn(2, 1, H, 1, D))

        def forward(self, x):
            q, k, v = self.parts(x)
            k, v = (torch.cat([y, more.expand(B, -1, -1, -1)], 2) for y, more in zip((k, v), self.last, strict=True))
            return (q @ k.mT).softmax(-1) @ v

    match = capture(LastKey(), torch.randn(B, S, HIDDEN)).match
    assert match.weights["k_weight"].names == ("k.weight",)


def test_a_gate_by_the_mass_of_each_row_reads_the_logits_too(capture) -> None:
    def call(q, k, v):
        a = q @ k.mT
        return (a.softmax(-1) @ v) * (a.logsumexp(-1, keepdim=True) - 1.0).sigmoid()

    laws = capture(Attention(call), torch.randn(B, S, HIDDEN)).match.laws
    assert "read elsewhere" in laws["law/key_shift"]
    assert "read elsewhere" in laws["law/bias"]


@pytest.mark.parametrize("measure", [lambda a: a.max(-1, keepdim=True)[0], lambda a: a.logsumexp(-1, keepdim=True)])
def test_what_is_taken_off_a_row_is_no_reader(capture, measure) -> None:
    def call(q, k, v):
        e = (a := q @ k.mT).sub(measure(a)).exp()
        return (e / e.sum(-1, keepdim=True)) @ v

    assert set(capture(Attention(call), torch.randn(B, S, HIDDEN)).match.laws.values()) == {""}


def test_a_loan_of_dtype_is_no_reader(capture) -> None:
    def call(q, k, v):
        a = q @ k.mT
        return a.float().softmax(-1).type_as(a) @ v

    assert set(capture(Attention(call), torch.randn(B, S, HIDDEN)).match.laws.values()) == {""}


def test_probabilities_in_a_loss_leave_the_bias_law_out(capture) -> None:
    def call(q, k, v):
        p = (q @ k.mT).softmax(-1)
        return (p @ v).sum() + p.square().sum()

    laws = capture(Attention(call), torch.randn(B, S, HIDDEN)).match.laws
    assert "read elsewhere" in laws["law/bias"]
    assert laws["law/key_shift"] == laws["law/value_mass"] == laws["law/euler"] == ""
