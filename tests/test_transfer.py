"""How numbers come to the host: as they are on CPU, without a wait on CUDA, and of their own step however late they come."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop import STEPS, Loop, identical
from torch import nn
from torch.nn import functional

from foreshock import Watch, _torch, open_run, transfer
from foreshock.cost import WAITING, Costs
from foreshock.ended import MOST_UNDER_WAY
from foreshock.monitors import budget
from foreshock.rejudge import rejudge
from foreshock.runtime import CAPTURED
from foreshock.transfer import Packet, Transfer

WITHOUT_SPECTRA = ["laws", "attention", "router", "optim"]


@pytest.fixture(autouse=True)
def no_scipy_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks/gpu.sh` runs these where scipy may be missing: t-tests find nothing there."""
    if importlib.util.find_spec("scipy") is None:
        monkeypatch.setattr(budget, "_student_t", lambda chance, degrees: float("inf"))


def test_on_cpu_nothing_is_copied_until_it_is_read() -> None:
    transfer, vector = Transfer(torch.device("cpu")), torch.arange(3.0, requires_grad=True)
    read = transfer.start(vector)
    assert transfer.copies == 1
    assert transfer.to_device(vector) is vector
    assert read.has_arrived()
    assert read().tolist() == [0.0, 1.0, 2.0]
    assert read().dtype == "float64"


class Pretended:
    """CUDA's streams and events as far as `Transfer` asks for them: what was asked, in order; events come to pass by ``done``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.done = False
        asked = self.asked
        pretended = self

        class Stream:
            def __init__(self, name: Any) -> None:
                self.name = name if isinstance(name, str) else "side"

            def wait_stream(self, other: Stream) -> None:
                asked.append((self.name, "waits for", other.name))

            def wait_event(self, event: Event) -> None:
                asked.append((self.name, "waits for", event.of))

        class Event:
            of = "an event that was not recorded"

            def record(self, stream: Stream) -> None:
                self.of = f"what {stream.name} has queued"

            def query(self) -> bool:
                return pretended.done

            def synchronize(self) -> None:
                asked.append(("host", "waits for", self.of))

        @contextmanager
        def stream(of: Stream) -> Iterator[None]:
            asked.append((of.name, "begins"))
            yield
            asked.append((of.name, "ends"))

        training = Stream("training")
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: training)
        monkeypatch.setattr(transfer, "_pinned", lambda numbers, dtype: torch.full((numbers,), torch.nan, dtype=dtype))


def test_streams_wait_for_each_other_and_the_host_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Pretended(monkeypatch)
    packet = Transfer(torch.device("cuda")).start(torch.arange(3.0))
    assert cuda.asked == [
        ("side", "waits for", "training"),
        ("side", "begins"),
        ("side", "ends"),
        ("training", "waits for", "what side has queued"),
    ]
    assert not packet.has_arrived()
    cuda.done = True
    assert packet.has_arrived()
    assert packet().tolist() == [0.0, 1.0, 2.0]
    assert cuda.asked[4:] == [("host", "waits for", "what side has queued")]


def test_a_slot_is_used_again_once_it_was_read_and_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    Pretended(monkeypatch)
    moved = Transfer(torch.device("cuda"))
    packet = moved.start(torch.zeros(2))
    assert [packet().tolist() for _ in range(3)] == [[0.0, 0.0]] * 3
    packets = [moved.start(torch.full((2,), float(i))) for i in range(1, 4)]
    assert packet().tolist() == [0.0, 0.0], "read again when its slot is another's"
    assert [p().tolist() for p in packets] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert sum(map(len, moved._free.values())) == 3, "as many as were ever under way"


def test_many_threads_share_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    Pretended(monkeypatch)
    moved, wrong = Transfer(torch.device("cuda")), []

    def work(number: int) -> None:
        for _ in range(300):
            packets = [moved.start(torch.full((2,), float(number))) for _ in range(3)]
            wrong.extend(p().tolist() for p in packets if p().tolist() != [number, number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert moved.copies == 8 * 300 * 3
    slots = [id(slot) for free in moved._free.values() for slot in free]
    assert len(slots) == len(set(slots)) <= 8 * 3


class Late:
    """Every vector is copied at once, and said to be there ``steps`` optimizer steps later. ``waits`` counts who did not ask."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        self.steps, self.now, self.waits = steps, 0, 0
        monkeypatch.setattr(Transfer, "start", lambda transfer, vector: self.start(vector))

    def start(self, vector: torch.Tensor) -> Packet:
        kept, at = vector.detach().clone(), self.now

        def has_arrived() -> bool:
            return self.now >= at + self.steps

        def take() -> Any:
            self.waits += not has_arrived()
            return kept.double().numpy()

        return Packet(take, has_arrived)


def recorded(folder: Path, steps: int, each: Callable[[int], None] = lambda step: None, **options: Any) -> Any:
    """What a training with a watch recorded, and what it computed."""
    with Watch(folder, inner="eager", strict=True, **options) as watch:
        loop = Loop(watch.backend)

        def between(loop: Loop, step: int) -> None:
            each(step)
            if step == steps // 2:  # a law that breaks
                loop.model.qkv.weight.data[0, 0] = torch.inf
            watch.log(loss=float(step))

        computed = loop.run(between, steps)
    with open_run(folder) as run:
        series = {key: run.column(*key) for key in run.columns()}
        return computed, series, repr(run.alarms), repr(rejudge(run))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("late", [2, 100])
