"""Routers: every common way to choose experts, and the top-k selections that are something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from foreshock import Watch
from foreshock.errors import PatternError
from foreshock.patterns import find, router_op
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


def _one_group(logits):
    """DeepSeek's again, where all experts are in one group: the choice of groups is emitted all the same."""
    scores = logits.sigmoid()
    moved = scores + BIAS
    best = moved.view(-1, 1, E).topk(2, dim=-1)[0].sum(-1)
    group = torch.topk(best, k=1, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(best).scatter_(1, group, 1).unsqueeze(-1).expand(-1, 1, E).reshape(-1, E)
    _, chosen = moved.masked_fill(~mask.bool(), 0.0).topk(K, dim=-1)
    return scores.gather(1, chosen), chosen


def _best_of_groups(logits):
    """DeepSeek-V2's: a group is as good as its best expert."""
    scores = logits.softmax(-1)
    group = scores.view(-1, 3, E // 3).max(dim=-1).values.topk(2, dim=-1, sorted=False)[1]
    mask = torch.zeros(T, 3).scatter_(1, group, 1).unsqueeze(-1).expand(-1, 3, E // 3).reshape(-1, E)
    return scores.masked_fill(~mask.bool(), 0.0).topk(K, dim=-1)


def _softmax_bias(logits):
    scores = logits.softmax(-1)
    chosen = (scores + BIAS).topk(K)[1]
    return scores.gather(-1, chosen), chosen


def _bias_then_softmax(logits):
    chosen = (logits + BIAS).topk(K)[1]
    return logits.gather(-1, chosen).softmax(-1), chosen


def _softcap_sigmoid(logits):
    return (torch.tanh(logits / 30) * 30).sigmoid().topk(K)


def _sqrt_softplus(logits):
    scores = functional.softplus(logits).sqrt()
    chosen = (scores + BIAS).topk(K)[1]
    return scores.gather(-1, chosen), chosen


def _noisy(logits):
    noisy = logits + torch.randn_like(logits) * 0.1
    values, chosen = noisy.topk(K + 1)
    return values[:, :K].softmax(-1), chosen[:, :K]


def _by_hand(logits):
    powers = (logits - logits.max(-1, keepdim=True)[0]).exp()
    return (powers / powers.sum(-1, keepdim=True)).topk(K)


def _scatter_sigmoid(logits):
    """Llama 4's."""
    values, chosen = logits.topk(K)
    scores = torch.full_like(logits, float("-inf")).scatter(1, chosen, values).sigmoid()
    return scores.gather(1, chosen), chosen


def _sorted(logits):
    values, order = logits.softmax(-1).sort(dim=-1, descending=True)
    return values[:, :K], order[:, :K]


def _argsorted(logits):
    probabilities = logits.softmax(-1)
    chosen = probabilities.argsort(dim=-1)[..., -K:]
    return probabilities.gather(-1, chosen), chosen


def _argmax(logits):
    """Switch's."""
    probabilities = logits.softmax(-1)
    chosen = probabilities.argmax(-1)
    return probabilities.max(-1, keepdim=True)[0], chosen.unsqueeze(-1)


def _max(logits):
    weights, chosen = logits.softmax(-1).max(-1, keepdim=True)
    return weights, chosen


def _two_argmaxes(logits):
    probabilities = logits.softmax(-1)
    first = probabilities.argmax(-1)
    second = logits.masked_fill(functional.one_hot(first, E).bool(), float("-inf")).argmax(-1)
    chosen = torch.stack([first, second], -1)
    return probabilities.gather(-1, chosen), chosen


def _sparsemixer(logits):
    """PhiMoE's: two maxima, each after what is far below the best was masked out, the second after the first."""
    best, _ = logits.max(-1, keepdim=True)
    gates = logits.masked_fill((best - logits) / logits.abs().clamp(min=best) > 0.02, float("-inf"))
    first = (gates - torch.empty_like(gates).exponential_().log()).max(-1)[1].unsqueeze(-1)
    one = gates.softmax(-1).gather(-1, first)
    rest = logits.scatter(-1, first, float("-inf"))
    best, _ = rest.max(-1, keepdim=True)
    gates = rest.masked_fill((best - rest) / logits.abs().clamp(min=best) > 0.02, float("-inf"))
    second = gates.max(-1)[1].unsqueeze(-1)
    two = gates.softmax(-1).gather(-1, second)
    return torch.cat([one, two], -1), torch.cat([first, second], -1)


# name: the choice, its scoring, and facts that are not a plain top-k's
ROUTES = {
    "softmax > topk": (_softmax_topk, "softmax", {}),
    "softmax > topk, renormalised": (_softmax_topk_renormalised, "softmax", {}),
    "softmax > topk, with a bias": (_softmax_bias, "softmax", {"biased": True}),
    "softmax > topk, by hand": (_by_hand, "softmax", {}),
    "softmax > topk, the best of a group": (_best_of_groups, "softmax", {"groups": 3}),
    "sigmoid > topk": (_sigmoid_topk, "sigmoid", {}),
    "sigmoid > topk, softcapped": (_softcap_sigmoid, "sigmoid", {}),
    "sigmoid > topk, with a bias": (_sigmoid_bias_topk, "sigmoid", {"biased": True}),
    "sigmoid > topk, in groups": (_groups, "sigmoid", {"biased": True, "groups": 3}),
    "sigmoid > topk, in one group": (_one_group, "sigmoid", {"biased": True, "groups": 1}),
    "sqrtsoftplus > topk": (_sqrt_softplus, "sqrtsoftplus", {"biased": True}),
    "topk > softmax": (_topk_softmax, "softmax", {}),
    "topk > softmax, with a bias": (_bias_then_softmax, "softmax", {"biased": True}),
    "topk > softmax, noisy": (_noisy, "softmax", {}),
    "topk > sigmoid": (_topk_sigmoid, "sigmoid", {}),
    "topk > sigmoid, scattered": (_scatter_sigmoid, "sigmoid", {}),
    "softmax > sort": (_sorted, "softmax", {"selection": "sort"}),
    "softmax > sort, backwards": (_argsorted, "softmax", {"selection": "sort"}),
    "softmax > argmax": (_argmax, "softmax", {"selection": "argmax", "top_k": 1}),
    "softmax > argmax, max": (_max, "softmax", {"selection": "argmax", "top_k": 1}),
    "softmax > argmax, twice": (_two_argmaxes, "softmax", {"selection": "argmax"}),
    "argmax > softmax": (_sparsemixer, "softmax", {"selection": "argmax"}),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_router_is_one_site(capture, route: str, bias: bool) -> None:
    choose, scoring, facts = ROUTES[route]
    captured = capture(Experts(choose, bias), _x())
    match = captured.match
    assert match.kind == "router"
    assert match.pattern == route.partition(",")[0]
    usual = {"experts": E, "top_k": K, "scoring": scoring, "selection": "topk", "biased": False}
    assert match.facts.items() >= {**usual, **facts}.items()
    assert captured.reasons == []
    view = match.weights["weight"]
    assert (view.names, view.index.tolist()) == (("gate.weight",), [list(range(E))])
    assert op(match.roles["logits"]) == ("mul" if "softcapped" in route else "linear")
    assert op(match.roles["input"]) == "placeholder"
    chosen = [node.meta["example_value"] for role, node in match.roles.items() if role.startswith("indices")]
    assert sum(x.shape[-1] if x.dim() == 2 else 1 for x in chosen) == match.facts["top_k"]
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


def test_transposed_logits(capture) -> None:
    class Transposed(Experts):
        def forward(self, x_TD):
            weights_KT, chosen_KT = (self.gate.weight @ x_TD.T).softmax(0).topk(K, dim=0)
            combine_ET = torch.zeros(E, x_TD.shape[0]).scatter(0, chosen_KT, weights_KT)
            return torch.einsum("et,td,edf->tf", combine_ET, x_TD, self.w)

    match = capture(Transposed(None), _x()).match
    assert match.facts.items() >= {"experts": E, "top_k": K, "axes": {"logits": 0, "scores": 0, "chosen": 0}}.items()
    assert match.weights["weight"].names == ("gate.weight",)


@pytest.mark.parametrize("batched", [False, True])
def test_experts_that_choose_tokens(capture, batched: bool) -> None:
    """Expert choice, arXiv 2202.09368: each expert takes the tokens that score it highest."""

    class ExpertChoice(Experts):
        def forward(self, x):
            scores = self.gate(x).softmax(-1)
            weights, tokens = scores.transpose(-1, -2).topk(3, dim=-1)
            if batched:
                taken = x.unsqueeze(1).expand(-1, E, -1, -1).gather(2, tokens.unsqueeze(-1).expand(-1, -1, -1, HIDDEN))
                return torch.einsum("becd,edf->becf", taken, self.w) * weights.unsqueeze(-1)
            y = torch.bmm(x[tokens.reshape(-1)].view(E, 3, HIDDEN), self.w) * weights.unsqueeze(-1)
            return torch.zeros_like(x).index_add(0, tokens.reshape(-1), y.reshape(-1, HIDDEN))

    match = capture(ExpertChoice(None), torch.randn(2, 5, HIDDEN) if batched else _x()).match
    axes = {"logits": 1 + batched, "scores": int(batched), "chosen": 1 + batched}
    assert match.pattern == "softmax > topk over tokens"
    assert match.facts.items() >= {"experts": E, "top_k": 3, "selection": "tokens", "axes": axes}.items()


def test_tokens_taken_by_one_expert_after_another(capture) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, E)
            self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(E))

        def forward(self, x):
            weights, tokens = self.gate(x).softmax(-1).topk(3, dim=0)
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                y = y.index_add(0, tokens[:, e], expert(x[tokens[:, e]]) * weights[:, e, None])
            return y

    assert capture(Loop(), _x()).match.facts["selection"] == "tokens"


@pytest.mark.parametrize("below", [False, True])
def test_a_threshold_chooses_a_varying_number(capture, below: bool) -> None:
    class Threshold(Experts):
        def forward(self, x_TD):
            scores_TE = self.gate(x_TD).sigmoid()
            taken_TE = ~(scores_TE < 0.5) if below else scores_TE > 0.5
            return torch.einsum("te,td,edf->tf", scores_TE * taken_TE, x_TD, self.w)

    captured = capture(Threshold(None), _x())
    match = captured.match
    assert (match.pattern, match.facts["selection"], match.facts["top_k"]) == ("sigmoid > threshold", "threshold", None)
    assert match.facts.get("inverted", False) == below
    assert op(match.roles["chosen"]) == ("lt" if below else "gt")


def test_a_hard_gumbel_softmax(capture) -> None:
    class Gumbel(Experts):
        def forward(self, x_TD):
            combine_TE = functional.gumbel_softmax(self.gate(x_TD), hard=True)
            return torch.einsum("te,td,edf->tf", combine_TE, x_TD, self.w)

    match = capture(Gumbel(None), _x()).match
    assert match.facts.items() >= {"selection": "argmax", "top_k": 1, "experts": E}.items()
    assert op(match.roles["chosen"]) == "gumbel_softmax"


def test_tokens_that_a_full_expert_drops_are_no_second_router(capture) -> None:
    """Megatron's: among the tokens of an expert those of the highest probability stay."""

    class Dropping(Experts):
        def forward(self, x_TD):
            weights, chosen = self.gate(x_TD).softmax(-1).topk(K)
            combine_TE = torch.zeros(T, E).scatter(-1, chosen, weights)
            kept_TE = torch.zeros(T, E).scatter(0, combine_TE.topk(3, dim=0)[1], 1.0) * combine_TE
            return torch.einsum("te,td,edf->tf", kept_TE, x_TD, self.w)

    captured = capture(Dropping(None), _x())
    assert captured.match.facts["top_k"] == K
    assert captured.reasons == []


def test_the_kth_score_as_a_threshold(capture) -> None:
    class Kth(Experts):
        def forward(self, x_TD):
            scores_TE = self.gate(x_TD).softmax(-1)
            kept_TE = torch.where(scores_TE >= scores_TE.topk(K)[0][:, -1:], scores_TE, 0.0)
            return torch.einsum("te,td,edf->tf", kept_TE, x_TD, self.w)

    captured = capture(Kth(None), _x())
    assert captured.match.facts.items() >= {"selection": "threshold", "top_k": K}.items()
    assert captured.reasons == []


def test_capacity_and_one_hot_dispatch(capture) -> None:
    """Two experts a token as DeepSpeed and fairseq write it: two argmaxes, places by cumsum, products with one-hot masks."""

    class Capacity(Experts):
        def forward(self, x_TD):
            logits = self.gate(x_TD).float()
            gates = functional.softmax(logits, dim=1)
            first = torch.argmax(gates, dim=1)
            mask1 = functional.one_hot(first, num_classes=E)
            noisy = logits - torch.empty_like(logits).exponential_().log()
            second = torch.argmax(noisy.masked_fill(mask1.bool(), float("-inf")), dim=1)
            mask2 = functional.one_hot(second, num_classes=E)
            place1 = torch.cumsum(mask1, dim=0) - 1
            place2 = torch.cumsum(mask2, dim=0) - 1 + torch.sum(mask1, dim=0, keepdim=True)
            balance = torch.mean(torch.mean(gates, dim=0) * torch.mean(mask1.float(), dim=0)) * E * E
            combine = 0.0
            for mask, place in ((mask1, place1), (mask2, place2)):
                mask = mask * torch.lt(place, 8)
                where = functional.one_hot(torch.sum(place * mask, dim=1), num_classes=8).float()
                kept = torch.einsum("s,se->se", torch.einsum("se,se->s", gates, mask.float()), mask.float())
                combine = combine + torch.einsum("se,sc->sec", kept, where)
            taken = torch.einsum("sec,sm->ecm", combine.bool().type_as(x_TD), x_TD)
            return torch.einsum("sec,ecm->sm", combine, torch.bmm(taken, self.w)), balance

    captured = capture(Capacity(None), _x())
    assert (
        captured.match.facts.items() >= {"experts": E, "top_k": 2, "selection": "argmax", "scoring": "softmax"}.items()
    )
    assert captured.match.roles.keys() >= {"indices", "indices_2"}
    assert captured.reasons == []


def test_a_loop_over_dense_experts(capture) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, E)
            self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(E))

        def forward(self, x):
            weights, chosen = self.gate(x).softmax(-1).topk(K)
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                y = y + expert(x) * (weights * (chosen == e)).sum(-1, keepdim=True)
            return y

    assert capture(Loop(), _x()).match.facts["experts"] == E


