"""References by step and by tokens, recorded at another pace, with less than the run has, and beyond their end."""

from __future__ import annotations

import json

import numpy as np
import pytest

from foreshock.errors import ConfigError
from foreshock.monitors import Drift
from foreshock.monitors.policy import Trend
from foreshock.records import Array, Reading

LOSS = Trend("run/loss", "mean", "linear", 0.4, (+1,), "test")
TREND = (LOSS, Trend("attention/logit_max", "max", "linear", 4.0, (+1,), "test"))


def loss(tokens: Array, seed: int) -> Array:
    """Falls with what was read, not with the steps it took."""
    return 2 + 3 / (1 + tokens / 20_000) + 0.02 * np.random.default_rng(seed).standard_normal(len(tokens))


class Reference:
    """A run of ``batch`` tokens a step, sampled ``every`` so many steps."""

    def __init__(
        self, seed: int, every: int = 10, batch: int = 100, steps: int = 2000, more: dict | None = None
    ) -> None:
        self.steps = np.arange(0, steps, every)
        self.found = {
            ("run/tokens", None): self.steps * batch * 1.0,
            ("run/loss", None): loss(self.steps * batch, seed),
        }
        self.found |= more or {}

    def series(self, metric: str, site: str | None = None):
        if (metric, site) not in self.found:
            raise ConfigError(f"no {metric} at {site}")
        return self.steps, self.found[metric, site]


def run(detector: Drift, batch: int = 100, steps: int = 2000, off: float = 0.0, tokens: bool = True, start: int = 0):
    found = []
    values = loss(np.arange(0, steps, 10) * batch, seed=5) + off
    for n in range(start // 10, steps // 10):
        readings = [Reading("run/loss", None, values[[n]]), Reading("attention/logit_max", "a", np.full(2, 5.0))]
        readings += [Reading("run/tokens", None, np.array([10.0 * n * batch]))] if tokens else []
        found += [f for f in detector.update(10 * n, readings, {}) if f.score >= 1]
    return found


def references(**more) -> list[Reference]:
    return [Reference(seed, **more) for seed in (1, 2, 3)]


@pytest.mark.parametrize("every", [1, 10, 37])
def test_references_of_another_pace_are_the_same_references(every: int) -> None:
    assert run(Drift(TREND, references(every=every))) == []
    found = run(Drift(TREND, references(every=every)), off=0.9)
    assert {f.metric for f in found} == {"run/loss"}
    assert all("the reference" in f.expected for f in found)


def test_by_tokens_a_run_of_twice_the_batch_is_the_same_run() -> None:
    half = references(batch=50, steps=4000)
    assert run(Drift(TREND, half, align="tokens")) == []
    assert run(Drift(TREND, half, align="tokens"), off=0.9) != []
    faster = references(batch=400)
    assert {f.direction for f in run(Drift(TREND, faster), steps=400)} == {+1}  # by steps it looks behind
    assert run(Drift(TREND, faster, align="tokens")) == []


def test_without_a_count_of_tokens_nothing_is_said() -> None:
    assert run(Drift(TREND, references(), align="tokens"), off=0.9, tokens=False) == []
    uncounted = references()
    for reference in uncounted:
        del reference.found["run/tokens", None]
    assert run(Drift(TREND, uncounted, align="tokens"), off=0.9) == []
    with pytest.raises(ConfigError, match="by step or tokens, got 'epoch'"):
        Drift(TREND, references(), align="epoch")


def test_a_step_beyond_their_end_is_not_judged_by_them() -> None:
    short = [Reference(seed, steps=500) for seed in (1, 2, 3)]
    found = run(Drift(TREND, short), off=0.9)
    assert found
    held = [f.step for f in found if f.step >= 500]
    assert held == []


def test_what_no_reference_has_is_not_compared() -> None:
    """A site and a metric that the references lack, and one that only one of them has."""
    logits = {("attention/logit_max", "a"): np.full((200, 2), 5.0)}
    mixed = [Reference(1, more=logits), Reference(2), Reference(3)]
    assert run(Drift(TREND, mixed)) == []
    assert run(Drift(TREND, [])) == []


@pytest.mark.parametrize("stop", [0, 20, 300, 700])
@pytest.mark.parametrize("align", ["step", "tokens"])
def test_a_resumed_comparison_goes_on(stop: int, align: str) -> None:
    whole = run(Drift(TREND, references(), align=align), off=0.9)
    first, second = (Drift(TREND, references(), align=align) for _ in range(2))
    early = run(first, steps=stop, off=0.9)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert whole
    assert early + run(second, off=0.9, start=stop) == whole
