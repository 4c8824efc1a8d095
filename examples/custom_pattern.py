"""Watch what foreshock does not know by itself: own kernels, own forms, an own kind of site. Seconds on a CPU, no network.

A small model with an opaque attention kernel, an opaque router kernel, a gated head and RMS norms of its own; foreshock is told
of each in a few lines. docs/patterns.md explains them one by one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody writes it

import foreshock
from foreshock.monitors import Drift, Limit, Limits, Metric, Trend, register_metrics
from foreshock.patterns import ANY, attention_op, maybe, router_op, subgraph

# -- the model, which knows nothing of foreshock ----------------------------------------------------------------------------

HIDDEN, HEADS, EXPERTS, TOP_K, VOCABULARY = 32, 4, 4, 2, 64


@torch.library.custom_op("mylib::attend", mutates_args=())
def attend(queries: Tensor, keys: Tensor, values: Tensor, softmax_scale: float, is_causal: bool = True) -> Tensor:
    """Stands for a kernel from elsewhere; tensors are [B, S, H, h]."""
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=softmax_scale)
    return out.transpose(1, 2).contiguous()


@attend.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, softmax_scale: float, is_causal: bool = True) -> Tensor:
    return torch.empty_like(queries, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx, grad):
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=ctx.causal, scale=ctx.scale).transpose(1, 2)
        return *torch.autograd.grad(out, leaves, grad), None, None


attend.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("mylib::route", mutates_args=())
def route(gate_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Stands for a fused softmax and top-k: the gates and the chosen experts, each [T, k]."""
    gates, chosen = gate_logits.softmax(-1).topk(k)
    return gates.clone(), chosen.clone()


@route.register_fake
def _(gate_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*gate_logits.shape[:-1], k)
    return gate_logits.new_empty(shape), gate_logits.new_empty(shape, dtype=torch.long)


def _save_choice(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])


def _backward_choice(ctx, grad, _):
    logits, chosen = ctx.saved_tensors
    p = logits.softmax(-1)
    full = torch.zeros_like(p).scatter(-1, chosen, grad)
    return p * (full - (p * full).sum(-1, keepdim=True)), None


route.register_autograd(_backward_choice, setup_context=_save_choice)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)) for p in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, q.shape[-1] ** -0.5).flatten(-2))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        gates, chosen = route(self.gate(tokens), TOP_K)
        made = torch.einsum("td,tkdf->tkf", tokens, self.up[chosen])
        return (F.silu(made) * gates.unsqueeze(-1)).sum(1).view_as(x)


