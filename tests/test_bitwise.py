"""Observation changes nothing: losses, parameters and the random stream are bitwise those of the plain run.

One thread: with more, the plain run itself is not repeatable. ``every=2``, so that both variants of each graph run.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # everybody's name for it
from models import FAMILIES, tokens
from torch import Tensor, nn

import foreshock
from foreshock import Watch, open_run

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 5
SAMPLED = [0, 2, 4]
INNERS = ["eager", "aot_eager", "inductor"]

Loop = Callable[[Any, Any], list[Tensor]]  # (model, compiled model) -> losses


class Block(nn.Module):
    """A model by hand: causal attention with dropout on the probabilities and behind, squared output as loss."""

    def __init__(self, width: int = 16, heads: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x_BSM: Tensor, **_: Any) -> tuple[Tensor, ...]:
        q, k, v = (f(x_BSM).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        dropped = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
        y = F.dropout(self.o(out.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return (y.square().mean(), q, k, out)


def language(**values: Any) -> Callable[[str], Callable[[], nn.Module]]:
    return lambda name: lambda: FAMILIES[name].make(**values).train()


def batches(model: Any) -> Callable[[], dict[str, Tensor]]:
    """The same batches for every model built alike, from a stream of their own."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Block):
        return lambda: {"x_BSM": torch.randn(2, 16, 16, generator=generator)}
    return lambda: tokens(generator)


