"""Weights behind heads: ``x @ factor`` against the head, in every spelling, through bodies and along low-rank chains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from foreshock.patterns.provenance import Origin, Untraced, trace_heads, weight_view
from foreshock.records import WeightView, met

B, S, H, D, HIDDEN, RANK = 2, 5, 4, 6, 24, 9


def heads(y: Tensor) -> Tensor:
    return y.view(B, S, -1, D).transpose(1, 2)


class Projected(nn.Module):
    """``function(module, x)`` with parameters of the shapes given, and what else ``parts`` are."""

    def __init__(self, function, parts) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                setattr(self, name, part)
            else:
                setattr(self, name, nn.Parameter(torch.randn(part) / 5))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def _x() -> Tensor:
    return torch.randn(B, S, HIDDEN)


def traced(capture, module: nn.Module, axis: int = 1) -> tuple[WeightView, Tensor, Tensor]:
    """The view behind the module's output, its input and that output."""
    x = _x()
    captured = capture(module, x)
    origin = trace_heads(captured.view, captured.output, axis)
    assert isinstance(origin, Origin), origin
    view = weight_view(captured.view, origin)
    assert view is not None
    captured.module.held = module  # views hold parameters weakly
    return view, x, captured.result.detach()


def linear(rows: int, columns: int = HIDDEN) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False)


