"""Routers: every common way to choose experts, and the top-k selections that are something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from foreshock.errors import PatternError
from foreshock.patterns import router_op
from foreshock.patterns.ops import op

T, HIDDEN, E, K = 12, 16, 6, 2


class Experts(nn.Module):
    """``route(logits) -> (weights [T, k], chosen [T, k])`` in front of dense experts."""

    def __init__(self, route, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, E, bias=bias)
        self.w = nn.Parameter(torch.randn(E, HIDDEN, HIDDEN) * 0.1)
        self.route = route

    def forward(self, x_TD):
        weights_TK, chosen_TK = self.route(self.gate(x_TD))
        combine_TE = torch.zeros(x_TD.shape[0], E).scatter(-1, chosen_TK, weights_TK)
        y_TED = torch.einsum("td,edf->tef", x_TD, self.w)
        return (combine_TE.unsqueeze(-1) * y_TED).sum(1)


def _x() -> torch.Tensor:
    return torch.randn(T, HIDDEN, generator=torch.Generator().manual_seed(0))


def _softmax_topk(logits):
    return torch.topk(logits.softmax(-1), K)


def _softmax_topk_renormalised(logits):
    weights, chosen = functional.softmax(logits, dim=1, dtype=torch.float).topk(K, dim=-1)
    return weights / weights.sum(-1, keepdim=True), chosen


def _sigmoid_topk(logits):
    return logits.sigmoid().topk(K, sorted=False)


BIAS = torch.linspace(-0.1, 0.1, E)


def _sigmoid_bias_topk(logits):
    scores = logits.sigmoid()
    _, chosen = (scores + BIAS).topk(K, dim=-1)
    return scores.gather(-1, chosen), chosen


def _topk_softmax(logits):
    values, chosen = torch.topk(logits, k=K, dim=-1)
    return values.softmax(-1), chosen


def _topk_sigmoid(logits):
    values, chosen = torch.topk(logits, K, dim=-1)
    return values.float().sigmoid(), chosen


def _groups(logits):
    """DeepSeek's: the best two of three groups first, then experts within them."""
    scores = logits.sigmoid()
    best = (scores + BIAS).view(-1, 3, E // 3).topk(2, dim=-1)[0].sum(-1)
    group = torch.topk(best, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(best).scatter_(1, group, 1).unsqueeze(-1).expand(-1, 3, E // 3).reshape(-1, E)
    _, chosen = (scores + BIAS).masked_fill(~mask.bool(), 0.0).topk(K, dim=-1)
    return scores.gather(1, chosen), chosen


ROUTES = {
    "softmax > topk": (_softmax_topk, "softmax"),
    "softmax > topk, renormalised": (_softmax_topk_renormalised, "softmax"),
    "sigmoid > topk": (_sigmoid_topk, "sigmoid"),
    "sigmoid > topk, with a bias": (_sigmoid_bias_topk, "sigmoid"),
    "topk > softmax": (_topk_softmax, "softmax"),
    "topk > sigmoid": (_topk_sigmoid, "sigmoid"),
    "sigmoid > topk, in groups": (_groups, "sigmoid"),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_router_is_one_site(capture, route: str, bias: bool) -> None:
    choose, scoring = ROUTES[route]
    match = capture(Experts(choose, bias), _x()).match
    assert match.kind == "router"
    assert match.pattern == route.partition(",")[0]
    assert match.facts.items() >= {"experts": E, "top_k": K, "scoring": scoring}.items()
    view = match.weights["weight"]
    assert (view.names, view.index.tolist()) == (("gate.weight",), [list(range(E))])
    assert {role: op(node) for role, node in match.roles.items() if role in ("logits", "indices", "input")} == {
        "logits": "linear",
        "indices": "getitem",
        "input": "placeholder",
    }
    assert match.roles["scores"].meta["example_value"].shape == (T, E)
    assert match.tapped == "logits"


def test_a_factor_of_a_router_is_its_weight(capture) -> None:
    layer = Experts(_softmax_topk)
    view = capture(layer, _x()).match.weights["weight"]
    torch.testing.assert_close(view.factor(0), layer.gate.weight.detach().T)


def test_a_router_in_a_batch_of_sequences(capture) -> None:
    class Batched(Experts):
        def forward(self, x_BSD):
            weights, chosen = _softmax_topk(self.gate(x_BSD))
            return functional.one_hot(chosen, E).float() * weights.unsqueeze(-1), x_BSD

    match = capture(Batched(None), torch.randn(2, 5, HIDDEN)).match
    assert match.facts["experts"] == E


def test_a_choice_that_leaves_the_graph_is_a_router(capture) -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, E)

        def forward(self, x):
            values, chosen = self.gate(x).softmax(-1).topk(K)
            return values, chosen

    assert capture(Router(), _x()).match.facts["experts"] == E


def test_two_selections_on_the_same_logits_are_one_router(capture) -> None:
    def twice(logits):
        probabilities = logits.softmax(-1)
        top = probabilities.topk(1)[1]
        weights, chosen = probabilities.topk(K)
        return weights + 0.0 * functional.one_hot(top, E).sum(), chosen

    captured = capture(Experts(twice), _x())
    assert captured.match.facts["top_k"] == K


class Head(nn.Module):
    """A language-model head, and a selection over its vocabulary."""

    def __init__(self, select) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, 32, bias=False)
        self.select = select

    def forward(self, x):
        return self.select(self.head(x))


def _accuracy(logits):
    chosen = logits.topk(5)[1]
    return (chosen == torch.arange(T).unsqueeze(-1)).any(-1).float().mean()


def _accuracy_in_percent(logits):
    chosen = logits.topk(5)[1]
    return (chosen == torch.arange(T).unsqueeze(-1)).float().sum() * (100.0 / T)


def _accuracy_masked(logits):
    chosen = logits.softmax(-1).topk(5)[1]
    hit = (chosen == torch.arange(T).unsqueeze(-1)).any(-1)
    valid = torch.arange(T) > 2
    return (hit.float() * valid).sum() / valid.sum()


def _sampled(logits):
    values, _ = torch.topk(logits, 5)
    return logits.masked_fill(logits < values[:, -1:], float("-inf")).softmax(-1)


def _sampled_by_index(logits):
    values, chosen = logits.topk(5)
    return chosen.gather(-1, torch.multinomial(values.softmax(-1), 1))


def _loss_of_top(logits):
    return logits.topk(5)[0].mean()


@pytest.mark.parametrize(
    "select", [_accuracy, _accuracy_in_percent, _accuracy_masked, _sampled, _sampled_by_index, _loss_of_top]
)
def test_a_selection_over_a_vocabulary_is_no_router(capture, select) -> None:
    captured = capture(Head(select), _x())
    assert captured.findings.matches == ()
    assert captured.findings.misses


def test_a_vocabulary_choice_beside_a_router_is_not_taken_for_it(capture) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.head = Experts(_softmax_topk), nn.Linear(HIDDEN, 32)

        def forward(self, x):
            logits = self.head(self.experts(x))
            return logits, _accuracy(logits)

    captured = capture(Both(), _x())
    assert captured.match.weights["weight"].names == ("experts.gate.weight",)
    assert captured.reasons == ["nothing is dispatched by its choice"]


def test_tokens_chosen_by_experts_are_another_axis(capture) -> None:
    class ExpertChoice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, E)

        def forward(self, x):
            weights, tokens = self.gate(x).softmax(-1).topk(3, dim=0)
            return (x[tokens] * weights.unsqueeze(-1)).sum()

    captured = capture(ExpertChoice(), _x())
    assert captured.findings.matches == ()
    assert "axis 0" in captured.reasons[0]


def test_nearest_neighbours_have_no_weight(capture) -> None:
    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            y = self.embed(x)
            weights, near = (y @ y.T).softmax(-1).topk(3)
            return (functional.embedding(near, x) * weights.unsqueeze(-1)).sum(1)

    captured = capture(Neighbours(), _x())
    assert captured.findings.matches == ()
    assert "no weight" in captured.reasons[0]


def test_values_alone_are_no_choice(capture) -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, E)

        def forward(self, x):
            return self.gate(x).topk(1)[0] * 2

    captured = capture(Chosen(), _x())
    assert captured.findings.matches == ()
    assert captured.reasons == ["the chosen indices are not used"]


