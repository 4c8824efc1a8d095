"""Weights and sites under their names: exact where the model is bound, the best path that the graph offers where it is not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock import Watch
from foreshock.patterns.graph import module_path

B, S, H, D = 2, 4, 2, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)

    def forward(me, x):  # noqa: N805 - a user may call it anything
        q, k, v = me.qkv(x).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return x + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


class Net(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.breaks = breaks

    def forward(this, x):  # noqa: N805
        x = this.layers[0](x)
        if this.breaks:
            torch._dynamo.graph_break()
        return this.layers[1](x)


net, other = Net(), Net()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def found(run: Callable[[Watch, Tensor], Tensor], bound: nn.Module | None = None) -> list[tuple[str, tuple[str, ...]]]:
    """Each site's name with those of its query weight."""
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        if bound is not None:
            watch.bind(bound)
        run(watch, torch.randn(B, S, H * D)).sum().backward()
        return [(status.site.name, status.site.q_weight.names) for status in watch.coverage if status.site.q_weight]


def decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    return wrapper


class Decorated(Net):
    forward = decorated(Net.forward)


PLAIN = [(f"layers.{i}", (f"layers.{i}.qkv.weight",)) for i in (0, 1)]


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        lambda watch, x: torch.compile(net, backend=watch.backend)(x),
        lambda watch, x: torch.compile(Decorated(), backend=watch.backend)(x),
        lambda watch, x: torch.compile(lambda y: net(y), backend=watch.backend)(x),
        lambda watch, x: torch.compile(lambda model, y: model(y), backend=watch.backend)(net, x),
    ],
    ids=["a module", "a module behind a decorator", "a function of a global", "a function of a module"],
)
def test_the_one_object_that_holds_all_weights_goes_without_saying(run, bound: bool) -> None:
    assert found(run, net if bound else None) == PLAIN


@pytest.mark.parametrize(
    "source",
    [
        "L['self']._modules['layers']._modules['0']._parameters['weight']",
        "L['self'].__dict__['_modules']['layers']._modules['0'].__dict__['_parameters']['weight']",
        "L['self'].layers[0]._parameters['weight']",
    ],
)
def test_every_way_in_which_dynamo_writes_a_path_is_one_name(source: str) -> None:
    assert module_path(source, "L['self']") == "layers.0.weight"


def test_two_models_in_one_graph_keep_their_names() -> None:
    names = found(lambda watch, x: torch.compile(lambda y: net(y) + other(y), backend=watch.backend)(x))
    assert names == [(f"{m}.{name}", (f"{m}.{weight}",)) for m in ("net", "other") for name, (weight,) in PLAIN]


@pytest.mark.parametrize("bound", [False, True])
def test_after_a_graph_break(bound: bool) -> None:
    model = Net(breaks=True)
    names = found(lambda watch, x: torch.compile(model, backend=watch.backend)(x), model if bound else None)
    assert names == PLAIN


def test_layers_compiled_one_by_one_and_bound() -> None:
    model = Net()

    def run(watch: Watch, x: Tensor) -> Tensor:
        for layer in model.layers:
            layer.compile(backend=watch.backend)
        return model(x)

    assert [weights for _, weights in found(run, model)] == [weights for _, weights in PLAIN]


def test_tied_weights_have_the_first_of_their_names() -> None:
    model = Net()
    model.layers[1].qkv.weight = model.layers[0].qkv.weight
    names = found(lambda watch, x: torch.compile(model, backend=watch.backend)(x), model)
    assert {weights for _, weights in names} == {("layers.0.qkv.weight",)}


class Latent(nn.Module):
    """A query and a key through latents with a gain each."""

    def __init__(self) -> None:
        super().__init__()
        for role in "qk":
            self.add_module(f"{role}_a", nn.Linear(H * D, 3, bias=False))
            self.add_module(f"{role}_norm", nn.RMSNorm(3))
            self.add_module(f"{role}_b", nn.Linear(3, H * D, bias=False))
        self.v = nn.Linear(H * D, H * D)

    def forward(self, x):
        q, k = self.q_b(self.q_norm(self.q_a(x))), self.k_b(self.k_norm(self.k_a(x)))
        q, k, v = (y.view(B, S, H, D).transpose(1, 2) for y in (q, k, self.v(x)))
        return x + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


def test_a_graph_that_serves_two_layers_reads_each_layers_own_chain() -> None:
    model = nn.Sequential(Latent(), Latent())
    with Watch(every=1, inner="eager", strict=True, detectors=[]).bind(model) as watch:
        for layer in model:
            layer.compile(backend=watch.backend)
        model(torch.randn(B, S, H * D)).sum().backward()
        sites = [status.site for status in watch.coverage]
    assert [site.name for site in sites] == ["0", "1"]
    for i, site in enumerate(sites):
        for role, view in (("q", site.q_weight), ("k", site.k_weight)):
            assert view is not None
            assert view.names == tuple(f"{i}.{role}_{part}.weight" for part in ("b", "a", "norm"))
            a, b, gain = (getattr(model[i], f"{role}_{part}").weight.detach() for part in ("a", "b", "norm"))
            torch.testing.assert_close(view.factors(), (b.view(H, D, 3) @ (gain[:, None] * a)).mT)