SPELLINGS = {
    "linear": (lambda m, x: heads(functional.linear(x, m.w)), {"w": (H * D, HIDDEN)}),
    "x @ W": (lambda m, x: heads(x @ m.w), {"w": (HIDDEN, H * D)}),
    "x @ W.T": (lambda m, x: heads(x @ m.w.T), {"w": (H * D, HIDDEN)}),
    "x @ W.mT": (lambda m, x: heads(torch.matmul(x, m.w.mT)), {"w": (H * D, HIDDEN)}),
    "W @ x": (lambda m, x: (m.w @ x.mT).view(B, H, D, S).transpose(2, 3), {"w": (H * D, HIDDEN)}),
    "addmm": (lambda m, x: heads(torch.addmm(torch.zeros(1), x.view(-1, HIDDEN), m.w)), {"w": (HIDDEN, H * D)}),
    "bmm": (
        lambda m, x: torch.bmm(x.view(1, B * S, HIDDEN).expand(H, -1, -1), m.w).view(H, B, S, D).transpose(0, 1),
        {"w": (H, HIDDEN, D)},
    ),
    "baddbmm": (
        lambda m, x: torch.baddbmm(
            torch.zeros(1, 1, D),
            x[:, None].expand(B, H, S, HIDDEN).reshape(B * H, S, HIDDEN),
            m.w[None].expand(B, H, HIDDEN, D).reshape(B * H, HIDDEN, D),
        ).view(B, H, S, D),
        {"w": (H, HIDDEN, D)},
    ),
    "einsum": (lambda m, x: heads(torch.einsum("bsd,dk->bsk", x, m.w)), {"w": (HIDDEN, H * D)}),
    "einsum, dots": (lambda m, x: heads(torch.einsum("...d,kd->...k", x, m.w)), {"w": (H * D, HIDDEN)}),
    "einsum, heads": (lambda m, x: torch.einsum("bsd,dhk->bhsk", x, m.w), {"w": (HIDDEN, H, D)}),
    "einsum, heads first": (lambda m, x: torch.einsum("hkd,bsd->bhsk", m.w, x), {"w": (H, D, HIDDEN)}),
    "broadcast over heads": (lambda m, x: x[:, None] @ m.w, {"w": (H, HIDDEN, D)}),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=1).transpose(1, 2), {"w": (HIDDEN, H, D)}),
    "tensordot along axes": (lambda m, x: torch.tensordot(x, m.w, dims=([2], [1])).transpose(1, 2), {"w": (H, HIDDEN, D)}),
    "convolution": (lambda m, x: functional.conv1d(x.mT, m.w).view(B, H, D, S).mT, {"w": (H * D, HIDDEN, 1)}),
    "convolution in 2-D": (
        lambda m, x: functional.conv2d(x.mT[..., None], m.w).view(B, H, D, S).mT,
        {"w": (H * D, HIDDEN, 1, 1)},
    ),
    "weight viewed": (lambda m, x: torch.einsum("bse,hde->bhsd", x, m.w.view(H, D, HIDDEN)), {"w": (H * D, HIDDEN)}),
    "weight sliced": (lambda m, x: heads(functional.linear(x, m.w[5 : 5 + H * D])), {"w": (2 * H * D, HIDDEN)}),
    "weight chunked": (lambda m, x: heads(functional.linear(x, m.w.chunk(3)[1])), {"w": (3 * H * D, HIDDEN)}),
    "weight indexed": (lambda m, x: heads(functional.linear(x, m.w[1])), {"w": (3, H * D, HIDDEN)}),
    "inputs sliced": (lambda m, x: heads(functional.linear(x, m.w[:, 3 : 3 + HIDDEN])), {"w": (H * D, 2 * HIDDEN)}),
    "inputs flipped": (lambda m, x: heads(functional.linear(x, m.w.flip(1))), {"w": (H * D, HIDDEN)}),
    "weights joined": (
        lambda m, x: heads(functional.linear(x, torch.cat([m.k, m.w, m.k])).chunk(3, -1)[1]),
        {"w": (H * D, HIDDEN), "k": (H * D, HIDDEN)},
    ),
    "weights stacked": (
        lambda m, x: heads(functional.linear(x, torch.stack([m.k, m.w])[1])),
        {"w": (H * D, HIDDEN), "k": (H * D, HIDDEN)},
    ),
    "weight scaled": (lambda m, x: heads(functional.linear(x, 0.5 * m.w / 3)), {"w": (H * D, HIDDEN)}),
    "weight cast": (lambda m, x: heads(functional.linear(x.double(), m.w.double())).float(), {"w": (H * D, HIDDEN)}),
    "weight with a gain": (
        lambda m, x: heads(functional.linear(x, m.w * (1 + m.g)[:, None])),
        {"w": (H * D, HIDDEN), "g": (H * D,)},
    ),
    "weight norm": (lambda m, x: heads(m.w(x)), {"w": parametrizations.weight_norm(linear(H * D))}),
    "gain a head": (lambda m, x: heads(functional.linear(x, m.w)) * m.g, {"w": (H * D, HIDDEN), "g": (H, 1, D)}),
    "two gains": (lambda m, x: heads(functional.linear(x, m.w) * m.g) * m.h, {"w": (H * D, HIDDEN), "g": (H * D,), "h": (D,)}),
    "packed": (lambda m, x: heads(functional._in_projection_packed(x, x, x, m.w)[1]), {"w": (3 * H * D, HIDDEN)}),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_factor_is_the_projection_of_its_head(capture, spelling: str) -> None:
    torch.manual_seed(0)
    function, parts = SPELLINGS[spelling]
    module = Projected(function, parts)
    if spelling == "weight norm":
        nn.init.normal_(module.w.parametrizations.weight.original0)
    view, x, result = traced(capture, module)
    assert view.names[0] in ("w", "w.parametrizations.weight.original1")
    assert view.notes == ()
    assert view.heads == H
    torch.testing.assert_close(x[:, None] @ view.factors()[None], result, rtol=1e-5, atol=1e-5)


def test_a_convolution_over_positions_has_its_taps_among_the_inputs(capture) -> None:
    module = Projected(
        lambda m, x: functional.conv1d(x.mT, m.w, padding=1).view(B, H, D, S).mT, {"w": (H * D, HIDDEN, 3)}
    )
    view, x, result = traced(capture, module)
    padded = functional.pad(x, (0, 0, 1, 1))
    taps = torch.stack([padded[:, i : i + S] for i in range(3)], -1).flatten(2)
    torch.testing.assert_close(taps[:, None] @ view.factors()[None], result, rtol=1e-5, atol=1e-5)


