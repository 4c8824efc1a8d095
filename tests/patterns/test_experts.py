"""The experts' weights are the three-axis parameters that a router's choice leads to, before the next site begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock.patterns import Match
from foreshock.patterns.experts import ROLE, with_experts

T, D, F, E, K = 10, 8, 6, 4, 2


class Router(nn.Module):
    """``layout``: how the experts' weights lie. Every expert computes every token, and the choice weighs."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        up = {"inputs first": (E, D, F), "outputs first": (E, F, D), "flat": (E * F, D), "experts last": (D, F, E)}
        self.up = nn.Parameter(torch.randn(up[layout]) / 3)
        self.down = nn.Parameter(torch.randn(E, F, D) / 3)
        self.layout = layout

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, chosen = self.gate(x_TD).softmax(-1).topk(K)
        up = self.up
        if self.layout == "flat":
            up = up.view(E, F, D)
        up = {"inputs first": lambda: up, "experts last": lambda: up.permute(2, 0, 1)}.get(self.layout, lambda: up.mT)()
        made = functional.silu(torch.einsum("td,tkdf->tkf", x_TD, up[chosen]))
        return (torch.einsum("tkf,tkfd->tkd", made, self.down[chosen]) * weights.unsqueeze(-1)).sum(1)


def _routers(matches: list[Match]) -> list[Match]:
    return [match for match in with_experts(matches) if match.kind == "router"]


def _experts(match: Match) -> dict[str, tuple[str, ...]]:
    return {role: view.names for role, view in match.weights.items() if role.startswith(ROLE)}


@pytest.mark.parametrize("layout", ["inputs first", "outputs first", "flat", "experts last"])
def test_the_rows_of_each_expert(capture, layout: str) -> None:
    model = Router(layout)
    captured = capture(model, torch.randn(T, D))
    (found,) = _routers(captured.findings.matches)
    assert _experts(found) == {f"{ROLE}_0": ("up",), f"{ROLE}_1": ("down",)}
    assert found.notes == ()
    assert all(found.sources[role] for role in _experts(found))
    by_expert = model.up.movedim(-1, 0) if layout == "experts last" else model.up.reshape(E, -1)
    (stage,) = found.weights[f"{ROLE}_0"].stages
    rows = stage.matrix(model.up.detach())
    torch.testing.assert_close(rows.transpose(1, 2).reshape(E, -1), by_expert.reshape(E, -1).detach())


class Layers(nn.Module):
    """Routers in turn with attentions, whose per-head weights have three axes and as many heads as there are experts."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(Router("inputs first") for _ in range(2))
        self.qkv = nn.ParameterList(nn.Parameter(torch.randn(3, E, D, 2)) for _ in range(2))
        self.o = nn.ParameterList(nn.Parameter(torch.randn(E, 2, D)) for _ in range(2))

    def forward(self, x_TD: Tensor) -> Tensor:
        for router, qkv, o in zip(self.routers, self.qkv, self.o, strict=True):
            x_TD = x_TD + router(x_TD)
            q, k, v = (torch.einsum("td,hde->hte", x_TD, w)[None] for w in qkv.unbind(0))
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x_TD = x_TD + torch.einsum("hte,hed->td", out[0], o)
        return x_TD


def test_other_layers_keep_their_weights(capture) -> None:
    matches = capture(Layers(), torch.randn(T, D)).findings.matches
    assert [match.kind for match in matches] == ["router", "attention"] * 2
    found = [_experts(match) for match in _routers(matches)]
    assert found == [
        {f"{ROLE}_0": (f"routers.{layer}.up",), f"{ROLE}_1": (f"routers.{layer}.down",)} for layer in range(2)
    ]


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, chosen = self.gate(x_TD).softmax(-1).topk(K)
        combine = torch.zeros(len(x_TD), E).scatter(-1, chosen, weights)
        return sum(combine[:, e : e + 1] * expert(x_TD) for e, expert in enumerate(self.experts))


def test_experts_in_a_loop_are_noted(capture) -> None:
    (found,) = _routers(capture(Loop(), torch.randn(T, D)).findings.matches)
    assert _experts(found) == {}
    (note,) = found.notes
    assert note.startswith("no experts: in this graph the choice meets no weight of three axes")
