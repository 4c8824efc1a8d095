"""Gradients of what is made late, or lies like no other operand, come back all the same, and laws hold of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from foreshock import Watch
from foreshock.monitors.laws import floor
from foreshock.patterns import subgraph

H, D, HIDDEN, S = 4, 8, 32, 6
LAWS = ("key_shift", "value_mass", "euler")


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, H * D) for _ in range(3))
        self.latents, self.heads_of_query = nn.Parameter(torch.randn(1, 2, HIDDEN)), nn.Parameter(torch.randn(H, 2, D))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], H, D).transpose(1, 2)


class Pooling(Parts):
    """A learned query for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return sdpa(self.heads(self.q(self.latents)), self.heads(self.k(x)), self.heads(self.v(x)))


class Written(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return (self.heads_of_query @ self.heads(self.k(x)).mT * D**-0.5).softmax(-1) @ self.heads(self.v(x))


class LateKeys(Parts):
    """Keys are made after the query has gone into a pattern of the user's."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.heads(self.q(x)) * 0.25
        return (q @ self.heads(self.k(torch.cat([x, x], 1))).mT).softmax(-1) @ self.heads(self.v(torch.cat([x, x], 1)))


@subgraph("attention", facts={"causal": False, "scale": 0.25})
def scaled_first(q, k, v):
    return {"out": ((q * 0.25) @ k.transpose(-1, -2)).softmax(-1) @ v}


def _trained(model: nn.Module, run: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for size in sizes:
        loss = run(torch.randn(size, S, HIDDEN, generator=generator)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("make", [Pooling, Written])
def test_a_query_that_serves_a_batch(one_thread: None, make: type[Parts], dynamic: bool) -> None:
    _check(make, dynamic, (3, 2, 4) if dynamic else (3, 3, 3))


def test_keys_made_after_the_query_has_entered(one_thread: None) -> None:
    _check(LateKeys, False, (3, 3, 3), scaled_first)


def _check(make: type[Parts], dynamic: bool, sizes: tuple[int, ...], *patterns: object) -> None:
    outcomes = []
    for watched in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = make()
        with Watch(every=1, inner="eager", strict=True, detectors=[], patterns=patterns or None) as watch:
            backend = watch.backend if watched else "eager"
            outcomes.append(_trained(model, torch.compile(model, backend=backend, dynamic=dynamic), sizes))
            if watched:
                (status,) = watch.coverage
                read = {law: watch.series(f"law/{law}")[1] for law in LAWS}
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
    assert status.sampled == len(sizes)
    assert [law for law in LAWS if status.laws[f"law/{law}"]] == []
    for law, values in read.items():
        assert values.shape == (len(sizes), H)
        assert (values < floor(law, "float32")).all(), law
    assert np.isfinite(read["key_shift"]).all()


def test_sizes_that_nothing_early_has_are_told(one_thread: None) -> None:
    """As many keys as a symbol says, which the query lacks."""
    model = LateKeys()
    with Watch(every=1, inner="eager", strict=True, detectors=[], patterns=[scaled_first]) as watch:
        torch.compile(model, backend=watch.backend, dynamic=True)(torch.randn(3, S, HIDDEN)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        (status,) = watch.coverage
    assert any("has sizes that are not known where q enters" in note for note in status.notes)
    assert "not known where q enters" in status.laws["law/key_shift"]
    assert status.laws["law/hull"] == ""


def test_attention_pooling_of_siglip_is_sampled(one_thread: None) -> None:
    config = SiglipVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=H,
        image_size=16,
        patch_size=8,
    )
    model = SiglipVisionModel(config)
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        torch.compile(model, backend=watch.backend)(torch.randn(2, 3, 16, 16)).pooler_output.sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        assert [status.sampled for status in watch.coverage] == [1, 1]
        assert [status.laws["law/key_shift"] for status in watch.coverage] == ["", ""]