def test_a_depthwise_convolution_is_passed_through(capture) -> None:
    smooth = nn.Conv1d(H * D, H * D, 3, padding=2, groups=H * D)
    module = Projected(lambda m, x: heads(m.c(m.w(x).mT)[..., :S].mT), {"w": linear(H * D), "c": smooth})
    view, *_ = traced(capture, module)
    assert view.names == ("w.weight",)
    np.testing.assert_array_equal(view.index, np.arange(H * D).reshape(H, D))


def test_one_projection_for_all_heads_has_heads_that_differ_by_their_input(capture) -> None:
    module = Projected(lambda m, x: m.w(x.view(B, S, H, D)).transpose(1, 2), {"w": linear(D, D)})
    view, x, result = traced(capture, module)
    assert view.heads == H
    torch.testing.assert_close(x.view(B, S, H, D).transpose(1, 2) @ view.factors(), result, rtol=1e-5, atol=1e-5)


LORA = {"w": linear(H * D), "a": linear(RANK), "b": linear(H * D, RANK)}


@pytest.mark.parametrize("add", [lambda w, ba: w + 2 * ba, lambda w, ba: 2 * ba + w])
def test_an_adapter_beside_a_projection_is_told_and_left_out(capture, add) -> None:
    view, *_ = traced(capture, Projected(lambda m, x: heads(add(m.w(x), m.b(m.a(x)))), LORA))
    assert view.names == ("w.weight",)
    (note,) = view.notes
    assert "second projection" in note


@pytest.mark.parametrize(
    ("weight", "parts"),
    [
        (lambda m: m.w + m.b @ m.a, {"a": (RANK, HIDDEN), "b": (H * D, RANK)}),
        (lambda m: m.w * (m.w > 0), {}),
        (lambda m: m.w * m.g, {"g": (HIDDEN,)}),
        (lambda m: m.w / m.w.norm(), {}),
    ],
)
def test_what_else_makes_a_weight_is_told(capture, weight, parts) -> None:
    module = Projected(lambda m, x: heads(functional.linear(x, weight(m))), {"w": (H * D, HIDDEN), **parts})
    view, *_ = traced(capture, module)
    assert view.names == ("w",)
    (note,) = view.notes
    assert "without it" in note


@pytest.mark.parametrize(
    ("function", "parts", "reason"),
    [
        (lambda m, x: heads(x), {}, "a graph input"),
        (lambda m, x: heads(x + m.w(torch.tanh(x))), {"w": linear(HIDDEN)}, "residual stream"),
        (lambda m, x: heads(m.w(torch.tanh(x)) + x), {"w": linear(HIDDEN)}, "residual stream"),
        (lambda m, x: heads(x @ (x.mT @ x)), {}, "no operand of `matmul` is a parameter"),
        (
            lambda m, x: heads(functional.linear(x, m.b @ m.a)),
            {"a": (3, HIDDEN), "b": (HIDDEN, 3)},
            "product of parameters",
        ),
        (
            lambda m, x: torch.stack([w(x) for w in m.w], 1),
            {"w": nn.ModuleList([linear(D)] * 2 + [linear(D)])},
            "different",
        ),
        (lambda m, x: heads(m.w(x.mT).mT), {"w": nn.Conv1d(HIDDEN, HIDDEN, 1, groups=2)}, "grouped convolution"),
        (lambda m, x: heads(m.w.expand(B, S, HIDDEN)), {"w": (S, HIDDEN)}, "without a projection"),
        (lambda m, x: heads(m.w(x).cumsum(1)), {"w": linear(HIDDEN)}, "`cumsum` is no copy"),
        (lambda m, x: heads(m.n(x)), {"n": nn.BatchNorm1d(S, affine=False)}, "a graph input"),
    ],
)
def test_false_trails_end_with_a_reason(capture, function, parts, reason: str) -> None:
    captured = capture(Projected(function, parts), _x())
    origin = trace_heads(captured.view, captured.output, 1)
    assert isinstance(origin, Untraced)
    assert reason in origin.reason


