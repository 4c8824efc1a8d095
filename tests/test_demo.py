"""The demo's kernel is a correct attention until it is told otherwise; its model is one graph; watching it changes no bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # everybody's name for it
from torch import Tensor

import foreshock
from foreshock.demo import driver, kernel
from foreshock.demo.data import standard_library
from foreshock.demo.departure import departure
from foreshock.demo.kernel import Fault, Rounding
from foreshock.demo.model import Config, Transformer
from foreshock.demo.train import Ramp
from foreshock.monitors.mechanisms import TABLE

SCALE = 0.25


@pytest.fixture(autouse=True)
def _healthy_again():
    yield
    kernel.set_fault(kernel.HEALTHY)


def inputs(length: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(4, heads, length, 16, generator=generator).bfloat16() for heads in (4, 2, 2, 4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def run_kernel(fault: Fault = kernel.HEALTHY) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, dout = inputs()
    kernel.set_fault(fault)
    out, _ = kernel.attention(q, k, v, True, SCALE)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm().detach() / wanted.float().norm().detach())


def key_shift(dk_BGSh: Tensor) -> float:
    """How far the key gradients are from summing to zero over the keys, as a correct softmax makes them."""
    dk = dk_BGSh.float()
    return float(dk.sum(2).norm() / dk.norm())


def test_kernel_is_attention():
    q, k, v, dout = inputs()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    wanted = (out, *torch.autograd.grad(out, (q, k, v), dout))
    assert all(error(a, b) < 6e-3 for a, b in zip(run_kernel(), wanted, strict=True))


def test_kernel_returns_the_row_logsumexp():
    q, k, v, _ = (x.detach() for x in inputs())
    _, lse = kernel.attention(q, k, v, False, SCALE)
    logits = q.float() @ k.float().repeat_interleave(2, 1).mT * SCALE
    torch.testing.assert_close(lse, logits.logsumexp(-1))


def test_kernel_is_a_well_behaved_op():
    q, k, v, _ = inputs(8)
    torch.library.opcheck(torch.ops.flashlite.attention.default, (q, k, v, True, SCALE))


@pytest.mark.parametrize(
    ("rounding", "value", "wanted"),
    [
        (Rounding(0), 1.01, 2.0),
        (Rounding(0), -1.01, -2.0),
        (Rounding(1), 1.01, 1.5),
        (Rounding(1), 0.75, 0.75),
        (Rounding(1, away=False), -1.99, -1.5),
    ],
)
def test_rounding(rounding, value, wanted):
    assert rounding(torch.tensor([value])).item() == wanted


def test_a_correct_kernel_obeys_the_key_law_and_a_biased_one_does_not():
    healthy = key_shift(run_kernel()[2])
    three, one, zero = (key_shift(run_kernel(Fault(out=Rounding(bits)))[2]) for bits in (3, 1, 0))
    assert healthy < 6e-3
    assert 5 * healthy < three < one < zero


def test_a_backward_fault_leaves_the_output_alone():
    healthy, faulty = run_kernel(), run_kernel(Fault(delta=Rounding(0)))
    assert torch.equal(healthy[0], faulty[0])
    assert torch.equal(healthy[3], faulty[3])
    assert key_shift(faulty[2]) > 30 * key_shift(healthy[2])


def test_a_fault_in_one_layer_spares_the_other():
    healthy = run_kernel()[0]
    kernel.set_fault(Fault(out=Rounding(0), layer=1, layers=2))
    q, k, v, _ = inputs()
    first, _ = kernel.attention(q, k, v, True, SCALE)
    second, _ = kernel.attention(q, k, v, True, SCALE)
    assert torch.equal(first, healthy)
    assert not torch.equal(second, healthy)


def test_the_model_is_one_graph():
    torch.compiler.reset()
    model, tokens = Transformer(Config()), torch.zeros(2, 65, dtype=torch.long)
    report = torch._dynamo.explain(model)(tokens)
    assert (report.graph_count, report.graph_break_count) == (1, 0)


@pytest.mark.parametrize("sdpa", [False, True])
def test_compiled_model_trains_like_eager(sdpa):
    torch.manual_seed(0)
    model, tokens = Transformer(Config(sdpa=sdpa)), torch.randint(256, (2, 65))
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss, balance = run(tokens)
        gradients.append(torch.autograd.grad(loss + balance, list(model.parameters())))
    assert all(error(a, b) < 2e-2 for a, b in zip(*gradients, strict=True))


def test_batches_repeat_for_a_seed():
    corpus = standard_library(cap=10_000)
    first, again, other = (next(corpus.batches(seed, 8, 65)) for seed in (1, 1, 2))
    assert first.shape == (8, 65)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_ramp():
    ramp = Ramp(peak=16, steps=4)
    assert [ramp(since) for since in (-3, 0, 1, 4, 9)] == [1, 1, 2, 16, 16]


def test_departure_is_the_last_crossing():
    healthy = [1.0] * 100
    bump = [1.0] * 20 + [1.5] * 5 + [1.0] * 35 + [1.5] * 40
    assert departure(bump, healthy, window=1, margin=0.1) == 60
    assert departure(bump, healthy, window=5, margin=0.1) == 61  # two of five steps are needed: 0.2 > 0.1
    assert departure(bump[:60], healthy[:60], window=5, margin=0.1) is None
    assert departure([1.0] * 90 + [float("nan")] * 10, healthy, window=5, margin=0.1) == 90


def test_watching_changes_no_bit(tmp_path: Path):
    saved = []
    for backend in ("inductor", "foreshock"):
        file = tmp_path / f"{backend}.pt"
        flags = ["--backend", backend, "--steps", "12", "--at", "6", "--fault", "attention", "--save", str(file)]
        subprocess.run([sys.executable, "-m", "foreshock.demo.train", *flags], check=True, cwd=tmp_path)
        saved.append(torch.load(file, weights_only=True))
    plain, watched = saved
    assert torch.equal(plain["losses"], watched["losses"])
    assert plain["parameters"].keys() == watched["parameters"].keys()
    assert all(torch.equal(value, watched["parameters"][name]) for name, value in plain["parameters"].items())


def test_in_time_wants_the_right_mechanism_between_fault_and_departure() -> None:
    def alarm(step: int, mechanism: str = "a") -> foreshock.Alarm:
        return foreshock.Alarm(step, step, None, "m", 1.0, "", "warning", mechanism, (), "")

    assert driver._in_time([alarm(410)], "a", 400, 500)
    assert driver._in_time([alarm(410), alarm(450, "b")], "a", 400, None)
    assert not driver._in_time([], "a", 400, 500)
    assert not driver._in_time([alarm(390), alarm(410)], "a", 400, 500)
    assert not driver._in_time([alarm(500)], "a", 400, 500)
    assert not driver._in_time([alarm(410, "b"), alarm(420)], "a", 400, 500)


def test_every_shown_fault_has_an_expected_mechanism_that_the_diagnosis_knows() -> None:
    known = {row.mechanism for row in TABLE}
    assert set(driver.FULL.faults) | set(driver.QUICK.faults) <= set(driver.EXPECTED)
    assert set(driver.EXPECTED.values()) <= known
