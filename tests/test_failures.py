"""Whatever fails inside foreshock, training ends with the parameters of a plain run, and the failure is told once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional

from foreshock import AlarmRaised, Probe, Reading, Watch
from foreshock.memory import MemoryStore
from foreshock.monitors import Finding
from foreshock.monitors.attention_probe import ATTENTION
from foreshock.patterns import Pattern

STEPS = 4
BOOM = "this is broken"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


def _train(backend, after=lambda step, loss: None, before_step=lambda: None) -> list[Tensor]:
    """Losses and, behind them, the parameters."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Layer()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = compiled(torch.randn(2, 5, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        before_step()
        optimizer.step()
        after(step, loss)
        losses.append(loss.detach())
    return [*losses, *(p.detach().clone() for p in model.parameters())]


@pytest.fixture
def plain(one_thread) -> list[Tensor]:
    return _train("eager")


def _boom(*args, **kwargs):
    raise RuntimeError(BOOM)


class _SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("this cannot be said")


def _speechless(*args, **kwargs):
    raise _SpeechlessError


def _boom_at_run_time(facts, tensors, gradients):
    found = ATTENTION.backward(facts, tensors, gradients)
    if not isinstance(tensors["q"], FakeTensor):
        raise RuntimeError(BOOM)
    return found


class _Broken:
    """A monitor, detector and sink of which one method fails."""

    def __init__(self, method: str) -> None:
        self.method = method

    def _maybe(self, method: str):
        if method == self.method:
            raise RuntimeError(BOOM)
        return []

    def update(self, *args):
        return self._maybe("update")

    def readings(self, step, readings):
        self._maybe("readings")

    def alarm(self, alarm):
        self._maybe("alarm")

    def close(self):
        self._maybe("close")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class _Alarming(_Broken):
    """A detector that finds something at every step."""

    def update(self, step, readings, sites):
        site = next(iter(sites))
        return [Finding(step, step, site, "attention/nonfinite", 1.0, "none", +1, 10.0, 0)]


class _Strange(_Broken):
    """A monitor, detector and sink that returns what it should not."""

    def update(self, *args):
        return ["no reading"]


class _Store(MemoryStore):
    def __init__(self, method: str) -> None:
        super().__init__()
        setattr(self, method, self._full)

    def _full(self, *args, **kwargs):
        raise OSError(28, f"No space left on device: {BOOM}")


def _inner(module, inputs):
    if any(node.meta.get("foreshock") for node in module.graph.nodes):
        raise RuntimeError(BOOM)
    return module.forward


def _inner_that_fails_later(module, inputs):
    probed = any(node.meta.get("foreshock") for node in module.graph.nodes)
    return _boom if probed else module.forward


def _probe(**changes) -> dict[str, tuple[Probe]]:
    return {"probes": (replace(ATTENTION, **changes),)}


SDPA = frozenset({"scaled_dot_product_attention"})
# cause -> (options of the watch, what the warning begins with, what of the probe is still recorded)
CAUSES = {
    "pattern": (lambda: {"patterns": [Pattern("mine", SDPA, _boom)]}, "pattern `mine`", True),
    "forward probe": (lambda: _probe(forward=_boom), "probe `attention`", None),
    "gradient probe": (lambda: _probe(backward=_boom), "gradient statistics of probe `attention`", True),
    "gradient probe at run time": (lambda: _probe(backward=_boom_at_run_time), "gradient statistics", True),
    "finishing a probe": (lambda: _probe(finish=_boom), "probe `attention`", False),
    "monitor": (lambda: {"monitors": [_Broken("update")]}, "monitor _Broken", True),
    "detector": (lambda: {"detectors": [_Broken("update")]}, "detector _Broken", True),
    "sink": (lambda: {"sinks": [_Broken("readings")]}, "sink _Broken", True),
    "sink at an alarm": (
        lambda: {"sinks": [_Broken("alarm")], "detectors": [_Alarming("")]}, "sink _Broken", True,
    ),
    "sink at the end": (lambda: {"sinks": [_Broken("close")]}, "sink _Broken", True),
    "on_alarm": (lambda: {"on_alarm": _boom, "detectors": [_Alarming("")]}, "calling on_alarm", True),
    "store, flushing": (lambda: {"store": "flush"}, "writing to the store", True),
    "store, writing": (lambda: {"store": "write"}, "writing to the store", False),
    "store, an alarm": (
        lambda: {"store": "alarm", "detectors": [_Alarming("")]}, "writing to the store", True,
    ),
    "store at the end": (lambda: {"store": "close"}, "writing to the store", True),
    "compiling the instrumented graph": (lambda: {"inner": _inner}, "compiling the instrumented graph", None),
    "running the instrumented graph": (
        lambda: {"inner": _inner_that_fails_later}, "running the instrumented graph", None,
    ),
}  # fmt: skip


