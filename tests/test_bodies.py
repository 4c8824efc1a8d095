"""Sites inside the bodies that Dynamo calls: checkpointed blocks, nested compile regions, autograd functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from foreshock import Coverage, Watch
from foreshock.monitors.attention_probe import ATTENTION

D, H = 16, 2


def attend(x: Tensor, qkv: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in functional.linear(x, qkv, bias).chunk(3, -1))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + functional.linear(y.transpose(1, 2).flatten(2), out)


@torch.compiler.nested_compile_region
def nested(x: Tensor, qkv: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    return attend(x, qkv, bias, out)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, how: Callable[..., Tensor] = attend) -> Tensor:
        return functional.dropout(how(x, self.qkv.weight, self.qkv.bias, self.out.weight), 0.1, self.training)


class Stack(nn.Module):
    def __init__(self, how: str, layers: int = 3) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.how == "checkpoint":
                x = checkpoint(layer, x, use_reentrant=False)
            elif self.how == "checkpoint in checkpoint":
                x = checkpoint(lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False), x, use_reentrant=False)
            else:
                x = layer(x, nested)
        return x.square().mean()


def _train(how: str, inner: str, watched: bool, steps: int = 3) -> tuple[list[Tensor], Coverage | None, list[str]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Stack(how)
    watch = Watch(every=1, inner=inner, strict=True, detectors=[]).bind(model) if watched else None
    compiled = torch.compile(model, backend=watch.backend if watch else inner, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = compiled(torch.randn(2, 6, D).requires_grad_())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    numbers = [*losses, *(p.detach() for p in model.parameters())]
    if watch is None:
        return numbers, None, []
    metrics = watch.metrics()
    series = [watch.series("law/key_shift", site.id)[1] for site in watch.sites]
    assert all(len(values) == steps and (values < 1e-5).all() for values in series)
    watch.close()
    return numbers, watch.coverage, metrics


@pytest.mark.parametrize(
    ("how", "inner"),
    [
        ("checkpoint", "eager"),
        ("checkpoint", "inductor"),
        ("checkpoint in checkpoint", "aot_eager"),
        ("nested", "aot_eager"),
        ("nested", "inductor"),
    ],
)
def test_every_layer_is_a_site_and_training_is_bitwise_the_same(one_thread, how: str, inner: str) -> None:
    plain, _, _ = _train(how, inner, watched=False)
    watched, coverage, metrics = _train(how, inner, watched=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert coverage is not None
    assert coverage.unmatched == coverage.warnings == ()
    assert [status.site.q_weight.names for status in coverage] == [(f"layers.{i}.qkv.weight",) for i in range(3)]
    assert [(status.evaluations, status.sampled) for status in coverage] == [(3, 3)] * 3
    assert {"law/key_shift", "attention/entropy", "attention/grad_q_norm"} <= set(metrics)


class Written(torch.autograd.Function):
    """Attention with a backward of its own, on ``[B, S, H, h]``; ``fault`` scales dS by one row's worth of error."""

    @staticmethod
    def forward(ctx, q, k, v, fault):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        out = p @ v
        ctx.save_for_backward(q, k, v, p, out)
        ctx.fault = fault
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, p, out = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        delta = (grad * out).sum(-1, keepdim=True) * (1 + ctx.fault)
        ds = p * (grad @ v.transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
        gradients = (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad)
        return (*(x.transpose(1, 2) for x in gradients), None)


class OwnBackward(nn.Module):
    def __init__(self, fault: float) -> None:
        super().__init__()
        self.qkv, self.fault = nn.Linear(D, 3 * D), fault

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, -1)) for y in self.qkv(x).chunk(3, -1))
        return Written.apply(q, k, v, self.fault).flatten(2).square().mean()


def _own_backward(inner: str, fault: float) -> tuple[float, Tensor, Coverage]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = OwnBackward(fault)
    with Watch(every=1, inner=inner, strict=True, detectors=[]).bind(model) as watch:
        torch.compile(model, backend=watch.backend, fullgraph=True)(torch.randn(2, 6, D)).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        residual = watch.series("law/key_shift")[1].max()
    return float(residual), model.qkv.weight.grad, watch.coverage


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_function_with_its_own_backward_is_judged_from_outside(one_thread, inner: str) -> None:
    healthy, gradient, coverage = _own_backward(inner, 0.0)
    faulty, _, _ = _own_backward(inner, 1e-2)
    assert healthy < 1e-5
    assert faulty > 1e-4
    (status,) = coverage
    assert coverage.unmatched == coverage.warnings == ()
    assert status.site.q_weight.names == ("qkv.weight",)
    torch.manual_seed(0)
    model = OwnBackward(0.0)
    model(torch.randn(2, 6, D)).backward()
    torch.testing.assert_close(gradient, model.qkv.weight.grad)


def test_what_stands_in_a_branch_is_named(one_thread) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.block(x), lambda x: x + 1, (x,)).square().mean()

    with Watch(every=1, inner="aot_eager", strict=True, detectors=[]) as watch:
        torch.compile(Branch().eval(), backend=watch.backend)(torch.randn(2, 6, D)).backward()
    (miss,) = watch.coverage.unmatched
    assert "scaled_dot_product_attention inside `cond`, which is not followed" in miss


class Mixed(nn.Module):
    """A block in line, and one checkpointed on a shorter sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inline, self.body = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, self.inline(x)[:, 1:], use_reentrant=False).square().mean()


def test_a_probe_that_fails_inside_a_body_leaves_the_rest(one_thread) -> None:
    """The body is called with what it takes, though it has nothing to return."""

    def fails_on_five(facts, tensors, rows):
        if tensors["q"].shape[2] == 5:
            raise ValueError("no statistics today")
        return ATTENTION.forward(facts, tensors, rows)

    probe = replace(ATTENTION, forward=fails_on_five, backward=None)
    torch._dynamo.reset()
    model = Mixed()
    with Watch(every=1, inner="aot_eager", detectors=[], probes=[probe]).bind(model) as watch:
        torch.compile(model, backend=watch.backend, fullgraph=True)(torch.randn(2, 6, D)).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        (warning,) = watch.coverage.warnings
        steps, _ = watch.series("attention/q_rms", "attention:inline")
        assert watch.collector.store.sites_of("attention/q_rms") == ["attention:inline"]
    assert "no statistics today" in warning
    assert steps.tolist() == [0]
