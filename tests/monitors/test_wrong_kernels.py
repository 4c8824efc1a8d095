"""What the laws are for: every correct attention keeps them; each of eleven wrong kernels breaks one and is named a kernel fault.

The kernel (`flash_kernel`) shares nothing with what judges it. Faults, thresholds and steps were chosen on seed 100; the tests
run on `SEED`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from foreshock import Watch
from foreshock.monitors.laws import EXPONENTIAL, GAINS, floor, growth
from foreshock.monitors.mechanisms import KERNEL
from foreshock.monitors.policy import BACKWARD_LAWS, FORWARD_LAWS

SEED = 7
B, S, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 4, 64, 4, 2, 16, 64, 64
LAWS = (*BACKWARD_LAWS, *FORWARD_LAWS)


def _loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


flash_kernel = _loaded("flash_kernel")
CORRECT, Fault = flash_kernel.CORRECT, flash_kernel.Fault
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def third_party(q_BHSh: Tensor, k_BGSh: Tensor, v_BGSh: Tensor) -> Tensor:
    return torch.ops.thirdparty.attend(q_BHSh, k_BGSh, v_BGSh, True, HEAD_DIM**-0.5)[0]


def sdpa(q_BHSh: Tensor, k_BGSh: Tensor, v_BGSh: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q_BHSh, k_BGSh, v_BGSh, is_causal=True, enable_gqa=True)


def written_out(q_BHSh: Tensor, k_BGSh: Tensor, v_BGSh: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k_BGSh, v_BGSh))
    hidden = torch.ones(q_BHSh.shape[2], q_BHSh.shape[2], dtype=torch.bool).triu(1)
    logits = (q_BHSh @ k.mT * HEAD_DIM**-0.5).masked_fill(hidden, float("-inf"))
    return logits.softmax(-1) @ v


class Own(nn.Module):
    """Grouped projections around ``attend``; ``gain`` multiplies the queries."""

    def __init__(self, attend: Attend, gain: float) -> None:
        super().__init__()
        self.attend, self.gain = attend, gain
        self.q, self.o = nn.Linear(WIDTH, HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * HEAD_DIM) for _ in range(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (y(x_BSD).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for y in (self.q, self.k, self.v))
        return self.o(self.attend(q * self.gain, k, v).transpose(1, 2).flatten(2))


class Library(nn.Module):
    """`nn.MultiheadAttention`, which returns its weights or not."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), weights

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.attention(x_BSD, x_BSD, x_BSD, need_weights=self.weights)[0]


class Model(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.attention = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH), attention
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x = self.embed(tokens_BS)
        return self.head(x + self.attention(self.norm(x)))


@pytest.fixture(autouse=True)
def _one_thread_and_a_correct_kernel(one_thread: None) -> Iterator[None]:
    flash_kernel.use(CORRECT)
    yield
    flash_kernel.use(CORRECT)


def _text(step: int, model: nn.Module) -> Tensor:
    return torch.randint(0, VOCABULARY, (B, S + 1))


def watched(
    attention: Callable[[], nn.Module],
    dtype: torch.dtype,
    steps: int,
    learning_rate: float = 1e-2,
    before: Callable[[int, nn.Module], Tensor] = _text,
) -> Watch:
    """A model trained for a few steps; ``before`` each it may be changed, and its tokens are made."""
    torch.manual_seed(SEED)
    model = Model(attention()).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    with Watch(every=1, inner="aot_eager", strict=True, on_alarm=lambda alarm: None) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        for step in range(steps):
            tokens = before(step, model)
            logits = compiled(tokens[:, :-1]).float()
            optimizer.zero_grad()
            functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return watch


def over_floor(watch: Watch, law: str, dtype: torch.dtype) -> float:
    """The largest residual in units of its floor, over heads and steps."""
    (site,) = watch.sites
    residuals = watch.series(law, site.id)[1]
    gains = watch.series(GAINS[law], site.id)[1] if law in GAINS else np.full(residuals.shape, np.nan)
    tops = watch.series("attention/logit_max", site.id)[1].max(-1, keepdims=True)
    limits = floor(law.removeprefix("law/"), str(dtype).removeprefix("torch.")) * growth(
        gains, tops, law in EXPONENTIAL
    )
    return float(np.nanmax(residuals / limits))


# -- correct ones --------------------------------------------------------------------------------------------------------

