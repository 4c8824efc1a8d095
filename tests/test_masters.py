"""fp32 masters are found by value wherever an optimizer keeps them, and nothing that is none is taken for one."""

from __future__ import annotations

import gc
import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from projections import separate
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from foreshock import ConfigError, Watch
from foreshock.masters import CHUNK, START, Masters
from foreshock.monitors import Spectra
from foreshock.monitors.increments import PEAKS
from foreshock.monitors.metrics import STATISTICS
from foreshock.records import Array

WIDTH, HEADS = 32, 2


def weights(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def masters_of(parameters: list[nn.Parameter], seed: int = 1) -> list[Tensor]:
    """Numbers that round to the parameters without being them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (p.detach().float() * (1 + 2**-11 * torch.rand(p.shape, generator=generator))).requires_grad_()
        for p in parameters
    ]


class Own(torch.optim.Optimizer):
    """Keeps a copy in its state under some name, among other things."""

    def __init__(self, parameters: list[nn.Parameter], wide: list[Tensor], name: str = "master_param") -> None:
        super().__init__(parameters, {"lr": 1e-3})
        for p, master in zip(parameters, wide, strict=True):
            moments = {"step": torch.tensor(3.0), "exp_avg": torch.randn(p.shape), "exp_avg_sq": torch.rand(p.shape)}
            self.state[p] = {**moments, name: master}

    def step(self, closure: Any = None) -> None:
        """As it is."""


def in_state(parameters: list[nn.Parameter], wide: list[Tensor]) -> Any:
    return Own(parameters, [x.detach() for x in wide])


def in_a_flat_state(parameters: list[nn.Parameter], wide: list[Tensor]) -> Any:
    return Own(parameters, [x.detach().reshape(-1) for x in wide], "w32")


def in_a_nested_state(parameters: list[nn.Parameter], wide: list[Tensor]) -> Any:
    optimizer = Own(parameters, wide, "unused")
    for p, x in zip(parameters, wide, strict=True):
        optimizer.state[p] = {"inner": {"shadow": [x.detach()]}}
    return optimizer


def as_parameters(parameters: list[nn.Parameter], wide: list[Tensor]) -> Any:
    return torch.optim.AdamW(wide)


def as_an_attribute(parameters: list[nn.Parameter], wide: list[Tensor]) -> Any:
    for p, x in zip(parameters, wide, strict=True):
        p.main_param = x
    return torch.optim.AdamW([torch.zeros(3, requires_grad=True)])


def in_one_flat_buffer(parameters: list[nn.Parameter], wide: list[Tensor]) -> Any:
    """In groups, each rounded up to a multiple of sixteen, with something else before and behind."""
    padded = [torch.cat([x.detach().reshape(-1), torch.zeros(-x.numel() % 16)]) for x in wide]
    return torch.optim.AdamW([torch.cat([torch.randn(7), *padded, torch.randn(40)]).requires_grad_()])


PLACES: list[Callable[[list[nn.Parameter], list[Tensor]], Any]] = [
    in_state, in_a_flat_state, in_a_nested_state, as_parameters, as_an_attribute, in_one_flat_buffer,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", PLACES)
def test_a_master_is_found_wherever_it_is_kept(place, dtype: torch.dtype) -> None:
    parameters = weights((6, 16), (6, 16), (48,), (3, 5, 7), dtype=dtype)
    wide, masters = masters_of(parameters), Masters()
    if dtype is torch.float16:
        wide = [p.detach().float() + 1e-8 for p in parameters]
    optimizer = place(parameters, wide)
    assert all(masters.read(p) is p for p in parameters) or place is as_an_attribute
    masters.met(optimizer)
    for p, master in zip(parameters, wide, strict=True):
        found = masters.read(p)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        torch.testing.assert_close(found, master.detach(), rtol=0, atol=0)
        assert torch.equal(found, masters.read(p))


def test_it_is_the_master_itself_that_is_read() -> None:
    parameters = weights((6, 16))
    wide, masters = masters_of(parameters), Masters()
    optimizer = torch.optim.SGD(wide, lr=1e-4)
    masters.met(optimizer)
    masters.read(parameters[0])
    wide[0].grad = torch.ones_like(wide[0])
    optimizer.step()
    parameters[0].data.copy_(wide[0])
    assert torch.equal(masters.read(parameters[0]), wide[0])


def test_a_weight_of_32_bits_is_its_own_master() -> None:
    (p,), masters = weights((4, 4), dtype=torch.float32), Masters()
    masters.met(torch.optim.SGD([p], lr=1.0))
    assert masters.read(p) is p


def fits_nothing() -> Iterator[tuple[str, list[nn.Parameter], Any]]:
    parameters = weights((6, 16))
    yield "plain 16-bit training", parameters, _stepped(torch.optim.AdamW(parameters))
    off = masters_of(parameters)[0].detach().clone()
    off[5, 15] *= 1.02
    yield "one element off", parameters, torch.optim.SGD([off.requires_grad_()], lr=1.0)
    yield "two that fit", parameters, torch.optim.SGD([masters_of(parameters, s)[0] for s in (1, 2)], lr=1.0)
    yield "in 64 bits", parameters, torch.optim.SGD([masters_of(parameters)[0].detach().double()], lr=1.0)
    yield "a part of it", parameters, torch.optim.SGD([masters_of(parameters)[0].detach()[:3]], lr=1.0)
    zero = [nn.Parameter(torch.zeros(6, 16, dtype=torch.bfloat16))]
    yield "zeros beside a moment that is zero", zero, Own(zero, [torch.zeros(6, 16)], "momentum")
    ones = [nn.Parameter(torch.ones(48, dtype=torch.bfloat16)) for _ in range(2)]
    yield "norm gains that are all one", ones, torch.optim.SGD([torch.ones(48) for _ in ones], lr=1.0)
    flat = torch.cat([torch.ones(100), torch.randn(500)]).requires_grad_()
    yield "ones in a flat buffer", ones, torch.optim.SGD([flat], lr=1.0)
    twice = torch.cat([x.detach().reshape(-1) for x in masters_of(parameters) * 2]).requires_grad_()
    yield "twice in a flat buffer", parameters, torch.optim.SGD([twice], lr=1.0)


def _stepped(optimizer: Any) -> Any:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("case", list(fits_nothing()), ids=lambda case: case[0])
def test_what_is_no_master_is_not_taken_for_one(case) -> None:
    _, parameters, optimizer = case
    masters = Masters()
    masters.met(optimizer)
    for _ in range(5):
        assert all(masters.read(p) is p for p in parameters)


def test_two_that_fit_are_told_apart_once_they_differ() -> None:
    """Gains begin alike; a search that found nothing is repeated at the second, fourth, eighth reading."""
    gains = [nn.Parameter(torch.ones(48, dtype=torch.bfloat16)) for _ in range(2)]
    wide, masters = [torch.ones(48, requires_grad=True) for _ in gains], Masters()
    masters.met(optimizer := torch.optim.SGD(wide, lr=1.0))
    found = []
    for step in range(9):
        found.append([masters.read(p).dtype for p in gains])
        if step == 3:
            for p, x, way in zip(gains, wide, (1, -1), strict=True):
                x.data += way * 0.01 * torch.arange(48)
                p.data.copy_(x)
    del optimizer
    assert found[:7] == [[torch.bfloat16] * 2] * 7
    assert found[7:] == [[torch.float32] * 2] * 2
    assert all(torch.equal(masters.read(p), x) for p, x in zip(gains, wide, strict=True))


def test_a_master_that_no_longer_fits_is_given_up_and_a_new_one_is_found() -> None:
    parameters = weights((64, 64))
    wide, masters = masters_of(parameters), Masters()
    masters.met(optimizer := torch.optim.SGD(wide, lr=1.0))
    assert masters.read(parameters[0]).dtype == torch.float32
    with torch.no_grad():
        parameters[0][17, 23] += 1  # one element of 4096
    seen = [masters.read(parameters[0]).dtype for _ in range(4096 // 64)]
    assert seen[0] == torch.float32
    assert seen[-1] == torch.bfloat16  # every place is looked at in turn
    wide[0].data = parameters[0].detach().float()
    del optimizer
    masters.met(optimizer := torch.optim.SGD(wide, lr=1.0))
    assert torch.equal(masters.read(parameters[0]), wide[0])
    assert optimizer.param_groups


def test_nothing_is_kept_alive() -> None:
    (p,) = parameters = weights((6, 16))
    masters = Masters()
    optimizer = in_state(parameters, masters_of(parameters))
    masters.met(optimizer)
    assert masters.read(p).dtype == torch.float32
    del optimizer
    gc.collect()
    assert masters.read(p) is p
    assert list(masters._optimizers) == []
    del p, parameters
    gc.collect()
    masters.read(weights((2, 2))[0])
    assert len(masters._known) == 1


def test_a_flat_buffer_is_searched_across_the_edges_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreshock.masters.CHUNK", 64)
    assert CHUNK > 64
    (p,) = parameters = weights((50,))
    (wide,) = masters_of(parameters)
    for at in (0, 1, 64 - START, 63, 64, 65, 128 - START + 1, 150):
        flat = torch.cat([torch.randn(at), wide.detach(), torch.randn(200 - at)])
        masters = Masters()
        masters.met(optimizer := torch.optim.SGD([flat], lr=1.0))
        assert torch.equal(masters.read(p), wide), at
        del optimizer


# -- in a run ----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in "qkv")
        self.q_norm, self.k_norm = (nn.RMSNorm(WIDTH // HEADS) for _ in "qk")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)


class Run:
    """A bfloat16 model of two layers with fp32 masters, copied into it after each step."""

    def __init__(self, watch: Watch, lr: float = 2e-5) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = nn.Sequential(Layer(), Layer())
        for p in self.model.parameters():  # as in a trained model: no gain is one
            p.data += 0.1 * torch.randn_like(p) * p.abs().mean()
        self.masters = {name: p.detach().clone().requires_grad_() for name, p in self.model.named_parameters()}
        self.model.bfloat16()
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=lr)
        self.watch, self.step = watch.bind(self.model), 0
        self.compiled = torch.compile(self.model, backend=watch.backend)

    def train(self, upto: int, after: Callable[[int], None] = lambda step: None) -> None:
        for step in range(self.step, upto):
            x = torch.randn(4, 8, WIDTH, generator=torch.Generator().manual_seed(step)).bfloat16()
            self.model.zero_grad()
            self.compiled(x).square().mean().backward()
            for name, p in self.model.named_parameters():
                self.masters[name].grad = None if p.grad is None else p.grad.float()
            self.optimizer.step()
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(self.masters[name])
            after(step)
        self.step = upto

    def save(self, file: io.BytesIO) -> None:
        parts = {"watch": self.watch, "model": self.model, "optimizer": self.optimizer}
        saved = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**saved, "masters": {n: x.detach() for n, x in self.masters.items()}, "step": self.step}, file)

    def load(self, file: io.BytesIO) -> None:
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        for name, part in {"watch": self.watch, "model": self.model, "optimizer": self.optimizer}.items():
            part.load_state_dict(state[name])
        with torch.no_grad():
            for name, x in self.masters.items():
                x.copy_(state["masters"][name])
        self.step = state["step"]


def watch_of(**options: Any) -> Watch:
    return Watch(**{"every": 5, "windows": (5, 15), "inner": "eager", "strict": True, **options})


def spectra_of(watch: Watch) -> dict[tuple[str, str], tuple[Array, Array]]:
    names = [n for n in watch.metrics() if n.startswith(("attention/d", "optim/update"))]
    found = {}
    for name, site in itertools.product(names, watch.sites):
        with suppress(ConfigError):  # not recorded there yet
            found[name, site.id] = watch.series(name, site.id)
    return found


@pytest.mark.usefixtures("one_thread")
def test_with_masters_the_spectra_of_a_bf16_model_are_those_of_fp32_and_without_they_are_rounding() -> None:
    """Relative updates of about 1e-3 in five steps: of bfloat16 most of the change is rounding, and twice too large."""
    with watch_of() as watch:
        run = Run(watch)
        # What the same run in fp32 would see: its weights are the masters. And what is seen without them.
        wide, narrow = Spectra((5, 15)), Spectra((5, 15))
        copies = Run(watch_of(monitors=["optim"]))
        seen: dict[str, dict[tuple[str, str | None], dict[int, Array]]] = {"wide": {}, "narrow": {}}

        def observe(step: int) -> None:
            sites = watch.sites
            with torch.no_grad():
                for name, p in copies.model.named_parameters():
                    p.data = run.masters[name].detach().clone()
            by_name = dict(copies.model.named_parameters())
            for kind, spectra, model in (("wide", wide, by_name), ("narrow", narrow, None)):
                if model is not None:
                    read = {id(p): model[name] for name, p in run.model.named_parameters()}
                    spectra.read = lambda p, read=read: read[id(p)]
                for r in spectra.update(step, sites):
                    seen[kind].setdefault((r.metric, r.site), {})[step] = r.values

        run.train(61, observe)
        copies.watch.close()
        found = spectra_of(watch)
        assert not any("masters" in note for status in watch.coverage for note in status.notes)
    assert len(found) == 2 * (2 * 4 * len(STATISTICS) + len(PEAKS) + 1)
    errors: dict[str, float] = {}
    for (name, site), (at, values) in found.items():
        fp32 = np.stack(list(seen["wide"][name, site].values()))
        bf16 = np.stack(list(seen["narrow"][name, site].values()))
        assert at.tolist() == list(seen["wide"][name, site])
        np.testing.assert_allclose(values.reshape(fp32.shape), fp32, rtol=1e-3)
        errors[name] = max(errors.get(name, 0), float(np.median(np.abs(bf16 / fp32 - 1))))
    assert errors["attention/delta2_norm"] > 1
    assert errors["attention/dwq_norm"] > 1


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_of_a_low_rank_update_rounding_leaves_nothing(size: float) -> None:
    """Healthy updates have few directions, and rounding has all of them: the effective rank is off by 200 % and more."""
    found = {}
    for kind in ("fp32", "masters", "rounded"):
        projection = separate(heads=4, groups=2, d=128, h=32)
        wide, masters = projection.parameters, Masters()
        if kind != "fp32":
            wide = [p.detach().clone().requires_grad_() for p in projection.parameters]
            for p in projection.parameters:
                p.data = p.data.bfloat16()
        optimizer = torch.optim.SGD(wide, lr=1.0)
        if kind == "masters":
            masters.met(optimizer)
        spectra = Spectra((10,), read=masters.read)
        spectra.update(0, [projection.site])
        generator = torch.Generator().manual_seed(3)
        for x in wide:
            change = torch.outer(*(torch.randn(n, generator=generator) for n in x.shape))
            x.grad = size * x.detach().norm() / change.norm() * change
        optimizer.step()
        for p, x in zip(projection.parameters, wide, strict=True):
            p.data.copy_(x.detach())
        found[kind] = {r.metric: r.values for r in spectra.update(10, [projection.site])}
    for name, values in found["fp32"].items():
        np.testing.assert_allclose(found["masters"][name], values, rtol=1e-3)
    for matrix in ("delta2", "dwq", "dwk"):
        off = (
            found["rounded"][f"attention/{matrix}_effective_rank"] / found["fp32"][f"attention/{matrix}_effective_rank"]
        )
        assert (off > 3).all(), matrix


@pytest.mark.usefixtures("one_thread")
def test_a_bf16_model_without_masters_says_so_in_the_ledger() -> None:
    with watch_of() as watch:
        torch.manual_seed(0)
        model = Layer().bfloat16()
        compiled = torch.compile(watch.bind(model) and model, backend=watch.backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            compiled(torch.randn(2, 5, WIDTH).bfloat16()).sum().backward()
            optimizer.step()
        watch.flush()
        (status,) = watch.coverage
    (note,) = [note for note in status.notes if "masters" in note]
    assert note == (
        "no optimizer keeps fp32 masters of q.weight, q_norm.weight, k.weight, k_norm.weight (bfloat16): "
        "updates below 2^-9 of a weight are not seen"
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stop", [12, 13, 15, 19])
def test_a_run_that_is_resumed_reads_and_judges_as_one_that_never_stopped(stop: int) -> None:
    end, judged = 41, []

    class Listener:
        def update(self, step, readings, sites):
            judged[-1].append((step, sorted((r.metric, r.site or "", r.values.tolist()) for r in readings)))
            return []

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    def begin() -> Run:
        judged.append([])
        return Run(watch_of(monitors=["spectra", "optim"], detectors=[Listener()]))

    whole = begin()
    whole.train(end)
    wanted = spectra_of(whole.watch)
    whole.watch.close()
    file, first = io.BytesIO(), begin()
    first.train(stop)
    first.save(file)
    early = spectra_of(first.watch)
    first.watch.close()
    second = begin()
    second.load(file)
    second.train(end)
    late = spectra_of(second.watch)
    second.watch.close()
    assert wanted.keys() == late.keys()
    for key, (at, values) in wanted.items():
        before = early.get(key, (np.empty(0, int), np.empty((0, *values.shape[1:]))))
        np.testing.assert_array_equal(np.concatenate([before[0], late[key][0]]), at)
        np.testing.assert_array_equal(np.concatenate([before[1], late[key][1]]), values)
    assert [of[0] for of in judged[0]] == [step for step, _ in (*judged[1], *judged[2])]
    assert repr(judged[0]) == repr(judged[1] + judged[2])


def test_of_a_dtensor_this_ranks_part_of_the_master_is_read_without_a_collective(one_process, monkeypatch) -> None:
    mesh = init_device_mesh("cpu", (1,))
    (plain,) = weights((32, 32))
    (wide,) = masters_of([plain])
    parameter = nn.Parameter(DTensor.from_local(plain.detach(), mesh, [Shard(0)], run_check=False))
    master = DTensor.from_local(wide.detach(), mesh, [Shard(0)], run_check=False)
    optimizer, masters = Own([parameter], [master]), Masters()
    masters.met(optimizer)
    monkeypatch.setattr(DTensor, "redistribute", None)  # what a collective on a DTensor begins with
    monkeypatch.setattr(DTensor, "full_tensor", None)
    for _ in range(3):
        found = masters.read(parameter)
        assert type(found) is Tensor
        assert found.data_ptr() == wide.data_ptr()
    del optimizer, master, wide
    gc.collect()
    assert masters.read(parameter) is parameter