def test_experts_of_one_vector_looked_up(capture) -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, E)
            self.down, self.up = nn.Embedding(E, HIDDEN), nn.Embedding(E, HIDDEN)

        def forward(self, x):
            weights, chosen = self.gate(x).softmax(-1).topk(K)
            hidden = torch.einsum("td,tkd->tk", x, self.down(chosen)).relu() * weights
            return torch.einsum("tk,tkd->td", hidden, self.up(chosen))

    assert capture(Lookup(), _x()).match.facts["top_k"] == K


def test_experts_that_do_nothing_count(capture) -> None:
    """LongCat's zero experts: rows of the router beyond the experts with weights."""

    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, E + 2)
            self.w = nn.Parameter(torch.randn(E, HIDDEN, HIDDEN))

        def forward(self, x):
            weights, chosen = self.gate(x).softmax(-1).topk(K)
            combine = torch.zeros(T, E + 2).scatter(-1, chosen, weights)
            return torch.einsum("te,td,edf->tf", combine[:, :E], x, self.w) + combine[:, E:].sum(-1, keepdim=True) * x

    assert capture(Zero(), _x()).match.facts["experts"] == E + 2


def test_two_routers_of_one_projection_stay_two(capture) -> None:
    class Fused(Experts):
        def __init__(self) -> None:
            super().__init__(None)
            self.gate = nn.Linear(HIDDEN, 2 * E)

        def forward(self, x_TD):
            y = x_TD
            for logits in self.gate(x_TD).chunk(2, -1):
                weights, chosen = logits.softmax(-1).topk(K)
                y = y + torch.einsum("te,td,edf->tf", torch.zeros(T, E).scatter(-1, chosen, weights), x_TD, self.w)
            return y

    matches = capture(Fused(), _x()).findings.matches
    assert [match.weights["weight"].index.tolist() for match in matches] == [[list(range(E))], [list(range(E, 2 * E))]]