def test_late_numbers_are_recorded_and_judged_as_if_in_time(
    one_thread, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every: int, late: int
) -> None:
    options = {"every": every, "windows": (every * 2, every * 4)}
    in_time = recorded(tmp_path / "in time", 24, **options)
    clock = Late(monkeypatch, late)
    waits: list[int] = []

    def each(step: int) -> None:
        clock.now = step
        waits.append(clock.waits)

    delayed = recorded(tmp_path / "late", 24, each, **options)
    assert identical(delayed[0], in_time[0])
    assert delayed[1].keys() == in_time[1].keys()
    for key, (steps, values) in in_time[1].items():
        assert delayed[1][key][0].tolist() == steps.tolist(), key
        np.testing.assert_array_equal(delayed[1][key][1], values, str(key))
    assert "non-finite values" in in_time[2]
    assert delayed[2] == in_time[2] == delayed[3]
    assert (waits[-1] > 0) == (late > MOST_UNDER_WAY)


def test_what_is_under_way_is_bounded(one_thread, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Late(monkeypatch, 100)
    seen = []
    with Watch(every=1, inner="eager", strict=True, detectors=[], monitors=WITHOUT_SPECTRA) as watch:

        def between(loop: Loop, step: int) -> None:
            clock.now = step
            seen.append(len(watch.collector._ended))

        Loop(watch.backend).run(between, 12)
        assert max(seen) == MOST_UNDER_WAY
        assert watch.series("attention/q_rms")[0].tolist() == list(range(12)), "who asks waits for all of it"
        assert len(watch.collector._ended) == 0


def scalar_reads(backend: Any, steps: int) -> int:
    """Numbers that Python took out of tensors in ``steps`` training steps that nobody asked anything about."""
    loop = Loop(backend)
    loop.run(steps=6)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        loop.run(steps=steps)
    return sum(e.count for e in profiled.key_averages() if e.key == "aten::_local_scalar_dense")


@pytest.mark.parametrize("every", [1, 2])
def test_nothing_is_read_out_of_tensors_between_questions(one_thread, every: int) -> None:
    """But of the host's own copy of the router's weights: `svdvals` looks whether it failed."""
    plain = scalar_reads("eager", 6)
    with Watch(every=every, inner="eager", strict=True, detectors=[], monitors=WITHOUT_SPECTRA) as watch:
        assert scalar_reads(watch.backend, 6) - plain == 6 // every
        assert watch.series("optim/grad_norm")[0].tolist() == list(range(0, 12, every))


def test_a_turn_of_the_spectra_reads_what_its_two_eigensolvers_report(one_thread) -> None:
    """`eigvalsh` looks whether it failed, and so does `svdvals` of the router once a sample, on the host."""
    plain = scalar_reads("eager", 6)
    with Watch(every=1, inner="eager", strict=True, detectors=[], windows=(3,)) as watch:
        found = scalar_reads(watch.backend, 6)
        turns = len([step for step in watch.series("attention/delta2_norm")[0] if step >= 5])
        assert (turns, found - plain) == (2, 2 * turns + 6)


def test_a_graph_that_the_script_captures_is_served_plain(one_thread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps that are watched one is captured: nothing of it is measured, counted, or compiled."""
    plain = Loop("eager").run()
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:

        def between(loop: Loop, step: int) -> None:
            monkeypatch.setattr(_torch, "is_capturing", lambda: step in (2, 3))

        assert identical(Loop(watch.backend).run(between), plain)
        assert watch.step == STEPS - 2
        assert [*watch.coverage.unmatched] == [CAPTURED]
        assert watch.series("attention/q_rms")[0].tolist() == list(range(STEPS - 2))


def test_the_device_is_waited_for_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for later in a step is foreshock's own work on the device."""
    now, waits = [0.0], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def synchronize() -> None:
        waits.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    costs = Costs(lambda: now[0], waits=True)
    read = costs.settled(lambda parameter: parameter)
    for _ in range(3):
        costs.step(True)
        with costs.of("own"):
            for _ in range(4):
                read(torch.zeros(1))
                now[0] += 0.25
    assert len(waits) == 3
    assert costs.seconds == {"own": 3.0, WAITING: 3.0}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in self.qkv(x_BSD).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)).square().mean()


@pytest.fixture
def no_syncs() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("no_syncs")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("spectra", [False, True])
def test_a_sampled_step_waits_for_nothing(mode: str, spectra: bool) -> None:
    """Forward, backward and optimizer of sampled steps raise where they would wait for the device; what they leave is right all
    the same. Of the spectra the eigensolvers and one copy do wait, and nothing else."""
    torch.manual_seed(0)
    model = Small().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = torch.randn(16, 4, 32, 64, device="cuda")
    families = {} if spectra else {"monitors": WITHOUT_SPECTRA}
    watch = Watch(every=1, strict=True, detectors=[], windows=(4,), **families)
    compiled = torch.compile(model, backend=watch.backend, mode=mode)
    wanted, waited = [], []
    for step, batch in enumerate(batches):
        with torch.no_grad():
            wanted.append(model.qkv(batch)[..., :64].unflatten(-1, (4, 16)).square().mean((0, 1, 3)).sqrt())
        if step == 8:  # graphs are compiled and recorded by now
            torch.cuda.set_sync_debug_mode("warn" if spectra else "error")
        with warnings.catch_warnings(record=True, action="always") if step >= 8 else nullcontext() as said:
            loss = compiled(batch)
            watch.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        waited += [Path(w.filename).name for w in said or () if "synchronizing" in str(w.message)]
    torch.cuda.set_sync_debug_mode("default")
    assert set(waited) <= {"increments.py"}
    steps, values = watch.series("attention/q_rms")
    assert steps.tolist() == list(range(16))
    own = torch.stack(wanted).cpu().numpy()  # of each step: none was written over by a replay
    np.testing.assert_allclose(values, own, rtol=1e-3)
    for metric in ("law/key_shift", "optim/grad_norm", "run/loss"):
        assert watch.series(metric)[0].tolist() == list(range(16))
    watch.close()
