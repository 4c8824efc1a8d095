"""Coordinates pulled back through a graph, against the real ops applied to a tensor of indices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from foreshock.patterns.provenance import Untraced, head_axis, trace_features, trace_heads
from foreshock.patterns.pullback import Pull


class _Of(nn.Module):
    """``function`` of a parameter."""

    def __init__(self, function, *sizes: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.arange(math.prod(sizes), dtype=torch.float32).reshape(sizes))
        self.function = function

    def forward(self):
        return self.function(self.p)


def _grid(sizes) -> tuple[np.ndarray, ...]:
    """Every element, in row-major order."""
    return tuple(axis.reshape(-1) for axis in np.indices(sizes))


def _brute(capture, function, *sizes: int) -> None:
    captured = capture(_Of(function, *sizes))
    expected = captured.result.detach()
    expected = (torch.view_as_real(expected) if expected.is_complex() else expected).abs()
    trail = Pull(captured.view)(captured.output, _grid(tuple(expected.shape)))
    assert trail is not None
    assert trail.node in captured.view.parameters
    numbers = expected.reshape(-1).long().numpy()
    columns = [np.broadcast_to(column, numbers.shape) for column in trail.coordinates]
    np.testing.assert_array_equal(np.ravel_multi_index(columns, sizes), numbers)


RULES = {
    "view": (lambda p: p.view(6, 4), 2, 3, 4),
    "reshape": (lambda p: p.reshape(4, -1), 2, 3, 4),
    "reshape of a transpose": (lambda p: p.transpose(0, 2).reshape(4, 6), 2, 3, 4),
    "flatten": (lambda p: p.flatten(1), 2, 3, 4),
    "unflatten": (lambda p: p.unflatten(-1, (2, 2)), 2, 3, 4),
    "unsqueeze": (lambda p: p.unsqueeze(1), 3, 4),
    "squeeze": (lambda p: p.squeeze(), 3, 1, 4),
    "squeeze of an axis": (lambda p: p.squeeze(0), 1, 1, 4),
    "transpose": (lambda p: p.transpose(1, 2), 2, 3, 4),
    "transpose from the end": (lambda p: torch.transpose(p, -1, 0), 2, 3, 4),
    "transpose by name": (lambda p: p.transpose(dim0=0, dim1=1), 2, 3, 4),
    "swapaxes": (lambda p: p.swapaxes(0, 2), 2, 3, 4),
    "permute": (lambda p: p.permute(2, 0, 1), 2, 3, 4),
    "permute of a tuple": (lambda p: p.permute((1, 2, 0)), 2, 3, 4),
    "permute function": (lambda p: torch.permute(p, (-1, 0, 1)), 2, 3, 4),
    "T": (lambda p: p.T.clone(), 3, 4),
    "t": (lambda p: p.t(), 3, 4),
    "mT": (lambda p: p.mT.clone(), 2, 3, 4),
    "expand": (lambda p: p.expand(3, -1, 4), 1, 2, 4),
    "expand with a new axis": (lambda p: p.expand(5, 2, 4), 2, 4),
    "expand_as": (lambda p: p.expand_as(torch.zeros(3, 2, 4)), 2, 1),
    "broadcast_to": (lambda p: torch.broadcast_to(p, (3, 2, 4)), 2, 4),
    "repeat_interleave": (lambda p: p.repeat_interleave(3, dim=1), 2, 3, 4),
    "repeat_interleave function": (lambda p: torch.repeat_interleave(p, 2, -1), 2, 3),
    "repeat": (lambda p: p.repeat(2, 1, 3), 2, 3),
    "select": (lambda p: p.select(1, -1), 2, 3, 4),
    "narrow": (lambda p: p.narrow(-1, 1, 2), 2, 3, 4),
    "integer": (lambda p: p[1], 2, 3, 4),
    "negative integer": (lambda p: p[:, -1], 2, 3, 4),
    "slice": (lambda p: p[:, 1:3], 2, 3, 4),
    "strided slice": (lambda p: p[..., 1::2], 2, 3, 6),
    "negative slice": (lambda p: p[..., -3:-1], 2, 3, 6),
    "new axis": (lambda p: p[:, None, :, None], 2, 3),
    "ellipsis in the middle": (lambda p: p[0, ..., 1], 2, 3, 4, 5),
    "everything at once": (lambda p: p[1, None, ..., ::2, -1], 2, 3, 4, 5),
    "cat": (lambda p: torch.cat([p[:, 1:], p[:, :1]], 1), 2, 3, 4),
    "cat from the end": (lambda p: torch.cat((p[..., 2:], p, p[..., :2]), dim=-1), 2, 4),
    "cat by name": (lambda p: torch.cat(tensors=[p, p], dim=0), 2, 4),
    "stack": (lambda p: torch.stack([p[0], p[1], p[0]], 1), 2, 3, 4),
    "stack at the end": (lambda p: torch.stack([p, p], dim=-1), 2, 3),
    "split": (lambda p: p.split(2, dim=1)[1], 2, 6),
    "split with a rest": (lambda p: p.split(4, -1)[-1], 2, 6),
    "split into sizes": (lambda p: torch.split(p, [1, 3, 2], dim=-1)[1], 2, 6),
    "split into sizes, from the end": (lambda p: p.split([1, 3, 2], -1)[-1], 2, 6),
    "split by name": (lambda p: torch.split(p, split_size_or_sections=3, dim=1)[1], 2, 6),
    "chunk": (lambda p: p.chunk(3, -1)[2], 2, 6),
    "chunk with a rest": (lambda p: torch.chunk(p, 3, dim=1)[1], 2, 7),
    "chunk from the end": (lambda p: p.chunk(3, 1)[-1], 2, 7),
    "fewer chunks than asked": (lambda p: p.chunk(4, 1)[-1], 2, 6),
    "tensor_split": (lambda p: p.tensor_split(3, dim=1)[1], 2, 6),
    "tensor_split with a rest": (lambda p: p.tensor_split(3, dim=1)[2], 2, 7),
    "tensor_split at places": (lambda p: torch.tensor_split(p, (1, 4), dim=1)[2], 2, 6),
    "tensor_split from the end": (lambda p: p.tensor_split((1, -1), dim=-1)[-1], 2, 6),
    "tensor_split by name": (lambda p: p.tensor_split(sections=2, dim=1)[-1], 2, 7),
    "unbind": (lambda p: p.unbind(1)[2], 2, 3, 4),
    "unbind from the end": (lambda p: torch.unbind(p, dim=-1)[-1], 2, 3, 4),
    "flip": (lambda p: torch.flip(p, (0, -1)), 2, 3, 4),
    "roll": (lambda p: p.roll((1, -1), (0, 2)), 2, 3, 4),
    "movedim": (lambda p: p.movedim((0, -1), (1, 0)), 2, 3, 4),
    "moveaxis": (lambda p: torch.moveaxis(p, 0, -1), 2, 3, 4),
    "unfold": (lambda p: p.unfold(1, 3, 2), 2, 7),
    "pad along rows": (lambda p: functional.pad(p, (0, 0, 0, 2))[:3], 3, 4),
    "pad, cut again": (lambda p: functional.pad(p, (2, 1))[..., 2:-1], 3, 4),
    "list of positions": (lambda p: p[:, [2, 0]], 2, 3, 4),
    "diagonal": (lambda p: p.diagonal(), 3, 4),
    "as_strided": (lambda p: p.as_strided((2, 3), (4, 2), 1), 3, 4),
    "view as another shape of complex": (lambda p: torch.view_as_real(torch.view_as_complex(p).T).clone(), 3, 2, 2),
    "copies": (lambda p: p.contiguous().clone().double().to(torch.float32), 3, 4),
    "sign": (lambda p: -p, 3, 4),
    "scaled by a number": (lambda p: (p * 2.0) / 2.0, 3, 4),
    "moved by a number": (lambda p: (1.0 + p) - 1.0, 3, 4),
    "in place": (lambda p: p.clone().mul_(1.0), 3, 4),
    "masked": (lambda p: p.masked_fill(torch.zeros(4, dtype=torch.bool), 0.0), 3, 4),
    "broadcast sum": (lambda p: p.unsqueeze(0) + torch.zeros(5, 1, 1), 3, 4),
    "where": (lambda p: torch.where(torch.ones(4, dtype=torch.bool), p, 0.0), 3, 4),
    "complex": (lambda p: torch.view_as_complex(p.reshape(2, 3, 2, 2)), 2, 3, 4),
    "there and back": (lambda p: torch.view_as_real(torch.view_as_complex(p.reshape(3, 2, 2))).flatten(1), 3, 4),
    "complex transpose": (lambda p: torch.view_as_complex(p.reshape(2, 3, 2, 2)).transpose(0, 1), 2, 3, 4),
    "complex transpose from the end": (
        lambda p: torch.view_as_complex(p.reshape(2, 3, 2, 2)).transpose(-2, -1), 2, 3, 4,
    ),
    "complex mT": (lambda p: torch.view_as_complex(p.reshape(2, 3, 2, 2)).mT.clone(), 2, 3, 4),
    "complex permute": (lambda p: torch.view_as_complex(p.reshape(2, 3, 2, 2)).permute(-1, 0, 1), 2, 3, 4),
    "complex cat": (lambda p: torch.cat([torch.view_as_complex(p.reshape(3, 2, 2))] * 2, -1), 3, 4),
    "complex select": (lambda p: torch.view_as_complex(p.reshape(2, 3, 2, 2)).select(-1, 1), 2, 3, 4),
    "complex piece": (lambda p: torch.view_as_complex(p.reshape(2, 3, 2, 2)).chunk(2, -1)[1], 2, 3, 4),
    "complex unsqueeze": (lambda p: torch.view_as_complex(p.reshape(2, 3, 2, 2)).unsqueeze(1), 2, 3, 4),
    "complex slice": (lambda p: torch.view_as_complex(p.reshape(2, 3, 2, 2))[..., 1:], 2, 3, 4),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_agrees_with_the_op(capture, rule: str) -> None:
    function, *sizes = RULES[rule]
    _brute(capture, function, *sizes)


@pytest.mark.parametrize(
    "function",
    [
        lambda p: p.cumsum(0),
        lambda p: p.sum(0, keepdim=True) * torch.ones(3, 1),
        lambda p: p[torch.tensor([2, 0])],
        lambda p: p.sort(-1)[0],
        lambda p: p.cos(),
        lambda p: p.tril(),
        lambda p: p.clone().cumsum_(0),
        lambda p: p.index_select(0, torch.tensor([2, 0])),
    ],
)
def test_what_is_no_copy_ends_the_trail_and_says_so(capture, function) -> None:
    captured = capture(_Of(function, 3, 4))
    pull = Pull(captured.view)
    assert pull(captured.output, _grid(tuple(captured.result.shape))) is None
    assert pull.stops


def test_parts_of_different_parameters_are_no_trail(capture) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.ones(2, 3))

        def forward(self):
            return torch.cat([self.a, self.b], 1)

    captured = capture(Two())
    pull = Pull(captured.view)
    assert pull(captured.output, _grid((2, 6))) is None
    assert "different projections" in pull.stops[-1]
    assert Pull(captured.view)(captured.output, _grid((2, 3))).node.name.endswith("a_")


# -- whole projections ---------------------------------------------------------------------------------------------------

B, S, H, G, D, HIDDEN = 2, 5, 4, 2, 6, 24


class _Project(nn.Module):
    """``function(projected)`` with one projection to ``width`` channels, ``[B, S, width]``."""

    def __init__(self, function, width: int) -> None:
        super().__init__()
        self.w = nn.Linear(HIDDEN, width, bias=True)
        self.function = function

    def forward(self, x):
        return self.function(self.w(x))


def _traced(capture, function, width: int, axis: int = 1):
    captured = capture(_Project(function, width), torch.randn(B, S, HIDDEN))
    assert head_axis(captured.view, captured.output) == axis
    origin = trace_heads(captured.view, captured.output, axis)
    assert origin, origin
    return origin


def _channels(function, width: int, axis: int = 1) -> np.ndarray:
    """The same function on channel numbers: which channel each head and position of the head dimension is."""
    numbers = torch.arange(1, width + 1, dtype=torch.float32).expand(B, S, width)
    found = function(numbers).abs().round().long() - 1
    return (found[0, :, -1] if axis == 1 else found[0, -1]).numpy()


WIDTH = 3 * H * D
FUSED = {
    "chunk": lambda y, i: y.chunk(3, -1)[i].view(B, S, H, D).transpose(1, 2),
    "split": lambda y, i: y.split(H * D, dim=2)[i].view(B, S, H, D).transpose(1, 2),
    "sizes": lambda y, i: y.split([H * D] * 3, dim=-1)[i].view(B, S, H, D).transpose(1, 2),
    "slices": lambda y, i: y[..., i * H * D : (i + 1) * H * D].reshape(B, S, H, D).permute(0, 2, 1, 3),
    "unbind": lambda y, i: y.reshape(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)[i],
    "index": lambda y, i: y.reshape(B, S, 3, H, D).permute(2, 0, 3, 1, 4)[i],
    "interleaved heads": lambda y, i: y.view(B, S, H, 3 * D).transpose(1, 2).chunk(3, -1)[i],
    "interleaved, unbound": lambda y, i: y.view(B, S, H, 3, D).transpose(1, 2).unbind(3)[i],
    "interleaved channels": lambda y, i: y.view(B, S, H, D, 3)[..., i].transpose(1, 2),
}


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("layout", FUSED)
def test_fused_projections(capture, layout: str, part: int) -> None:
    def function(y):
        return FUSED[layout](y, part)

    origin = _traced(capture, function, WIDTH)
    np.testing.assert_array_equal(origin.index, _channels(function, WIDTH))
    assert origin.head_map == tuple(range(H))
    assert origin.axes == (0,)


def test_heads_behind_positions(capture) -> None:
    def function(y):
        return y.view(B, S, H, D)

    origin = _traced(capture, function, H * D, axis=2)
    np.testing.assert_array_equal(origin.index, np.arange(H * D).reshape(H, D))


def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _heads(y):
    return y.view(B, S, -1, D).transpose(1, 2)


def _angles(width: int):
    angle = torch.outer(torch.arange(S).float(), 1.0 / 100 ** (torch.arange(0, width, 2) / width))
    return torch.cat([angle, angle], -1)


def _rope(y):
    x, angle = _heads(y), _angles(D)
    return x * angle.cos() + _rotate_half(x) * angle.sin()


def _partial_rope(y):
    x, angle = _heads(y), _angles(4)
    turned, kept = x[..., :4], x[..., 4:]
    turned = turned * angle.cos() + _rotate_half(turned) * angle.sin()
    return torch.cat([turned, kept], dim=-1)


def _partial_rope_last(y):
    x, angle = _heads(y), _angles(4)
    kept, turned = x.split([D - 4, 4], dim=-1)
    return torch.cat((kept, (turned * angle.cos()) + (_rotate_half(turned) * angle.sin())), dim=-1)


def _complex_rope(y):
    x = y.view(B, S, -1, D)
    turn = torch.polar(torch.ones(S, D // 2), torch.outer(torch.arange(S).float(), torch.arange(D // 2).float()))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn.view(1, S, 1, D // 2)).flatten(3).type_as(x).transpose(1, 2)


@pytest.mark.parametrize("rotary", [_rope, _partial_rope, _partial_rope_last, _complex_rope])
def test_rotary_embeddings_keep_channels_in_place(capture, rotary) -> None:
    origin = _traced(capture, rotary, H * D)
    np.testing.assert_array_equal(origin.index, np.arange(H * D).reshape(H, D))


def _cached(y):
    return torch.cat([torch.zeros(B, G, 7, D), _heads(y)], dim=2)


def test_a_key_cache_before_the_new_keys(capture) -> None:
    captured = capture(_Project(_cached, G * D), torch.randn(B, S, HIDDEN))
    origin = trace_heads(captured.view, captured.output, 1)
    np.testing.assert_array_equal(origin.index, np.arange(G * D).reshape(G, D))


def _expanded(y):
    return _heads(y)[:, :, None].expand(B, G, H // G, S, D).reshape(B, H, S, D)


def _interleaved(y):
    return _heads(y).repeat_interleave(H // G, dim=1)


def _function_interleaved(y):
    return torch.repeat_interleave(_heads(y), dim=1, repeats=H // G)


@pytest.mark.parametrize("repeat", [_expanded, _interleaved, _function_interleaved])
def test_repeated_key_heads_are_counted_once(capture, repeat) -> None:
    origin = _traced(capture, repeat, G * D)
    np.testing.assert_array_equal(origin.index, np.arange(G * D).reshape(G, D))
    assert origin.head_map == (0, 0, 1, 1)


def test_tiled_key_heads(capture) -> None:
    origin = _traced(capture, lambda y: _heads(y).repeat(1, H // G, 1, 1), G * D)
    assert origin.head_map == (0, 1, 0, 1)
    np.testing.assert_array_equal(origin.index, np.arange(G * D).reshape(G, D))


def test_a_weight_that_is_used_transposed(capture) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(HIDDEN, H * D))

        def forward(self, x):
            return _heads(x @ self.w)

    captured = capture(Transposed(), torch.randn(B, S, HIDDEN))
    origin = trace_heads(captured.view, captured.output, 1)
    assert origin.axes == (1,)
    np.testing.assert_array_equal(origin.index, np.arange(H * D).reshape(H, D))


@pytest.mark.parametrize(
    "choose",
    [
        lambda y: y[:, torch.tensor([4, 0, 1])],
        lambda y: y.index_select(1, torch.tensor([4, 0, 1])),
        lambda y: y.gather(1, torch.tensor([4, 0, 1])[None, :, None].expand(B, -1, H * D)),
        lambda y: y[torch.ones(B, S, dtype=torch.bool)][None],
    ],
)
def test_positions_chosen_by_a_tensor_leave_channels_in_place(capture, choose) -> None:
    def function(y):
        y = choose(y)
        return y.view(*y.shape[:2], H, D).transpose(1, 2)

    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    try:
        captured = capture(_Project(function, H * D), torch.randn(B, S, HIDDEN))
    finally:
        torch._dynamo.config.capture_dynamic_output_shape_ops = False
    origin = trace_heads(captured.view, captured.output, 1)
    np.testing.assert_array_equal(origin.index, np.arange(H * D).reshape(H, D))


def test_channels_chosen_by_a_tensor_are_not_known(capture) -> None:
    captured = capture(_Project(lambda y: _heads(y[..., torch.arange(H * D)]), H * D), torch.randn(B, S, HIDDEN))
    origin = trace_heads(captured.view, captured.output, 1)
    assert isinstance(origin, Untraced)


def test_features_of_a_router(capture) -> None:
    captured = capture(_Project(lambda y: y.softmax(-1).float() + 1.0, 8), torch.randn(B, S, HIDDEN))
    origin = trace_features(captured.view, captured.output)
    np.testing.assert_array_equal(origin.index, np.arange(8)[None])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda x: functional.conv1d(x, torch.ones(HIDDEN, HIDDEN, 1)).view(B, H, D, S).transpose(2, 3),
            "without a parameter",
        ),
        (lambda x: x.view(B, H, D, S).transpose(2, 3), "graph input"),
    ],
)
def test_a_trail_without_a_weight_says_where_it_ended(capture, function, reason: str) -> None:
    captured = capture(function, torch.randn(B, HIDDEN, S))
    origin = trace_heads(captured.view, captured.output, 1)
    assert isinstance(origin, Untraced)
    assert reason in origin.reason


def test_a_product_of_two_activations_is_no_projection(capture) -> None:
    captured = capture(lambda x: (x @ x.mT).view(B, 1, S, S), torch.randn(B, S, HIDDEN))
    assert not trace_heads(captured.view, captured.output, 1)
