"""Choices that are no router's: each looks like one in some way, and yields no site."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

T, HIDDEN, E, K, FEATURES = 12, 16, 6, 2, 32


def _x() -> torch.Tensor:
    return torch.randn(T, HIDDEN, generator=torch.Generator().manual_seed(0))


def _routers(captured) -> list:
    return [match for match in captured.findings.matches if match.kind == "router"]


class Scored(nn.Module):
    """A linear layer, and what ``use`` makes of its output and input."""

    def __init__(self, use, features: int = FEATURES) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, features, bias=False)
        self.decoder = nn.Linear(features, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, features), nn.Linear(features, HIDDEN)
        self.table = nn.Embedding(features, HIDDEN)
        self.use = use

    def forward(self, x):
        hidden = torch.tanh(x) + x  # the head is not all that is compiled
        return self.use(self, self.head(hidden), hidden)


# -- metrics and sampling over a vocabulary ------------------------------------------------------------------------------


def _accuracy(model, logits, x):
    chosen = logits.topk(5)[1]
    return (chosen == torch.arange(T).unsqueeze(-1)).any(-1).float().mean()


def _accuracy_in_percent(model, logits, x):
    chosen = logits.topk(5)[1]
    return (chosen == torch.arange(T).unsqueeze(-1)).float().sum() * (100.0 / T)


def _accuracy_masked(model, logits, x):
    chosen = logits.softmax(-1).topk(5)[1]
    hit = (chosen == torch.arange(T).unsqueeze(-1)).any(-1)
    valid = torch.arange(T) > 2
    return (hit.float() * valid).sum() / valid.sum()


def _accuracy_with_loss(model, logits, x):
    """In the model's own forward, beside the loss that weighs tokens by what they hit."""
    labels = x[:, 0].long().clamp(min=0)
    hit = (logits.topk(5)[1] == labels.unsqueeze(-1)).any(-1)
    loss = functional.cross_entropy(logits, labels, reduction="none")
    return (loss * hit).mean(), hit.float().mean()


def _argmax_accuracy(model, logits, x):
    return logits, (logits.argmax(-1) == torch.arange(T)).float().mean()


def _prediction(model, logits, x):
    """A classifier's."""
    return logits, logits.argmax(-1)


def _confidence(model, logits, x):
    return logits.softmax(-1).max(-1)


def _sampled(model, logits, x):
    values, _ = torch.topk(logits, 5)
    return logits.masked_fill(logits < values[:, -1:], float("-inf")).softmax(-1)


def _sampled_by_index(model, logits, x):
    values, chosen = logits.topk(5)
    return chosen.gather(-1, torch.multinomial(values.softmax(-1), 1))


