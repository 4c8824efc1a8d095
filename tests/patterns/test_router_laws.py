"""Where the laws of a router hold: told at match time, and checked against the gradient in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

T, E, K, WIDTH = 12, 6, 2, 8
Routed = tuple[Tensor, Tensor, Tensor]  # gates [T, K], chosen experts [T, K], what is added to the loss
SHIFT, COUNT = "law/router_shift", "law/token_count"


def plain(logits: Tensor) -> Routed:
    gates, chosen = logits.softmax(-1).topk(K)
    return gates, chosen, logits.new_zeros(())


def renormalised(logits: Tensor) -> Routed:
    gates, chosen, none = plain(logits)
    return gates / gates.sum(-1, keepdim=True), chosen, none


def chosen_first(logits: Tensor) -> Routed:
    best, chosen = torch.topk(logits, K, dim=-1)
    return functional.softmax(best, dim=-1), chosen, logits.new_zeros(())


def gathered(logits: Tensor) -> Routed:
    chosen = logits.softmax(-1).topk(K)[1]
    return logits.gather(-1, chosen).softmax(-1), chosen, logits.new_zeros(())


def sorted_first(logits: Tensor) -> Routed:
    best, chosen = logits.sort(dim=-1, descending=True)
    return best[:, :K].softmax(-1), chosen[:, :K], logits.new_zeros(())


def scattered(logits: Tensor) -> Routed:
    best, chosen = logits.topk(K)
    whole = torch.full_like(logits, float("-inf")).scatter(-1, chosen, best).softmax(-1)
    return whole.gather(-1, chosen), chosen, logits.new_zeros(())


def tempered(logits: Tensor) -> Routed:
    shifted = 0.5 * logits / torch.linspace(1, 2, T, dtype=logits.dtype)[:, None] + torch.linspace(
        0, 1, E, dtype=logits.dtype
    )
    return plain(shifted)


def masked(logits: Tensor) -> Routed:
    return plain(logits.masked_fill(torch.arange(E) == 3, float("-inf")))


def balanced(logits: Tensor) -> Routed:
    gates, chosen, _ = plain(logits)
    return gates, chosen, (logits.softmax(-1).mean(0) * torch.linspace(0, 1, E, dtype=logits.dtype)).sum()


def squashed(logits: Tensor) -> Routed:
    gates, chosen = logits.sigmoid().topk(K)
    return gates, chosen, logits.new_zeros(())


def with_z_loss(logits: Tensor) -> Routed:
    gates, chosen, _ = plain(logits)
    return gates, chosen, logits.logsumexp(-1).square().mean()


def half_masked(logits: Tensor) -> Routed:
    return plain(logits.masked_fill(torch.arange(E) == 3, 0.0))


def multiplied_by_expert(logits: Tensor) -> Routed:
    return plain(logits * logits.detach().sigmoid())


def added_to_itself(logits: Tensor) -> Routed:
    return plain(logits + logits.roll(1, -1) * 0.5 + logits.relu())


@dataclass(frozen=True)
class Form:
    route: Callable[[Tensor], Routed]
    broken: str = ""  # what the reason names


FORMS = [
    *map(Form, (plain, renormalised, chosen_first, gathered, sorted_first, scattered, tempered, masked, balanced)),
    Form(squashed, "sigmoid"),
    Form(with_z_loss, "logsumexp"),
    Form(half_masked, "masked_fill"),
    Form(multiplied_by_expert, "mul"),
    Form(added_to_itself, "`"),
]
by_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.route.__name__)


class Mixture(nn.Module):
    def __init__(self, route: Callable[[Tensor], Routed]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gate, self.route = nn.Linear(WIDTH, E, bias=False), route
        self.experts = nn.Parameter(torch.randn(E, WIDTH, WIDTH) * 0.3)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.mixed(x_TD, self.gate(x_TD))

    def mixed(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        gates_TK, chosen_TK, more = self.route(logits_TE)
        outputs_TKD = torch.einsum("td,tkdf->tkf", x_TD, self.experts[chosen_TK])
        return (outputs_TKD * gates_TK.unsqueeze(-1)).sum(1) + more


@by_form
def test_the_ledger_says_where_the_shift_law_holds(capture, form: Form) -> None:
    reason = capture(Mixture(form.route), torch.randn(T, WIDTH)).match.laws[SHIFT]
    assert (form.broken in reason) if form.broken else reason == ""


@by_form
def test_the_gradient_agrees_with_the_ledger(form: Form) -> None:
    model = Mixture(form.route).double()
    x_TD = torch.randn(T, WIDTH, dtype=torch.float64)
    logits = model.gate(x_TD)
    (grad,) = torch.autograd.grad(model.mixed(x_TD, logits).square().sum(), logits)
    assert (grad.sum(-1).norm() / grad.norm() < 1e-12) == (not form.broken)


def test_every_choice_of_a_fixed_number_is_counted(capture) -> None:
    assert capture(Mixture(plain), torch.randn(T, WIDTH)).match.laws[COUNT] == ""


def test_a_threshold_has_no_number_to_count(capture) -> None:
    def route(x, gate, experts):
        scores = (x @ gate).softmax(-1)
        return torch.einsum("te,td,edf->tf", scores * (scores > 0.2), x, experts)

    arguments = (torch.randn(T, WIDTH), *(nn.Parameter(torch.randn(*n)) for n in ((WIDTH, E), (E, WIDTH, WIDTH))))
    laws = capture(route, *arguments).match.laws
    assert laws[SHIFT] == ""
    assert "varying numbers" in laws[COUNT]


def test_logits_that_leave_the_graph_may_come_back(capture) -> None:
    class Leaking(Mixture):
        def forward(self, x_TD):
            logits = self.gate(x_TD)
            return self.mixed(x_TD, logits), logits

    assert "leave the graph" in capture(Leaking(plain), torch.randn(T, WIDTH)).match.laws[SHIFT]


def test_a_softmax_in_less_than_the_logits_precision_is_held_to_its_own(capture) -> None:
    def coarse(logits: Tensor) -> Routed:
        gates, chosen = logits.bfloat16().softmax(-1).topk(K)
        return gates.float(), chosen, logits.new_zeros(())

    match = capture(Mixture(coarse), torch.randn(T, WIDTH)).match
    assert (match.laws[SHIFT], match.facts["dtype"]) == ("", "bfloat16")
