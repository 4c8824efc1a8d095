"""What is read after writes in place, against the values that the real ops leave there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from foreshock.patterns.ops import shape
from foreshock.patterns.pullback import Pull


class _Of(nn.Module):
    """``function`` of a parameter that holds 1, 2, 3, ... in ``[3, 4]``."""

    def __init__(self, function) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.arange(1.0, 13.0).reshape(3, 4))
        self.function = function

    def forward(self, x):
        return self.function(self.p, x)


def _followed(captured) -> np.ndarray:
    """The numbers that trails of every element of the output lead to, 0 where there is none."""
    node = captured.output
    sizes = shape(node)
    grid = tuple(axis.reshape(-1) for axis in np.indices(sizes))
    end = next(iter(reversed(captured.module.graph.nodes)))
    found = Pull(captured.view).pieces(node, grid, end)
    numbers = np.zeros(len(grid[0]))
    for trail in found if isinstance(found, list) else []:
        rows = np.arange(len(numbers)) if trail.where is None else trail.where
        assert trail.node in captured.view.parameters
        columns = [np.broadcast_to(column, rows.shape) for column in trail.coordinates]
        numbers[rows] = np.ravel_multi_index(columns, (3, 4)) + 1
    return numbers.reshape(sizes)


def _two_halves(p, x):
    y = x.new_empty(3, 8)
    y[:, :4].copy_(p)
    y[:, 4:].copy_(p.flip(1))
    return y * 1.0


def _setitem_halves(p, x):
    y = torch.empty_like(x)
    y[..., :2] = p[..., 2:]
    y[..., 2:] = p[..., :2]
    return y


def _view_made_before(p, x):
    y = torch.zeros(2, 12)
    early = y.view(2, 3, 4).transpose(1, 2)
    y[1] = p.reshape(-1)
    return early * 1.0


def _view_made_after(p, x):
    y = torch.zeros(3, 4, 2)
    y[..., 1] = p
    return y.permute(2, 0, 1)[1] + 0.0


def _view_of_a_view(p, x):
    y = torch.zeros(4, 6)
    y[1:].t()[1:5].copy_(p.t())
    return y


def _through_a_transpose(p, x):
    y = torch.zeros(4, 3)
    y.t().copy_(p)
    return y


def _every_other(p, x):
    y = torch.zeros(3, 8)
    y[:, ::2] = p
    y[:, 1::2] = p * 1.0
    return y


def _later_wins(p, x):
    y = torch.zeros(3, 4)
    y.copy_(p)
    y[1:].copy_(p[:2])
    y[2, 3:] = p[0, :1]
    return y


def _does_not_cover(p, x):
    y = torch.zeros(3, 4)
    y[1, 1:3] = p[1, 1:3]
    return y


def _covered_by_a_constant(p, x):
    y = p.clone()
    y[1] = 0.0
    y[:, 0].zero_()
    return y


def _broadcast_source(p, x):
    y = torch.zeros(2, 3, 4)
    y.copy_(p)
    return y


def _expanded_source(p, x):
    y = torch.zeros(2, 3, 4)
    y[:] = p[None].expand(2, 3, 4)
    return y


def _computed_in_place(p, x):
    y = p.clone()
    y.mul_(1.0)
    y[1:].add_(0.0)
    return y


def _augmented_slice(p, x):
    y = p.clone()
    y[:, :2] *= 1.0
    return y


def _out(p, x):
    y = torch.zeros(3, 4)
    torch.mul(p.detach(), 1.0, out=y)
    return y


def _pieces(p, x):
    y = torch.zeros(3, 8)
    left, right = y.chunk(2, -1)
    right.copy_(p.detach())
    left[0].copy_(p.detach()[2])
    return y


def _masked(p, x):
    y = p.clone()
    y.masked_fill_(torch.zeros(3, 4, dtype=torch.bool), 0.0)
    return y


def _complex_parts(p, x):
    y = torch.zeros(3, 2, dtype=torch.complex64)
    torch.view_as_real(y).copy_(p.reshape(3, 2, 2))
    return torch.view_as_real(y * 1.0).flatten(1)


def _complex_whole(p, x):
    y = torch.zeros(3, 2, 2)
    torch.view_as_complex(y)[1:] = torch.view_as_complex(p.reshape(3, 2, 2))[:2]
    return y.flatten(1)


def _unaligned_view(p, x):
    y = torch.zeros(20)
    y.as_strided((3, 4), (6, 1), 1).copy_(p)
    return y


def _squeezed(p, x):
    y = torch.zeros(3, 1, 4)
    y.squeeze(1).copy_(p)
    return y.unsqueeze(0)


CASES = {function.__name__[1:].replace("_", " "): function for function in (
    _two_halves, _setitem_halves, _view_made_before, _view_made_after, _view_of_a_view, _through_a_transpose, _every_other,
    _later_wins, _does_not_cover, _covered_by_a_constant, _broadcast_source, _expanded_source, _computed_in_place,
    _augmented_slice, _out, _pieces, _masked, _complex_parts, _complex_whole, _unaligned_view, _squeezed,
)}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_was_written_last(capture, case: str) -> None:
    captured = capture(_Of(CASES[case]), torch.zeros(3, 4))
    np.testing.assert_array_equal(_followed(captured), captured.result.detach().numpy())


def test_symbolic_sizes(capture) -> None:
    x = torch.zeros(5, 4)
    torch._dynamo.mark_dynamic(x, 0)

    def function(p, x):
        y = x.new_empty(x.shape[0], 3, 8)
        y[..., :4] = p
        y[..., x.shape[1] :].copy_(p.flip(0))
        return y.flatten(0, 1) * 1.0

    captured = capture(_Of(function), x)
    np.testing.assert_array_equal(_followed(captured), captured.result.detach().numpy())


def test_a_write_after_the_read_is_not_seen(capture) -> None:
    def function(p, x):
        y = torch.zeros(3, 4)
        y.copy_(p)
        read = y + 0.0
        y.copy_(p.flip(0))
        return read

    captured = capture(_Of(function), torch.zeros(3, 4))
    np.testing.assert_array_equal(_followed(captured), np.arange(1, 13).reshape(3, 4))


@pytest.mark.parametrize(
    "write",
    [
        lambda y, p: y.__setitem__(torch.tensor([2, 0]), p[:2]),
        lambda y, p: y.scatter_(0, torch.zeros(1, 4, dtype=torch.long), p),
    ],
)
def test_a_write_to_places_not_known_ends_the_trail(capture, write) -> None:
    def function(p, x):
        y = p.clone()
        write(y, p)
        return y

    captured = capture(_Of(function), torch.zeros(3, 4))
    assert not _followed(captured).any()


def test_memory_that_nobody_wrote_costs_nothing(capture) -> None:
    captured = capture(_Of(lambda p, x: p * 1.0), torch.zeros(3, 4))
    assert captured.view.writes == {}
    assert captured.view.written(captured.output, captured.output) == []
