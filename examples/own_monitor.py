"""Measure what foreshock does not: a probe beside the built-in one, a monitor of weights, and a law. Seconds on a CPU, no network.

docs/monitors.md explains them one by one. ``python examples/own_monitor.py`` trains a small attention with a correct kernel and
with one whose backward gives each key the value gradient of its neighbour, which no built-in law sees.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import foreshock
from foreshock.monitors import Limit, Limits, Metric, register_metrics
from foreshock.patterns import attention_op

# -- a probe: how heavy the tails of the queries are ------------------------------------------------------------------------


def tails(facts, tensors, rows):
    q = tensors["q"].float()
    return {"second": q.square().mean(), "fourth": q.pow(4).mean(), "calls": torch.ones(())}


TAILS = foreshock.Probe(
    name="tails",
    kind="attention",
    forward=tails,
    finish=lambda facts, q: {"attention/q_kurtosis": q["fourth"] * q["calls"] / q["second"] ** 2},
)

# -- a monitor of weights: the largest logit that two inputs of rms 1 could make --------------------------------------------


class LogitBound:
    def update(self, step, sites):
        found = []
        for site in sites:
            if site.q_weight is None or site.k_weight is None or site.q_weight.resolve() is None:
                continue
            q, k = site.q_weight.factors().float(), site.k_weight.factors().float()
            k = k[list(site.k_weight.read_by(site.heads))]
            gain = torch.linalg.matrix_norm(torch.linalg.qr(q).R @ torch.linalg.qr(k).R.mT, ord=2)
            found.append(foreshock.Reading("attention/logit_bound", site.id, (site.scale * q.shape[1] * gain).numpy()))
        return found


# -- a law: the output is linear in the values, so sum <v, dV> = sum <out, dO> ----------------------------------------------


def value_sums(facts, tensors, gradients):
    by_values, by_output = ((tensors[role] * gradients[role]).float() for role in ("v", "out"))
    size = by_values.square().sum() + by_output.square().sum()
    return {"difference": by_values.sum() - by_output.sum(), "size": size}


VALUE_EULER = foreshock.Probe(
    name="value euler",
    kind="attention",
    forward=None,
    backward=value_sums,
    finish=lambda facts, q: {"law/value_euler": np.abs(q["difference"]) / np.sqrt(q["size"])},
)
FLOOR = Limits([Limit("law/value_euler", 1024 * 2**-24, 2, "the output is linear in the values")])  # of float32

# -- what they mean, for `foreshock report` ---------------------------------------------------------------------------------

register_metrics(
    Metric(
        "attention/q_kurtosis", "mean q^4 / (mean q^2)^2", "", "scalar", "ratio", "own", "Growth: outlier channels."
    ),
    Metric(
        "attention/logit_bound",
        "scale d sigma_max(W_q W_k^T)",
        "",
        "heads",
        "none",
        "own",
        "Growth ahead of logit_max: the weights allow what the data has not met yet.",
        cost="weights",
    ),
    Metric(
        "law/value_euler",
        "|sum <v, dV> - sum <out, dO>| / sqrt(sum of squared terms)",
        "",
        "scalar",
        "ratio",
        "own",
        "Above its floor dV is not that of this output.",
        cost="gradients",
    ),
)

# -- a model to try them on -------------------------------------------------------------------------------------------------


class Neighbour(torch.autograd.Function):
    """Keys whose gradient goes to the next position: the sum over positions stays as it is."""

    @staticmethod
    def forward(ctx, v: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.roll(1, 2)


@torch.library.custom_op("own::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, faulty: bool) -> Tensor:
    """Stands for a kernel from elsewhere; tensors are [B, H, S, h]."""
    return nn.functional.scaled_dot_product_attention(q, k, v)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, faulty: bool) -> Tensor:
    return torch.empty_like(q)


def _save(ctx, inputs, output):
    *tensors, ctx.faulty = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        values = Neighbour.apply(v) if ctx.faulty else v
        out = nn.functional.scaled_dot_product_attention(q, k, values)
        return *torch.autograd.grad(out, (q, k, v), grad), None


attend.register_autograd(_backward, setup_context=_save)
ATTEND = attention_op("own::attend", q="q", k="k", v="v", output=None, layout="BHSD", causal=False)


class Model(nn.Module):
    def __init__(self, faulty: bool = False) -> None:
        super().__init__()
        self.faulty = faulty
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y(x).unflatten(-1, (4, 8)).transpose(1, 2) for y in (self.q, self.k, self.v))
        return x + self.o(attend(q, k, v, self.faulty).transpose(1, 2).flatten(2))


def main(faulty: bool = False, steps: int = 8, inner: str = "eager") -> foreshock.Watch:
    """Train for a few steps; returns the closed watch."""
    torch.manual_seed(0)
    model = Model(faulty)
    watch = foreshock.Watch(
        every=1,
        inner=inner,
        patterns=[ATTEND],
        probes=[TAILS, VALUE_EULER],
        monitors=[LogitBound()],
        detectors=[FLOOR],
    )
    with watch.bind(model):
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            compiled(torch.randn(4, 16, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watch


def show(watch: foreshock.Watch) -> None:
    for metric in ("attention/entropy", "attention/q_kurtosis", "attention/logit_bound", "law/value_euler"):
        print(f"  {metric}: {np.round(watch.series(metric)[1][-1], 9)}")
    for alarm in watch.alarms:
        print(f"  alarm at step {alarm.step}: {alarm.message}")


if __name__ == "__main__":
    for faulty in (False, True):
        print("a faulty kernel:" if faulty else "a correct kernel:")
        show(main(faulty))
