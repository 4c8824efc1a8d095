"""What is read around an optimizer step, against float64 arithmetic on the optimizer's own tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from foreshock.monitors.step_monitor import FAMILIES, StepMonitor
from foreshock.records import Site, Stage, WeightView

D, HEADS, KV, H, E, F = 12, 4, 2, 3, 4, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Model:
    """A fused query and key weight, heads interleaved, a router, and its experts in two parameters."""

    def __init__(self, dtype: torch.dtype = torch.float32, heads: int = HEADS) -> None:
        g = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=g).to(dtype))

        self.qk, self.router = weight((heads + KV) * H, D), weight(E, D)
        self.up, self.down = weight(E, D, F), weight(F, D, E)
        self.heads = heads

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.qk, self.router, self.up, self.down]

    def sites(self) -> list[Site]:
        every = np.arange((self.heads + KV) * H)
        q = every[: self.heads * H].reshape(H, self.heads).T.copy()  # a head's channels are not neighbours
        k = every[self.heads * H :].reshape(KV, H)
        last = Stage(np.arange(E)[:, None], (2,), tuple(range(E)))
        first = Stage(np.arange(E)[:, None], (0,), tuple(range(E)))
        experts = {"expert_weight_0": _view(self.up, first), "expert_weight_1": _view(self.down, last)}
        attention = Site("attention:a", "a", "attention", "", q_weight=_head(self.qk, q), k_weight=_head(self.qk, k))
        router = Site(
            "router:r", "r", "router", "", weight=_head(self.router, np.arange(E)[None]), weights=experts, experts=E
        )
        return [attention, router]

    def rows(self, of: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
        """``[heads, n]`` of each weight, float64, of ``of(parameter)``."""
        qk = of(self.qk).detach().double()
        q = qk[: self.heads * H].reshape(H, self.heads, D).transpose(0, 1)
        found = {"q": q.flatten(1), "k": qk[self.heads * H :].reshape(KV, -1)}
        found |= {"router": of(self.router).detach().double()}
        halves = (of(self.up).detach().double(), of(self.down).detach().double().movedim(-1, 0))
        return found | {"experts": torch.cat([x.flatten(1) for x in halves], 1)}


def _view(parameter: Tensor, stage: Stage) -> WeightView:
    return WeightView(("w",), (stage,), (weakref.ref(parameter),))


def _head(parameter: Tensor, index: np.ndarray) -> WeightView:
    return _view(parameter, Stage(index, (0,), tuple(range(len(index)))))


def gradients(model: Model, seed: int) -> None:
    """Some rows never get one."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        drawn = torch.randn(p.shape, generator=g) * 10 ** torch.randn(p.shape, generator=g)
        p.grad = torch.where(torch.arange(p.shape[-1]) < 2, 0.0, drawn).to(p.dtype)


def step(
    monitor: StepMonitor, number: int, optimizer: torch.optim.Optimizer, sites: list[Site]
) -> dict[str, np.ndarray]:
    monitor.before(optimizer, sites)
    optimizer.step()
    monitor.after(number, optimizer, sites)
    return {f"{r.metric}@{r.site.partition(':')[0]}": r.values for r in monitor.update(number, sites)}


def close(got: np.ndarray, wanted: object, rtol: float = 2e-6) -> None:
    np.testing.assert_allclose(got, np.asarray(wanted, dtype=np.float64).reshape(-1), rtol=rtol)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_and_updates(dtype: torch.dtype, heads: int) -> None:
    model = Model(dtype, heads)
    monitor, sites = StepMonitor(["gradients", "updates", "experts"]), model.sites()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(3):
        gradients(model, number)
        before = model.rows()
        got = step(monitor, number, optimizer, sites)
        after, grads = model.rows(), model.rows(lambda p: p.grad)
        for name, site in (("q", "attention"), ("k", "attention"), ("router", "router")):
            close(got[f"gradient/{name}_norm@{site}"], grads[name].norm(dim=1))
            moved = (after[name] - before[name]).norm(dim=1)
            close(got[f"update/{name}_ratio@{site}"], moved / before[name].norm(dim=1))
        moved = (after["experts"] - before["experts"]).norm(dim=1)
        close(got["expert/update_norm@router"], moved)
        close(got["expert/update_ratio@router"], moved / before["experts"].norm(dim=1))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_state_of_adam(dtype: torch.dtype, amsgrad: bool) -> None:
    model = Model(dtype)
    monitor, sites = StepMonitor(["adam"]), model.sites()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.9), eps=1e-7, amsgrad=amsgrad)
    for number in range(1, 5):
        gradients(model, number if number < 3 else 3)
        got = step(monitor, number, optimizer, sites)
        states = {key: model.rows(lambda p, key=key: optimizer.state[p][key]) for key in ("exp_avg", "exp_avg_sq")}
        top = model.rows(lambda p: optimizer.state[p]["max_exp_avg_sq"]) if amsgrad else states["exp_avg_sq"]
        for site, names in (("attention", ("q", "k")), ("router", ("router",))):
            m, v, largest = ([rows[n] for n in names] for rows in (states["exp_avg"], states["exp_avg_sq"], top))
            close(got[f"adam/exp_avg_rms@{site}"], [x.square().mean().sqrt() for x in m])
            close(got[f"adam/exp_avg_sq_rms@{site}"], [x.square().mean().sqrt() for x in v])
            size = [(a / (1 - 0.8**number)).abs() / (b / (1 - 0.9**number)).sqrt() for a, b in zip(m, v, strict=True)]
            agree = [((s - 1).abs() <= 0.1).sum() / (b > 0).sum() for s, b in zip(size, v, strict=True)]
            close(got[f"adam/sign_agreement@{site}"], agree)
            divided = [(x / (1 - 0.9**number)).sqrt() + 1e-7 for x in largest]
            close(got[f"adam/denominator_min@{site}"], [x.min() for x in divided], rtol=1e-5)
            close(got[f"adam/denominator_max@{site}"], [x.max() for x in divided], rtol=1e-5)
            close(got[f"adam/step@{site}"], [number] * len(names))
        if number == 1:
            close(got["adam/sign_agreement@router"], 1)  # |m^| = sqrt(v^) after one step


