"""Where the queries lead to no weight, keys tell which axis holds heads, and keys that no one projection made have no weight."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.inkling2.modeling_inkling2 import Inkling2BlockAttentionResidual

from foreshock import Watch

HIDDEN, B, S = 32, 2, 6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_keys_repeated_for_queries_behind_a_graph_break(attention: str, kv_heads: int) -> None:
    """JetMoe: experts make the queries, and Dynamo breaks there; the keys are repeated once for each expert of a token."""
    torch._dynamo.reset()
    config = transformers.JetMoeConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_key_value_heads=kv_heads,
        kv_channels=8,
        intermediate_size=HIDDEN,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=16,
    )
    config._attn_implementation = attention
    model = transformers.JetMoeForCausalLM(config).train()
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        torch.compile(model, backend=watch.backend)(torch.randint(0, 16, (B, S))).logits.sum().backward()
        (site,) = [status.site for status in watch.coverage if status.site.kind == "attention"]
    assert (site.heads, site.kv_heads, site.head_dim) == (2 * kv_heads, kv_heads, 8)
    assert site.k_weight is not None
    assert site.k_weight.read_by(2 * kv_heads) == tuple(range(kv_heads)) * 2


class OverLayers(nn.Module):
    """A learned query over the states of several layers, for each token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(16, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.over = Inkling2BlockAttentionResidual(SimpleNamespace(hidden_size=HIDDEN))

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens)
        return self.over(states.unsqueeze(-2), self.layer(states))[0]


def test_states_of_several_layers_are_one_head_and_have_no_key_weight(capture) -> None:
    match = capture(OverLayers(), torch.randint(0, 16, (B, S))).match
    assert (match.facts["heads"], match.facts["kv_heads"], match.facts["head_dim"]) == (1, 1, HIDDEN)
    assert "k_weight" not in match.weights
    assert any("keys that are the values too, and not made by one projection" in note for note in match.notes)