def _rotated_by_a_buffer(m, x):
    angles = torch.einsum("s,d->sd", torch.arange(S).type_as(x), m.inv_freq)
    angles = torch.cat([angles, angles], -1)
    q = heads(m.w(x))
    half = torch.cat([-q[..., D // 2 :], q[..., : D // 2]], -1)
    return (q * angles.cos() + half * angles.sin()).type_as(m.v(x)) + m.bias[:S, None, :1].permute(1, 0, 2)


def test_buffers_positions_and_biases_are_no_trail(capture) -> None:
    module = Projected(_rotated_by_a_buffer, {"w": linear(H * D), "v": linear(H * D), "bias": (7, 3)})
    module.register_buffer("inv_freq", torch.rand(D // 2))
    view, *_ = traced(capture, module)
    assert (view.names, view.notes) == (("w.weight",), ())


# -- bodies --------------------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T, x * 2

    @staticmethod
    def backward(ctx, gradient, other):
        x, w = ctx.saved_tensors
        return gradient @ w + 2 * other, gradient.flatten(0, -2).T @ x.flatten(0, -2)


@torch.compiler.nested_compile_region
def _region(x: Tensor, w: Tensor) -> Tensor:
    return heads(functional.linear(x, w))


BODIES = {
    "out of a body": lambda m, x: heads(checkpoint(m.w, x, use_reentrant=False)),
    "the heads too": lambda m, x: checkpoint(lambda y: heads(m.w(y)) * 1.0, x, use_reentrant=False),
    "into a body": lambda m, x: checkpoint(lambda y: heads(y) * 1.0, m.w(x), use_reentrant=False),
    "in and out": lambda m, x: checkpoint(
        lambda y: checkpoint(heads, y, use_reentrant=False), m.w(x), use_reentrant=False
    ),
    "an autograd.Function": lambda m, x: heads(_Product.apply(x, m.w.weight)[0]),
    "a region called twice": lambda m, x: (_region(x, m.v.weight), _region(x, m.w.weight))[1],
}


@pytest.mark.parametrize("body", BODIES)
def test_bodies_are_gone_through(capture, body: str) -> None:
    module = Projected(BODIES[body], {"w": linear(H * D), "v": linear(H * D)})
    view, x, result = traced(capture, module)
    assert view.names == ("w.weight",)
    torch.testing.assert_close(x[:, None] @ view.factors()[None], result, rtol=1e-5, atol=1e-5)


# -- chains --------------------------------------------------------------------------------------------------------------


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


LATENT = {"a": linear(RANK), "b": linear(H * D, RANK), "g": (RANK,)}


def _chain(m, x):
    return heads(m.b(rms(m.a(x), m.g)))


CHAINS = {
    "norm by hand": _chain,
    "norm as one op": lambda m, x: heads(m.b(functional.rms_norm(m.a(x), (RANK,), m.g))),
    "layer norm": lambda m, x: heads(m.b(functional.layer_norm(m.a(x), (RANK,), m.g))),
    "gain alone": lambda m, x: heads(m.b(m.a(x) * m.g)),
    "through a cast and a view": lambda m, x: heads(
        m.b((m.a(x).double() * m.g).view(B * S, RANK).float().view(B, S, RANK))
    ),
    "a use that loses the gradient": lambda m, x: _chain(m, x) + m.a(x).detach().sum() * 0,
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_latent_makes_a_chain(capture, chain: str) -> None:
    module = Projected(CHAINS[chain], LATENT)
    view, *_ = traced(capture, module)
    assert view.names == ("b.weight", "a.weight", "g")
    outer, inner = module.b.weight.detach().view(H, D, RANK), module.a.weight.detach() * module.g.detach()[:, None]
    torch.testing.assert_close(view.factors(), (outer @ inner).mT)
    assert view.resolve() is module.b.weight


def test_a_chain_of_three_and_a_stage_for_each_head(capture) -> None:
    def function(m, x):
        latents = m.b(m.a(x)).view(B, S, H, D)
        return torch.einsum("bshd,hde->bhse", latents, m.c)

    module = Projected(function, {**LATENT, "c": (H, D, 7)})
    view, x, result = traced(capture, module)
    assert view.names == ("c", "b.weight", "a.weight")
    torch.testing.assert_close(x[:, None] @ view.factors()[None], result, rtol=1e-4, atol=1e-5)


def _stream(m, x):
    y = m.a(x)
    return heads(m.b(rms(y, m.g))), y + torch.tanh(y)


def _returned(m, x):
    y = m.a(x)
    return heads(m.b(rms(y, m.g))), y


def _parallel(m, x):
    y = rms(m.a(x), m.g)
    return heads(m.b(y)), m.b2(y)


def _read_twice(m, x):
    y = m.a(x)
    return heads(m.b(y)) + y[..., 2:3].mean()


NO_CHAINS = {
    "a patch embedding and its residual stream": _stream,
    "a stream that leaves the graph": _returned,
    "two projections of one input": _parallel,
    "a nonlinear function between": lambda m, x: heads(m.b(torch.relu(m.a(x)))),
    "a gate between": lambda m, x: heads(m.b(m.a(x) * m.c(x))),
    "a sum between": lambda m, x: heads(m.b(m.a(x) + m.c(x))),
    "another reader of the same channels": _read_twice,
}  # fmt: skip


@pytest.mark.parametrize("case", NO_CHAINS)
def test_a_stream_is_no_latent(capture, case: str) -> None:
    def function(m, x):
        found = NO_CHAINS[case](m, x)
        return found if isinstance(found, tuple) else (found,)

    module = Projected(function, {**LATENT, "b2": linear(3, RANK), "c": linear(RANK)})
    captured = capture(module, _x())
    origin = trace_heads(captured.view, captured.output, 1)
    assert origin, origin
    assert [captured.view.names[node] for node in origin.sources] == ["b.weight"]


class Latent(nn.Module):
    """Multi-head latent attention: the key's content half from a latent that is cached, its rotary half shared by all heads."""

    def __init__(self, rope: int = 4, fill: bool = False) -> None:
        super().__init__()
        self.qa, self.qb, self.qg = linear(RANK), linear(H * (D + rope), RANK), nn.Parameter(torch.rand(RANK) + 0.5)
        self.ka, self.kb, self.kg = linear(RANK + rope), linear(H * 2 * D, RANK), nn.Parameter(torch.rand(RANK) + 0.5)
        self.rope, self.fill = rope, fill

    def forward(self, x):
        q = self.qb(rms(self.qa(x), self.qg)).view(B, S, H, D + self.rope).transpose(1, 2)
        content, turned = self.ka(x).split([RANK, self.rope], -1)
        content = rms(content, self.kg)
        nope, v = self.kb(content).view(B, S, H, 2 * D).transpose(1, 2).split([D, D], -1)
        angle = torch.arange(S * self.rope).view(S, self.rope).cos()
        turned = (turned * angle).view(B, 1, S, self.rope).expand(-1, H, -1, -1)
        if self.fill:
            k = x.new_empty(B, H, S, D + self.rope)
            k[..., :D] = nope
            k[..., D:] = turned
        else:
            k = torch.cat([nope, turned], -1)
        return functional.scaled_dot_product_attention(q, k, v), content


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("rope", [4, D])
def test_latent_attention(capture, fill: bool, rope: int) -> None:
    module = Latent(rope, fill)
    match = capture(module, _x()).match
    found = match.weights
    assert found["q_weight"].names == ("qb.weight", "qa.weight", "qg")
    assert found["k_weight"].names == ("kb.weight", "ka.weight", "kg")
    assert found["k_weight"].channels == tuple(range(D))
    inner = module.ka.weight.detach()[:RANK] * module.kg.detach()[:, None]
    outer = module.kb.weight.detach().view(H, 2, D, RANK)[:, 0]
    torch.testing.assert_close(found["k_weight"].factors(), (outer @ inner).mT)
    cut = met(found)
    assert cut["q_weight"].factors().shape == cut["k_weight"].factors().shape == (H, HIDDEN, D)
    torch.testing.assert_close(cut["q_weight"].factors(), found["q_weight"].factors()[..., :D])
    assert cut["q_weight"].read_by(H) == tuple(range(H))