def _watch(options, **more) -> Watch:
    options = {"every": 1, "inner": "eager", **options, **more}
    store = options.pop("store", None)
    watch = Watch(**options)
    if store is not None:
        watch.collector.store = _Store(store)
    return watch


def _of_failures(messages: list[str]) -> list[str]:
    return [message for message in messages if "training goes on" in message]


@pytest.mark.parametrize("cause", CAUSES)
def test_training_goes_on_and_the_cause_is_told_once(one_thread, warnings_logged, cause: str) -> None:
    options, begins, recorded = CAUSES[cause]
    plain = _train("aot_eager")
    with _watch({"inner": "aot_eager", **options()}) as watch:
        trained = _train(watch.backend)
        watch.flush()
        metrics = watch.metrics()
    assert all(torch.equal(got, expected) for got, expected in zip(trained, plain, strict=True))
    (message,) = _of_failures(warnings_logged())
    assert message.startswith(begins)
    assert BOOM in message
    (listed,) = watch.coverage.warnings
    assert message.startswith(listed)
    assert watch.step == STEPS
    if recorded is not None:
        assert ("attention/q_rms" in metrics) is recorded
    if recorded:
        assert len(watch.series("attention/q_rms")[0]) == STEPS


@pytest.mark.parametrize("cause", CAUSES)
def test_strict_raises_it(one_thread, cause: str) -> None:
    options, _, _ = CAUSES[cause]
    watch = _watch(options(), strict=True)
    with pytest.raises(Exception, match=BOOM):
        _run_strict(watch)
    with pytest.MonkeyPatch.context() as patch:  # whatever was broken is not broken in the next test
        patch.setattr(watch, "fail", lambda what, error: None)
        patch.setattr(watch.collector, "fail", lambda what, error: None)
        watch.close()


def _run_strict(watch: Watch) -> None:
    _train(watch.backend)
    watch.close()


def test_gradients_that_could_not_be_read_are_missing_and_the_rest_is_there(one_thread) -> None:
    with _watch(_probe(backward=_boom_at_run_time)) as watch:
        _train(watch.backend)
        assert np.isnan(watch.series("law/key_shift")[1]).all()
        assert np.isfinite(watch.series("attention/entropy")[1]).all()
        assert watch.alarms == []


@pytest.mark.parametrize("value", ["abc", torch.zeros(3), None, object()])
def test_a_logged_value_that_is_no_number(plain, warnings_logged, value) -> None:
    with _watch({}) as watch:
        trained = _train(
            watch.backend, after=lambda step, loss: watch.log(loss=loss), before_step=lambda: watch.log(odd=value)
        )
        assert len(watch.series("run/loss")[0]) == STEPS
    assert all(torch.equal(got, expected) for got, expected in zip(trained, plain, strict=True))
    (message,) = _of_failures(warnings_logged())
    assert message.startswith("reading the logged `odd`")


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        ({"monitors": [_Strange("")]}, "monitor _Strange"),
        ({"detectors": [_Strange("")]}, "detector _Strange"),
        (_probe(finish=lambda facts, quantities: ["no metric"]), "probe `attention`"),
        (_probe(finish=lambda facts, quantities: {"attention/q_rms": "no number"}), "probe `attention`"),
        ({"on_alarm": _speechless, "detectors": [_Alarming("")]}, "calling on_alarm"),
    ],
    ids=["monitor", "detector", "probe", "metric", "error without words"],
)
def test_what_makes_no_sense_is_told_and_the_rest_is_recorded(plain, warnings_logged, options, begins: str) -> None:
    with _watch(options) as watch:
        trained = _train(watch.backend, after=lambda step, loss: watch.log(loss=loss))
        assert len(watch.series("run/loss")[0]) == STEPS
        assert len(watch.series("optim/lr")[0]) == STEPS
        assert ("attention/q_rms" in watch.metrics()) is not begins.startswith("probe")
    assert all(torch.equal(got, expected) for got, expected in zip(trained, plain, strict=True))
    (message,) = _of_failures(warnings_logged())
    assert message.startswith(begins)