def loss_of(compiled: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = compiled(**batch)[0]
    return loss


def ordinary(model: Any, compiled: Any) -> list[Tensor]:
    draw, optimizer, losses = batches(model), torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(STEPS):
        loss = loss_of(compiled, draw())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def train(build: Callable[[], nn.Module], loop: Loop, backend: Any, **options: Any) -> dict[str, Tensor]:
    """Losses, parameters and the state of the random stream after training."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(1)
    losses = loop(model, torch.compile(model, backend=backend, **options))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"losses": torch.stack(losses), "random": torch.get_rng_state(), **parameters}


def watched_like_plain(build: Callable[[], nn.Module], loop: Loop, inner: str, **options: Any) -> Watch:
    """Train plainly and watched, compare every bit, and return the closed watch."""
    plain = train(build, loop, inner, **options)
    with Watch(every=2, inner=inner, strict=True, detectors=[]) as watch:
        watched = train(build, loop, watch.backend, **options)
    differing = [name for name, value in plain.items() if not torch.equal(value, watched[name])]
    assert differing == []
    assert watch.coverage.warnings == ()
    assert watch.sites
    return watch


def steps_of(watch: Watch, metric: str) -> list[int]:
    steps, values = watch.series(metric, watch.sites[0].id)
    assert np.isfinite(values).all()
    found: list[int] = steps.tolist()
    return found


QUICK = {(name, inner) for name in ("llama", "gpt2", "olmoe") for inner in ("eager", "aot_eager")} | {
    ("llama", "inductor")
}
CASES = [
    pytest.param(name, inner, marks=() if (name, inner) in QUICK else pytest.mark.slow)
    for name in ("llama", "gpt2", "olmoe")
    for inner in INNERS
]


@pytest.mark.parametrize(("name", "inner"), CASES)
def test_families(name: str, inner: str) -> None:
    """GPT-2 drops out embeddings, probabilities and residuals."""
    layers = {"num_hidden_layers": 1} if inner == "inductor" else {}
    watch = watched_like_plain(language(**layers)(name), ordinary, inner)
    assert steps_of(watch, "law/key_shift") == SAMPLED
    if name == "olmoe":
        (router, *_) = (site for site in watch.sites if site.kind == "router")
        assert watch.series("router/load", router.id)[0].tolist() == SAMPLED


@pytest.mark.parametrize(
    ("name", "inner"),
    [("deepseek_v3", "eager"), ("gpt_oss", "eager"), ("glm4_moe", "eager")]
    + [
        pytest.param(name, inner, marks=pytest.mark.slow)
        for name in ("deepseek_v3", "gpt_oss", "glm4_moe")
        for inner in INNERS
        if inner != "eager"
    ],
)
def test_families_that_write_in_place(name: str, inner: str) -> None:
    """Keys and group masks are filled in place, with results that nobody uses; attention is written out, or MLA."""
    watch = watched_like_plain(language()(name), ordinary, inner)
    assert steps_of(watch, "law/euler") == SAMPLED


@pytest.mark.parametrize("inner", INNERS)
def test_dropout_by_hand(inner: str) -> None:
    assert steps_of(watched_like_plain(Block, ordinary, inner), "law/key_shift") == SAMPLED


def test_dropout_at_work_would_show() -> None:
    """The comparison is sharp: another seed is another run."""
    first = train(Block, ordinary, "aot_eager")
    other = train(Block, lambda model, compiled: (torch.manual_seed(2), ordinary(model, compiled))[1], "aot_eager")
    assert not torch.equal(first["losses"], other["losses"])
    assert not torch.equal(first["random"], other["random"])


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradient_accumulation(inner: str) -> None:
    """Microbatches of one step are one sample: sums add up over them."""

    def loop(model: Any, compiled: Any) -> list[Tensor]:
        draw, optimizer, losses = batches(model), torch.optim.SGD(model.parameters(), lr=1e-1), []
        for _ in range(STEPS):
            for _ in range(3):
                loss = loss_of(compiled, draw()) / 3
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    watch = watched_like_plain(Block, loop, inner)
    assert steps_of(watch, "law/key_shift") == SAMPLED
    (status,) = watch.coverage
    assert (status.evaluations, status.sampled) == (3 * STEPS, 3 * len(SAMPLED))
    assert watch.step == STEPS


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["same-graph", "other-graph"])
def test_evaluations_stay_out_of_the_training_series(inner: str, dropout: float) -> None:
    """Under ``no_grad``, and with gradients on but never asked for; without dropout they share the training graph."""

    def loop(model: Any, compiled: Any) -> list[Tensor]:
        draw, other = batches(model), torch.Generator().manual_seed(9)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for _ in range(STEPS):
            loss = loss_of(compiled, draw())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            unlike = {"x_BSM": 7 * torch.randn(2, 16, 16, generator=other)}
            model.eval()
            with torch.no_grad():
                losses.append(loss_of(compiled, unlike))
            losses.append(loss_of(compiled, unlike).detach())
            model.train()
        return losses

    def build() -> nn.Module:
        return Block(dropout=dropout)

    evaluated = watched_like_plain(build, loop, inner)
    alone = watched_like_plain(build, ordinary, inner)
    assert len(evaluated.sites) == 1
    for metric in ("law/key_shift", "attention/q_rms", "attention/q_absmax", "attention/grad_q_norm"):
        for found, wanted in zip(evaluated.series(metric), alone.series(metric), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert steps_of(evaluated, "attention/entropy") == SAMPLED


def test_two_optimizers_make_one_tick() -> None:
    def loop(model: Any, compiled: Any) -> list[Tensor]:
        draw, losses = batches(model), []
        pairs = ([model.q.weight, model.k.weight], [model.v.weight, model.o.weight])
        optimizers = [torch.optim.AdamW(pairs[0], lr=1e-2), torch.optim.SGD(pairs[1], lr=1e-1, momentum=0.9)]
        for _ in range(STEPS):
            loss = loss_of(compiled, draw())
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    watch = watched_like_plain(Block, loop, "aot_eager")
    assert watch.step == STEPS
    assert steps_of(watch, "law/key_shift") == SAMPLED


@pytest.mark.parametrize("inner", INNERS)
def test_probes_compute_in_fp32_under_autocast(inner: str) -> None:
    """The kernel runs in bf16, the probes on its tensors in fp32: their numbers are those of an fp32 recomputation."""
    kept: list[tuple[Tensor, ...]] = []

    def loop(model: Any, compiled: Any) -> list[Tensor]:
        generator, losses = torch.Generator().manual_seed(3), []
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                loss, *tensors = compiled(torch.randn(1, 16, 16, generator=generator) * 3)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            kept.append(tuple(x.detach() for x in tensors))
        return losses

    watch = watched_like_plain(lambda: Block(dropout=0.0), loop, inner)
    (site,) = watch.sites
    assert site.dtype == "bfloat16"
    for i, step in enumerate(SAMPLED):
        q, k, out = (x.float() for x in kept[STEPS + step])
        logits = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)
        wanted = {
            "attention/q_rms": q.square().mean((0, 2, 3)).sqrt(),
            "attention/out_rms": out.square().mean((0, 2, 3)).sqrt(),
            "attention/lse": logits.logsumexp(-1).mean((0, 2)),  # 16 sampled rows of 16: each of them once
            "attention/logit_max": logits.amax((0, 2, 3)),
        }
        for metric, value in wanted.items():
            np.testing.assert_allclose(watch.series(metric, site.id)[1][i], value.numpy(), rtol=2e-6, err_msg=metric)
    torch.manual_seed(0)
    model = Block(dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, q, k, _ = model(torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(3)) * 3)
    q.retain_grad()
    k.retain_grad()
    loss.backward()
    assert k.grad.dtype == torch.bfloat16
    dq, dk = q.grad.float(), k.grad.float()
    wanted = {
        "law/key_shift": dk.sum(2).norm(dim=-1)[0] / dk.norm(dim=(2, 3))[0],
        "attention/grad_q_norm": dq.norm(dim=(2, 3))[0],
        "attention/grad_k_norm": dk.norm(dim=(2, 3))[0],
    }
    for metric, value in wanted.items():
        np.testing.assert_allclose(watch.series(metric, site.id)[1][0], value.numpy(), rtol=2e-6, err_msg=metric)
    assert watch.series("attention/shadow_rms", site.id)[1].max() < 2.0**-8  # one rounding of the output


@pytest.fixture
def default_watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Watch], Watch]:
    """Make a watch the process-wide one, behind ``backend="foreshock"``."""

    def use(watch: Watch) -> Watch:
        monkeypatch.setattr(sys.modules["foreshock.default"], "_default", watch)
        assert foreshock.default_watch() is watch
        return watch

    return use


@pytest.mark.parametrize(
    "given", [{"mode": "max-autotune"}, {"options": {"max_fusion_size": 1}}], ids=["mode", "options"]
)
def test_the_mode_and_options_of_compile_reach_the_inner_compiler(
    given: dict[str, Any], default_watch: Callable[[Watch], Watch]
) -> None:
    received: list[dict[str, Any]] = []

    def inner(gm: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        received.append(options)
        return gm.forward

    with default_watch(Watch(every=2, inner=inner, strict=True, detectors=[])):
        train(Block, ordinary, "foreshock", **given)
    assert received == [given, given]  # one for each variant


def test_inductor_takes_its_options(default_watch: Callable[[Watch], Watch]) -> None:
    options = {"max_fusion_size": 1, "epilogue_fusion": False}
    plain = train(Block, ordinary, "inductor", options=options)
    with default_watch(Watch(every=2, strict=True, detectors=[])) as watch:
        watched = train(Block, ordinary, "foreshock", options=options)
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert steps_of(watch, "law/key_shift") == SAMPLED


SCRIPT = """
import torch
from test_bitwise import Block, ordinary
torch.manual_seed(0)
model = Block()
ordinary(model, torch.compile(model, backend="foreshock"))
"""


def test_the_backend_by_name_leaves_a_run(tmp_path: Path) -> None:
    settings = {"RUN": str(tmp_path / "run"), "INNER": "aot_eager", "EVERY": "2", "STRICT": "1"}
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **{f"FORESHOCK_{key}": value for key, value in settings.items()}, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, cwd=tmp_path, env=environment, timeout=300)
    with open_run(tmp_path / "run") as run:
        (site,) = run.sites
        assert site.q_weight is not None
        assert site.q_weight.names == ("q.weight",)
        assert run.series("law/key_shift", site.id)[0].tolist() == SAMPLED
        assert run.meta["steps"] == STEPS
        (status,) = run.coverage
        assert (status.evaluations, status.sampled) == (STEPS, len(SAMPLED))