# -- opaque kernels ------------------------------------------------------------------------------------------------------

torch.library.define("foreshock_tests::route", "(Tensor logits, int k) -> (Tensor, Tensor)")


@torch.library.impl("foreshock_tests::route", "CompositeImplicitAutograd")
def _route(logits, k):
    return logits.softmax(-1).topk(k)


def test_a_described_kernel(capture) -> None:
    model = Experts(lambda logits: torch.ops.foreshock_tests.route(logits, K))
    assert capture(model, _x()).findings.matches == ()
    for logits in (0, "logits"):
        match = capture(model, _x(), extra=(router_op("foreshock_tests::route", logits=logits),)).match
        assert match.facts.items() >= {"experts": E, "top_k": K, "scoring": "softmax"}.items()
        assert match.weights["weight"].names == ("gate.weight",)


def test_a_described_kernel_called_by_keyword(capture) -> None:
    model = Experts(lambda logits: torch.ops.foreshock_tests.route(k=K, logits=logits))
    for logits in (0, "logits"):
        match = capture(model, _x(), extra=(router_op("foreshock_tests::route", logits=logits),)).match
        assert match.weights["weight"].names == ("gate.weight",)


def test_a_bad_description_says_what_to_give() -> None:
    with pytest.raises(PatternError, match="namespace::name"):
        router_op("route")
    with pytest.raises(PatternError, match="softmax, sigmoid"):
        router_op("a::b", scoring="tanh")
