"""One set of weights in attentions that take their keys in different numbers of heads: sites of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as diffusion
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig

from foreshock import Watch

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, S = 32, 4, 2, 8, 6


class Tied(nn.Module):
    """An encoder's attention without a mask, and the decoder's over the same weights with one, where transformers repeats keys."""

    def __init__(self) -> None:
        super().__init__()
        config = DiffusionGemmaTextConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=2,  # the last is full, with heads of another size
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            layer_types=["sliding_attention", "full_attention"],
        )
        config._attn_implementation = "sdpa"
        self.encoder = diffusion.DiffusionGemmaEncoderTextAttention(config, 0)
        self.decoder = diffusion.DiffusionGemmaEncoderTextAttention(config, 0)
        for name, module in self.encoder.named_children():
            if getattr(module, "weight", None) is not None:
                getattr(self.decoder, name).weight = module.weight

    def forward(self, x: Tensor) -> Tensor:
        turn = torch.ones(1, S, HEAD_DIM), torch.zeros(1, S, HEAD_DIM)
        x = x + self.encoder(x, turn, None)[0]
        return self.decoder(x, turn, torch.zeros(x.shape[0], 1, S, S))[0]


@pytest.mark.parametrize("steps", [1, 2])
def test_attentions_that_take_keys_in_other_numbers_of_heads_are_apart(one_thread: None, steps: int) -> None:
    model = Tied().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        run = torch.compile(model, backend=watch.backend)
        for _ in range(steps):
            run(torch.randn(2, S, HIDDEN)).square().mean().backward()
            optimizer.step()
        sites = [status.site for status in watch.coverage]
        norms = [watch.series("law/key_shift", site.id)[1] for site in sites]
        assert [status.sampled for status in watch.coverage] == [steps, steps]
    assert [(site.heads, site.kv_heads) for site in sites] == [(HEADS, KV_HEADS)] * 2
    assert {site.k_weight.names for site in sites} == {("encoder.k_proj.weight", "encoder.k_norm.weight")}
    assert [values.shape for values in norms] == [(steps, KV_HEADS), (steps, HEADS)]