def _beams(model, logits, x):
    """Two beams: the best continuations of both together, and the beam each is of."""
    scores, chosen = logits.log_softmax(-1).view(T // 2, 2 * FEATURES).topk(4)
    return (
        scores,
        chosen // FEATURES,
        x.view(T // 2, 2, HIDDEN).gather(1, (chosen // FEATURES).unsqueeze(-1).expand(-1, -1, HIDDEN)),
    )


def _loss_of_top(model, logits, x):
    return logits.topk(5)[0].mean()


def _unlabelled_left_out(model, logits, x):
    """Frames whose best class is blank, as in CTC, are masked out."""
    return x * (logits.argmax(-1, keepdim=True) != 0)


# -- sparse activations, codebooks ---------------------------------------------------------------------------------------


def _sparse_autoencoder(model, logits, x):
    values, chosen = logits.relu().topk(K)
    sparse = torch.zeros_like(logits).scatter(-1, chosen, values)
    decoded = model.decoder(sparse)
    return decoded, (decoded - x).square().mean()


def _sparse_autoencoder_by_rows(model, logits, x):
    values, chosen = logits.relu().topk(K)
    return (model.table(chosen) * values.unsqueeze(-1)).sum(1)


def _winners_take_all(model, logits, x):
    kept = logits * torch.zeros_like(logits).scatter(-1, logits.topk(K)[1], 1.0)
    return x + model.down(kept)


def _winners_take_all_gated(model, logits, x):
    gate = logits.relu()
    kept = torch.zeros_like(gate).scatter(-1, gate.topk(K)[1], 1.0) * gate
    return x + model.down(kept * model.up(x))


def _jump_relu(model, logits, x):
    return x + model.down(torch.where(logits > 0.1, logits, 0.0))


def _nearest_code(model, logits, x):
    """The head's own rows are the codes."""
    chosen = (logits - 0.5 * model.head.weight.square().sum(-1)).argmax(-1)
    code = functional.embedding(chosen, model.head.weight)
    return x + (code - x).detach(), (code - x.detach()).square().mean()


def _nearest_code_by_one_hot(model, logits, x):
    chosen = functional.one_hot((-(x.square().sum(-1, keepdim=True) - 2 * logits)).argmax(-1), FEATURES).float()
    return x + (chosen @ model.head.weight - x).detach()


def _table_lookup(model, logits, x):
    return x + model.table(logits.argmax(-1))


# -- choices among tokens ------------------------------------------------------------------------------------------------


def _depth(model, logits, x):
    """Mixture of depths, arXiv 2404.02258: the tokens with the highest of one score each pass through the layer."""
    weights, kept = logits[:, 0].topk(4)
    return x.index_add(0, kept, model.down(model.up(x[kept]).relu()) * weights.sigmoid().unsqueeze(-1))


def _pruned(model, logits, x):
    return x[logits[:, :1].squeeze(-1).topk(4)[1]]


def _queries_of_classes(model, logits, x):
    """A detector's: the tokens that some class scores highest."""
    best = logits.sigmoid().max(-1)[0].topk(4)[1]
    return x[best]


def _tokens_of_each_class(model, logits, x):
    weights, tokens = logits.softmax(-1).topk(3, dim=0)
    return (x[tokens] * weights.unsqueeze(-1)).sum()


DECOYS = {
    _accuracy: "nothing is dispatched",
    _accuracy_in_percent: "nothing is dispatched",
    _accuracy_masked: "nothing is dispatched",
    _accuracy_with_loss: "compared",
    _argmax_accuracy: "nothing is dispatched",
    _prediction: "nothing is dispatched",
    _confidence: "nothing is dispatched",
    _sampled: "the chosen indices are not used",
    _sampled_by_index: "sampling",
    _beams: "not one row of a weight each",
    _loss_of_top: "the chosen indices are not used",
    _unlabelled_left_out: "compared",
    _sparse_autoencoder: "a sparse activation",
    _sparse_autoencoder_by_rows: "nothing is dispatched",
    _winners_take_all: "a sparse activation",
    _winners_take_all_gated: "a sparse activation",
    _nearest_code: "nothing is dispatched",
    _nearest_code_by_one_hot: "a codebook",
    _table_lookup: "nothing is dispatched",
    _depth: "one score a token",
    _pruned: "one score a token",
    _queries_of_classes: "no weight",
    _tokens_of_each_class: "chooses among tokens",
}


@pytest.mark.parametrize("use", DECOYS)
def test_a_decoy_is_told_apart(capture, use) -> None:
    captured = capture(Scored(use), _x())
    assert captured.findings.matches == ()
    assert captured.findings.errors == ()
    assert any(DECOYS[use] in reason for reason in captured.reasons), captured.reasons


def test_a_rectifier_with_a_threshold_is_not_worth_a_word(capture) -> None:
    captured = capture(Scored(_jump_relu), _x())
    assert captured.findings.matches == ()
    assert captured.reasons == []


def test_a_vocabulary_choice_beside_a_router_is_not_taken_for_it(capture) -> None:
    captured = capture(Mixture(lambda model, logits, y: (y, _accuracy(model, model.head(y), y))), _x())
    assert [match.weights["weight"].names for match in _routers(captured)] == [("gate.weight",)]
    assert captured.reasons == ["nothing is dispatched by its choice"]


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


def test_an_index_of_keys_has_no_weight(capture) -> None:
    """DeepSeek-V3.2's indexer: the keys that a light attention scores highest are the only ones attended to."""

    class Indexer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.weigh = nn.Linear(HIDDEN, 4 * 8), nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, 4)

        def forward(self, x):
            scores = torch.einsum("qhd,kd->qhk", self.q(x).unflatten(-1, (4, 8)), self.k(x)).relu()
            index = torch.einsum("qhk,qh->qk", scores, self.weigh(x))
            chosen = index.topk(3)[1]
            return torch.full((T, T), float("-inf")).scatter(-1, chosen, 0.0), x[chosen]

    captured = capture(Indexer(), _x())
    assert _routers(captured) == []
    assert any("no weight" in reason for reason in captured.reasons)


def test_values_alone_are_no_choice(capture) -> None:
    captured = capture(Scored(lambda model, logits, x: logits.topk(1)[0] * 2), _x())
    assert captured.findings.matches == ()
    assert captured.reasons == ["the chosen indices are not used"]


def test_the_position_of_the_largest_token_is_no_choice(capture) -> None:
    """CLIP's text embedding is that of the end-of-text token, which has the largest id."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(FEATURES, HIDDEN)

        def forward(self, ids):
            return self.embed(ids)[torch.arange(ids.shape[0]), ids.argmax(-1)]

    captured = capture(Pooled(), torch.randint(0, FEATURES, (3, 5)))
    assert captured.findings.matches == ()
    assert captured.reasons == []


# -- beside and inside mixtures of experts -------------------------------------------------------------------------------


class Mixture(nn.Module):
    """A top-k router before experts written as sorted groups, with a shared expert behind a gate of one logit."""

    def __init__(self, then=lambda model, logits, y: y) -> None:
        super().__init__()
        self.gate, self.shared_gate = nn.Linear(HIDDEN, E, bias=False), nn.Linear(HIDDEN, 1)
        self.w, self.shared = nn.Parameter(torch.randn(E, HIDDEN, HIDDEN) * 0.1), nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, FEATURES)
        self.then = then

    def forward(self, x):
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1).topk(K)
        experts, order = torch.sort(chosen.reshape(-1))
        y = torch.bmm(self.w[experts], x[order // K].unsqueeze(-1)).squeeze(-1) * weights.reshape(-1)[order].unsqueeze(
            -1
        )
        y = torch.zeros_like(x).index_add(0, order // K, y)
        y = y + self.shared_gate(x).sigmoid() * self.shared(x)
        return self.then(self, logits, y)


def test_sorted_experts_and_the_gate_of_a_shared_one_are_no_routers(capture) -> None:
    captured = capture(Mixture(), _x())
    assert [match.weights["weight"].names for match in _routers(captured)] == [("gate.weight",)]
    assert captured.reasons == []


def _balance(probabilities, chosen):
    counts = functional.one_hot(chosen, E).float().mean(0)
    return (counts * probabilities.mean(0).unsqueeze(0)).sum() * E


@pytest.mark.parametrize("layers", [1, 2])
def test_the_choice_of_an_auxiliary_loss_is_no_router(capture, layers: int) -> None:
    """Of the logits of all layers together, chosen from again: the loss of transformers with ``output_router_logits``."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Mixture(lambda model, logits, y: (y, logits)) for _ in range(layers))

        def forward(self, x):
            every = []
            for layer in self.layers:
                y, logits = layer(x)
                x = x + y
                every.append(logits)
            probabilities = torch.cat(every, dim=0).softmax(-1)
            return x, _balance(probabilities, probabilities.topk(K)[1])

    captured = capture(Model(), _x())
    names = [match.weights["weight"].names for match in _routers(captured)]
    assert names == [(f"layers.{i}.gate.weight",) for i in range(layers)]
    assert any("auxiliary loss" in reason for reason in captured.reasons)


def test_the_choice_of_an_auxiliary_loss_over_the_same_logits_is_no_router(capture) -> None:
    def then(model, logits, y):
        probabilities = logits.softmax(-1)
        return y, _balance(probabilities, probabilities.topk(K)[1])

    captured = capture(Mixture(then), _x())
    (match,) = _routers(captured)
    assert match.anchor.users.keys().isdisjoint(captured.module.graph.find_nodes(op="output"))
    assert captured.reasons == ["nothing is dispatched by its choice"]


def test_an_auxiliary_loss_of_graph_inputs_has_no_weight(capture) -> None:
    """After a graph break the logits of all layers are inputs of another graph."""

    def loss(*logits):
        probabilities = torch.cat(logits).softmax(-1)
        return _balance(probabilities, probabilities.topk(K)[1])

    captured = capture(loss, torch.randn(T, E, requires_grad=True), torch.randn(T, E, requires_grad=True))
    assert captured.findings.matches == ()
    assert captured.reasons[0].startswith("nothing is dispatched by its choice, and its scores lead to no weight")


def test_soft_mixtures_choose_nothing(capture) -> None:
    """Soft MoE, arXiv 2308.00951: every expert gets a mixture of all tokens."""

    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phi = nn.Parameter(torch.randn(HIDDEN, E))
            self.w = nn.Parameter(torch.randn(E, HIDDEN, HIDDEN))

        def forward(self, x):
            logits = x @ self.phi
            slots = logits.softmax(0).T @ x
            return logits.softmax(-1) @ torch.bmm(slots.unsqueeze(1), self.w).squeeze(1)

    captured = capture(Soft(), _x())
    assert _routers(captured) == []


def test_linear_attention_chooses_nothing(capture) -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

        def forward(self, x):
            q, k = self.q(x).softmax(-1), self.k(x).softmax(0)
            return q @ (k.T @ self.v(x))

    assert _routers(capture(Linear(), _x())) == []


def test_product_keys_are_not_one_row_an_expert(capture) -> None:
    """PEER's, arXiv 2407.04153: an expert is a pair of keys, and its score the sum of theirs."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys = nn.Linear(HIDDEN, 2 * E)
            self.down, self.up = nn.Embedding(E * E, HIDDEN), nn.Embedding(E * E, HIDDEN)

        def forward(self, x):
            (first, second), (i, j) = self.keys(x).view(T, 2, E).transpose(0, 1).topk(3)
            scores, best = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(1).topk(K)
            experts = (i.unsqueeze(-1) * E + j.unsqueeze(-2)).flatten(1).gather(-1, best)
            hidden = torch.einsum("td,tkd->tk", x, self.down(experts)).relu() * scores.softmax(-1)
            return torch.einsum("tk,tkd->td", hidden, self.up(experts))

    captured = capture(Pairs(), _x())
    assert _routers(captured) == []
    assert any("chosen from again" in reason for reason in captured.reasons)