class GatedHead(nn.Module):
    """A form of its own: one product of queries and keys, capped, and a gate on what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.tanh(self.q(x) @ self.k(x).mT / 20.0)
        return (scores @ self.v(x)) * torch.sigmoid(self.g(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.parts = nn.ModuleList([Attention(), Experts(), GatedHead()])
        self.norms = nn.ModuleList([Norm() for _ in self.parts])
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x))
        return self.head(x)


# -- (a), (b): opaque kernels, described by the roles of their arguments ----------------------------------------------------

ATTEND = attention_op(
    "mylib::attend",
    q="queries",
    k="keys",
    v="values",
    output=None,
    layout="BSHD",
    causal="is_causal",
    scale="softmax_scale",
)
ROUTE = router_op("mylib::route", logits="gate_logits", indices=1, scoring="softmax")

# -- (c), (d): a form shown as a function, and with it an own kind of site and what is measured there -----------------------


@subgraph("gated", facts=lambda at: {"channels": at["v"].shape[-1]}, tapped="scores")
def gated_product(q, k, v, gate, *, cap=ANY):
    scores = torch.tanh(q @ k.transpose(-2, -1) / cap)
    return {"scores": scores, "out": torch.sigmoid(gate) * (scores @ v)}


@subgraph("norm", facts=lambda at: {"channels": at["x"].shape[-1]}, weights=("weight",), tapped="x")
def rms_norm(x, weight, *, eps=ANY):
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return {"out": maybe(lambda y: y.to(x.dtype), normed) * weight}


def saturation(facts, tensors, rows):
    scores = tensors["scores"].float().abs()
    return {"saturated": (scores > 0.95).sum(), "count": torch.ones_like(scores).sum()}


GATED = foreshock.Probe(
    name="gated",
    kind="gated",
    forward=saturation,
    finish=lambda facts, q: {"gated/saturated": q["saturated"] / q["count"]},
)


def norm_forward(facts, tensors, rows):
    x = tensors["x"].float()
    return {
        "square": x.square().sum(),
        "count": torch.ones_like(x).sum(),
        "absmax": x.abs().amax(),
        "nonfinite": (~torch.isfinite(x)).sum(),
    }


def norm_backward(facts, tensors, gradients):
    return {"grad_square": gradients["x"].float().square().sum()}


def norm_finish(facts, q):
    found = {}
    if "square" in q:  # of the forward passes
        found |= {
            "norm/input_rms": np.sqrt(q["square"] / q["count"]),
            "norm/input_absmax": q["absmax"],
            "norm/nonfinite": q["nonfinite"],
        }
    if "grad_square" in q:  # of the backward passes
        found["norm/grad_norm"] = np.sqrt(q["grad_square"])
    return found


NORM = foreshock.Probe(
    name="norm",
    kind="norm",
    forward=norm_forward,
    backward=norm_backward,
    finish=norm_finish,
    maxima=frozenset({"absmax"}),
)

register_metrics(
    Metric(
        "norm/input_rms", "rms of the input", "", "scalar", "ratio", "own", "Growth: the residual stream runs away."
    ),
    Metric("norm/input_absmax", "max |input|", "", "scalar", "max", "own", "Outliers of the residual stream."),
    Metric("norm/nonfinite", "count of NaN and infinity", "count", "scalar", "sum", "own", "Above zero: a fault now."),
    Metric(
        "norm/grad_norm", "norm of the input's gradient", "", "scalar", "ratio", "own", "A rise points at this place."
    ),
    Metric(
        "gated/saturated",
        "share of |scores| above 0.95",
        "",
        "scalar",
        "ratio",
        "own",
        "A rise: no gradient passes tanh.",
    ),
)
DETECTORS = (
    Limits([Limit("norm/nonfinite", 0, 1, "NaN or infinity is a fault at once")]),
    Drift([Trend("norm/input_rms", "mean", "log", np.log(1.5), (+1,), "growth of the residual stream")]),
)


def main(run: str | None = None, steps: int = 12) -> foreshock.Watch:
    """Train for a few steps; returns the closed watch. ``run``: a folder to write to."""
    torch.manual_seed(0)
    model = Model()
    watch = foreshock.Watch(
        run,
        every=1,
        inner="eager",
        patterns=[ATTEND, ROUTE, gated_product, rms_norm],
        probes=[GATED, NORM],
        detectors=DETECTORS,
    )
    watch.bind(model)
    with watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(steps):
            tokens = torch.randint(VOCABULARY, (4, 16))
            loss = F.cross_entropy(compiled(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.log(loss=loss)
    return watch


def show(watch: foreshock.Watch) -> None:
    print("The ledger:")
    for status in watch.coverage:
        site = status.site
        weights = [view.names[0] for view in (site.q_weight, site.weight, *site.weights.values()) if view is not None]
        print(
            f"  {site.kind:9} {site.name:10} by `{site.pattern}`, {status.sampled} sampled; weights: {', '.join(weights) or '-'}"
        )
    for line in (*watch.coverage.unmatched, *watch.coverage.warnings):
        print(f"  left out: {line}")
    for metric in (
        "attention/entropy_norm",
        "router/entropy_norm",
        "gated/saturated",
        "norm/input_rms",
        "norm/grad_norm",
    ):
        site = next(site.id for site in watch.sites if site.kind == metric.partition("/")[0])
        steps, values = watch.series(metric, site)
        means = values.reshape(len(steps), -1).mean(1)
        print(f"{metric} at {site}: {means[0]:.4f} at step {steps[0]}, {means[-1]:.4f} at step {steps[-1]}")


if __name__ == "__main__":
    show(main())