def test_two_causes_are_two_warnings(plain, warnings_logged) -> None:
    with _watch({"sinks": [_Broken("readings")], "monitors": [_Broken("update")]}) as watch:
        trained = _train(watch.backend)
    assert all(torch.equal(got, expected) for got, expected in zip(trained, plain, strict=True))
    assert len(_of_failures(warnings_logged())) == len(watch.coverage.warnings) == 2


def test_a_detector_that_fails_does_not_silence_the_others(one_thread) -> None:
    with _watch({"detectors": [_Broken("update"), _Alarming("")]}) as watch:
        _train(watch.backend)
        assert watch.alarms


def test_a_monitor_that_works_is_recorded_beside_one_that_fails(one_thread) -> None:
    class Works(_Broken):
        def update(self, step, sites):
            return [Reading("mine/number", None, np.array([float(step)]))]

    with _watch({"monitors": [_Broken("update"), Works("")]}) as watch:
        _train(watch.backend)
    assert watch.series("mine/number")[1].reshape(-1).tolist() == [0, 1, 2, 3]


def test_a_run_folder_that_cannot_be_written(plain, warnings_logged, tmp_path) -> None:
    run = tmp_path / "run"
    run.write_text("a file where the folder should be")
    with _watch({"run": run}) as watch:
        trained = _train(watch.backend)
    assert all(torch.equal(got, expected) for got, expected in zip(trained, plain, strict=True))
    assert len(_of_failures(warnings_logged())) == 1


def test_an_alarm_may_stop_training_by_raising_and_the_watch_still_closes(one_thread) -> None:
    watch = _watch({"on_alarm": "raise", "detectors": [_Alarming("")]})
    with pytest.raises(AlarmRaised), watch:
        _train(watch.backend)
    assert watch.alarms
    step = watch.step
    _train(watch.backend)  # a closed watch counts nothing and gets in nobody's way
    assert watch.step == step


def test_an_error_of_the_model_itself_is_the_models(one_thread) -> None:
    class Wrong(Layer):
        def forward(self, x):
            out = super().forward(x)
            if x.shape[0] > 2:
                raise ValueError("too large a batch")
            return out

    with _watch({}, strict=True) as watch:
        compiled = torch.compile(Wrong(), backend=watch.backend)
        compiled(torch.randn(2, 5, 8))
        with pytest.raises(ValueError, match="too large a batch"):
            compiled(torch.randn(3, 5, 8))


@pytest.mark.parametrize("cause", ["forward probe", "gradient probe", "compiling the instrumented graph"])
def test_later_sampling_meets_the_same_failures(plain, warnings_logged, cause: str) -> None:
    """With ``every=2`` the second variant is compiled in mid-run."""
    options = CAUSES[cause][0]
    with _watch({**options(), "every": 2}) as watch:
        watch.clock.step = 1
        trained = _train(watch.backend)
    assert all(torch.equal(got, expected) for got, expected in zip(trained, plain, strict=True))
    (message,) = _of_failures(warnings_logged())
    assert BOOM in message


def test_an_output_written_in_place_keeps_its_forward_probes(one_thread, capture) -> None:
    torch._dynamo.reset()
    projection, another = torch.nn.Linear(8, 24), torch.nn.Linear(8, 24)

    def attend(x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in projection(x).chunk(3, -1))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v) + 0
        return out.mul_(2)

    def in_place(x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in another(x).chunk(3, -1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).mul_(2)

    with Watch(every=1, inner="eager", strict=True) as watch:
        torch.compile(attend, backend=watch.backend)(torch.randn(2, 5, 8)).sum().backward()
        with torch.no_grad():
            torch.compile(in_place, backend=watch.backend)(torch.randn(2, 5, 8))
        assert watch.coverage.warnings == ()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as without foreshock
            torch.compile(in_place, backend=watch.backend)(torch.randn(2, 5, 8)).sum().backward()
        assert watch.coverage.warnings == ()
        (written,) = [status for status in watch.coverage if any(status.laws.values())]
        told = "`mul_` writes into out in place: no gradients are read"
        lost = {law for law, reason in written.laws.items() if reason == told}
        assert lost == {*written.laws} - {"law/hull", "law/shadow"}