IMPLEMENTATIONS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "PyTorch's math kernel": (lambda: Own(sdpa, 1.0), SDPBackend.MATH),
    "PyTorch's flash kernel": (lambda: Own(sdpa, 1.0), SDPBackend.FLASH_ATTENTION),
    "a softmax written out": (lambda: Own(written_out, 1.0), None),
    "nn.MultiheadAttention": (lambda: Library(False), None),
    "nn.MultiheadAttention with weights": (lambda: Library(True), None),
    "the third party's kernel": (lambda: Own(third_party, 1.0), None),
    "the third party's kernel, sharp": (lambda: Own(third_party, 12.0), None),
    "PyTorch's flash kernel, saturated": (lambda: Own(sdpa, 100.0), SDPBackend.FLASH_ATTENTION),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_correct_attention_keeps_all_laws(implementation: str, dtype: torch.dtype) -> None:
    attention, backend = IMPLEMENTATIONS[implementation]
    with nullcontext() if backend is None else sdpa_kernel(backend):
        watch = watched(attention, dtype, steps=4)
    (status,) = watch.coverage
    assert {law for law, reason in status.laws.items() if not reason} >= set(LAWS)
    for law in LAWS:
        assert over_floor(watch, law, dtype) < 0.5, law
    assert watch.alarms == []


def _one_token(step: int, model: nn.Module) -> Tensor:
    return torch.full((B, S + 1), 5)


def _corrupted(step: int, model: nn.Module) -> Tensor:
    with torch.no_grad():
        model.attention.q.weight.mul_(1.0 if step < 2 else 30.0)
        model.attention.v.weight[3].fill_(1.0 if step < 2 else 1e4)
    return _text(step, model)


OTHERS: dict[str, dict[str, Any]] = {
    "a learning rate ten thousand times too large": {"learning_rate": 1e2},
    "one token for ever": {"before": _one_token},
    "corrupted weights": {"before": _corrupted},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attend", [sdpa, third_party])
@pytest.mark.parametrize("fault", OTHERS)
def test_no_law_breaks_for_what_is_no_kernels_fault(fault: str, attend: Attend, dtype: torch.dtype) -> None:
    watch = watched(lambda: Own(attend, 1.0), dtype, steps=6, **OTHERS[fault])
    assert {alarm.metric for alarm in watch.alarms if alarm.metric.startswith("law/")} == set()
    assert not {alarm.mechanism for alarm in watch.alarms} & set(KERNEL)


# -- wrong ones ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A fault, every law that it breaks (in float32, where nothing hides it) and why no other sees it."""

    fault: Any
    breaks: frozenset[str]
    why: str
    gain: float = 1.0


def _case(breaks: str, why: str, gain: float = 1.0, **fault: Any) -> Case:
    return Case(Fault(**fault), frozenset(f"law/{law}" for law in breaks.split()), why, gain)


CASES = {
    "wrong D": _case("key_shift", "rows of dS sum to D, not to zero; dQ and dK share that dS", delta=0.0),
    "truncated P": _case("key_shift value_mass shadow", "rows sum to less than one, forward and backward", p_bits=3),
    "dropped last key block": _case("shadow", "a legal attention over fewer keys, with its own gradient", blocks_lost=1),
    "stale logsumexp": _case("value_mass", "each row of P and of dS is multiplied by a number: dS still sums to 0", stale=True),
    "off-by-one causal mask": _case("shadow", "a legal attention with another mask", ahead=1),
    "quantised K": _case("euler shadow", "dQ is made with another K than the one that dK belongs to", k_bits=2),
    "transposed heads": _case("shadow", "legal; the laws of keys and values sum over both heads", heads_swapped=True),
    "fp16 overflow clamp": _case("shadow", "legal: the softmax of logits cut off at 11.09", gain=12.0, exp_clamp=65504.0),
    "missing scale in dK": _case("euler", "zero times any scale is zero", dk_scale=HEAD_DIM**0.5),
    "one flipped bit in dV": _case("value_mass", "an exponent bit of one entry, in dV alone", flipped=30),
    "missing division": _case("hull shadow key_shift", "O is a sum of values and no mean; D is made from it", normalised=False),
}  # fmt: skip
by_case = pytest.mark.parametrize("name", CASES)


def _run(name: str, dtype: torch.dtype, steps: int) -> Watch:
    case = CASES[name]
    flash_kernel.use(case.fault)
    return watched(lambda: Own(third_party, case.gain), dtype, steps)


@by_case
def test_a_wrong_kernel_breaks_the_laws_that_algebra_says_and_no_other(name: str) -> None:
    watch = _run(name, torch.float32, steps=4)
    assert {law for law in LAWS if over_floor(watch, law, torch.float32) > 1} == CASES[name].breaks
    _is_named(watch)


@by_case
def test_a_wrong_kernel_in_half_precision_is_heard(name: str) -> None:
    _is_named(_run(name, torch.bfloat16, steps=12))  # law/bias wants 8 samples


def _is_named(watch: Watch) -> None:
    assert watch.alarms
    assert {alarm.mechanism for alarm in watch.alarms} <= set(KERNEL)
    assert all(alarm.metric.startswith("law/") for alarm in watch.alarms)
    assert all(alarm.severity == "critical" for alarm in watch.alarms)
