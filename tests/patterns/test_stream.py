"""The residual stream is what the projected output is added to, whatever else is added on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock.patterns.ops import op
from foreshock.patterns.stream import with_stream

D, H = 16, 2


class Attention(nn.Module):
    def __init__(self, projected: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.o = nn.Linear(D, D) if projected else nn.Identity()
        self.norm, self.after = nn.LayerNorm(D), nn.RMSNorm(D)
        self.up = nn.Linear(D, D)
        self.scale, self.table = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(4, D))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Forms:
    """Each takes the module and a stream that is made by an op of its own, `cos`."""

    @staticmethod
    def before_norm(m: Attention, x: Tensor) -> Tensor:
        return x + m.attend(m.norm(x))

    @staticmethod
    def after_norm(m: Attention, x: Tensor) -> Tensor:
        return m.norm(functional.dropout(m.attend(x), 0.1) + x)

    @staticmethod
    def norm_on_the_branch(m: Attention, x: Tensor) -> Tensor:
        return x + m.after(m.attend(m.norm(x))) * 0.5

    @staticmethod
    def written_norm(m: Attention, x: Tensor) -> Tensor:
        y = m.attend(m.norm(x))
        return x + m.scale * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))

    @staticmethod
    def in_place(m: Attention, x: Tensor) -> Tensor:
        y = m.attend(m.norm(x))
        y += x
        return y

    @staticmethod
    def parallel(m: Attention, x: Tensor) -> Tensor:
        normed = m.norm(x)
        return functional.gelu(m.up(normed)) + m.attend(normed) + x

    @staticmethod
    def scaled_stream(m: Attention, x: Tensor) -> Tensor:
        return x * 0.9 + m.attend(m.norm(x))

    @staticmethod
    def positions_added(m: Attention, x: Tensor) -> Tensor:
        return x + (m.attend(m.norm(x)) + m.table)


@pytest.mark.parametrize("form", [name for name in vars(Forms) if not name.startswith("_")])
def test_the_stream_is_found(capture, form: str) -> None:
    model = Attention()
    captured = capture(_Called(model, getattr(Forms, form)), torch.randn(3, 4, D))
    found = with_stream(captured.match)
    assert op(found.roles["residual"]) == "cos"
    assert found.notes == captured.match.notes
    assert {role: node for role, node in found.roles.items() if role != "residual"} == captured.match.roles


class _Called(nn.Module):
    def __init__(self, model: Attention, form) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.model, x.cos())


NEAR_MISSES = {
    "nothing is added": (lambda m, x: m.attend(m.norm(x)), True, "added to nothing that the queries"),
    "something else is added": (lambda m, x: m.attend(m.norm(x)) + m.up(x), True, "added to nothing that the queries"),
    "a product with the stream": (lambda m, x: m.attend(m.norm(x)) * x, True, "added to nothing that the queries"),
    "no projection": (lambda m, x: m.attend(x) + x, False, "meets no projection"),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_what_is_no_stream_is_noted(capture, miss: str) -> None:
    form, projected, says = NEAR_MISSES[miss]
    found = with_stream(capture(_Called(Attention(projected), form), torch.randn(3, 4, D)).match)
    assert "residual" not in found.roles
    (note,) = found.notes
    assert note.startswith("no residual stream: ")
    assert says in note


def test_each_layer_has_its_own(capture) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer.attend(layer.norm(x))
            return x

    captured = capture(Two(), torch.randn(3, 4, D))
    assert len(captured.findings.matches) == 2
    first, second = (with_stream(match).roles["residual"] for match in captured.findings.matches)
    order = captured.view.order
    assert order[first] < order[captured.findings.matches[0].anchor] < order[second]