def test_logits_are_followed_no_further_than_needed(capture) -> None:
    """Matching a model twice as deep takes about twice the nodes looked at, not four times."""

    class Deep(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Experts(_groups) for _ in range(layers))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    seen = []
    for layers in (8, 16):
        captured = capture(Deep(layers), _x())
        assert len(captured.findings.matches) == layers
        flow = captured.view.dataflow
        asked = 0
        whole = flow.predecessors

        def counted(node, whole=whole):
            nonlocal asked
            asked += 1
            return whole(node)

        flow.predecessors = counted
        find(captured.view)
        seen.append(asked)
    assert seen[1] < 2.5 * seen[0]


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


class SharedBeside(nn.Module):
    """Inkling: shared experts have rows of the same projection, before or behind those that are chosen from."""

    def __init__(self, in_front: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, E + 1, bias=False)
        self.up = nn.Parameter(torch.randn(E, HIDDEN, HIDDEN) / HIDDEN**0.5)
        self.in_front = in_front

    def forward(self, x):
        scores = self.gate(x).sigmoid()
        scores = scores[:, 1:] if self.in_front else scores[:, :-1]
        weights, chosen = scores.topk(2, -1)
        return (torch.einsum("td,tkdf->tkf", x, self.up[chosen]) * weights[..., None]).sum(1)


@pytest.mark.parametrize("in_front", [False, True])
def test_logits_of_shared_experts_stand_beside(in_front: bool) -> None:
    torch.manual_seed(0)
    model, x = SharedBeside(in_front), torch.randn(12, HIDDEN)
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        torch.compile(model, backend=watch.backend)(x).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        (status,) = watch.coverage
        (site,) = watch.sites
        load = watch.series("router/load")[1][0]
    assert (status.site.experts, status.site.top_k) == (E, 2)
    logits = model.gate(x)[:, 1:] if in_front else model.gate(x)[:, :-1]
    chosen = logits.topk(2, -1).indices.flatten()
    assert load.tolist() == pytest.approx((torch.bincount(chosen, minlength=E) / len(chosen)).tolist())
    assert site.weight.names == ("gate.weight",)