def test_a_count_of_steps_may_be_a_number() -> None:
    """PyTorch counts in a tensor, others do not."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor, sites = StepMonitor(["adam"]), model.sites()
    gradients(model, 0)
    first = step(monitor, 0, optimizer, sites)
    for state in optimizer.state.values():
        state["step"] = int(state["step"])
    monitor.after(1, optimizer, sites)
    again = monitor.update(1, sites)
    assert [r.values.tolist() for r in again] == [values.tolist() for values in first.values()]


def test_zeros_and_non_finite_gradients() -> None:
    model = Model()
    monitor, sites = StepMonitor(FAMILIES), model.sites()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    got = step(monitor, 0, optimizer, sites)
    assert not got["gradient/q_norm@attention"].any()
    assert not got["update/q_ratio@attention"].any()
    assert not got["expert/update_norm@router"].any()
    assert np.isnan(got["adam/sign_agreement@attention"]).all()
    np.testing.assert_allclose(got["adam/denominator_min@router"], [1e-8])
    model.qk.grad[0, 0] = torch.nan  # head 0 of the query
    model.qk.grad[HEADS * H, 0] = torch.inf  # head 0 of the key
    got = step(monitor, 1, optimizer, sites)
    np.testing.assert_array_equal(np.isnan(got["gradient/q_norm@attention"]), [True, False, False, False])
    np.testing.assert_array_equal(got["gradient/k_norm@attention"], [np.inf, 0])
    with torch.no_grad():
        model.router.zero_()
    assert np.isnan(step(monitor, 2, optimizer, sites)["update/router_ratio@router"]).all()


def test_each_weight_is_read_from_the_optimizer_that_holds_it() -> None:
    """Two optimizers make one step; what neither holds, and what is frozen, is left out."""
    model, other = Model(), torch.nn.Parameter(torch.ones(3))
    monitor, sites = StepMonitor(FAMILIES), model.sites()
    one = torch.optim.SGD([model.qk], lr=0.1)
    two = torch.optim.AdamW([model.router, other], lr=0.1)
    gradients(model, 0)
    other.grad = torch.ones(3)
    for optimizer in (one, two):
        monitor.before(optimizer, sites)
        optimizer.step()
        monitor.after(7, optimizer, sites)
    found = {(r.metric, r.site) for r in monitor.update(7, sites)}
    assert {site for metric, site in found if metric.startswith("adam/")} == {"router:r"}
    assert {metric for metric, _ in found if not metric.startswith("adam/")} == {
        *(f"gradient/{name}_norm" for name in ("q", "k", "router")),
        *(f"update/{name}_ratio" for name in ("q", "k", "router")),
    }
    model.qk.grad = None
    monitor.before(one, sites)
    monitor.after(8, one, sites)
    assert {r.metric for r in monitor.update(8, sites)} == {"update/q_ratio", "update/k_ratio"}


def test_one_unknown_weight_of_two_is_nan() -> None:
    model = Model()
    (attention, _) = model.sites()
    alone = Site(attention.id, "a", "attention", "", k_weight=attention.k_weight)
    gradients(model, 0)
    got = step(StepMonitor(["adam"]), 0, torch.optim.AdamW(model.parameters()), [alone])
    np.testing.assert_array_equal(got["adam/step@attention"], [np.nan, 1])


def test_only_what_is_asked_for_is_copied_and_old_steps_are_dropped() -> None:
    model = Model()
    optimizer, sites = torch.optim.SGD(model.parameters(), lr=0.1), model.sites()
    gradients(model, 0)
    for families, copied in ((["gradients", "adam"], 0), (["updates"], 3), (["experts"], 2), (FAMILIES, 5)):
        monitor = StepMonitor(families)
        monitor.before(optimizer, sites)
        assert len(monitor._before) == copied
        for number in range(3):
            monitor.after(number, optimizer, sites)
        assert monitor._before == {}
        assert monitor.update(2, sites) or families == ["updates"] or families == ["experts"]
        assert monitor.update(1, sites) == []
