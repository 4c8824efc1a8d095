"""When each site is measured and against what, what is kept for that, and the router formulas against brute force."""

from __future__ import annotations

import gc
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from projections import LAYOUTS, Projection, rows, separate, view

from foreshock.monitors import RouterWeights, Spectra
from foreshock.monitors import spectra as module
from foreshock.monitors.increments import PEAKS, UPDATE_RATIO
from foreshock.monitors.metrics import metric
from foreshock.records import Array, Site, Stage

NORM = "attention/delta2_norm"


def some(count: int) -> list[Projection]:
    return [separate(f"site{i}", heads=2, groups=1, d=12, h=3, seed=i) for i in range(count)]


def sites_of(projections: Iterable[Projection]) -> list[Site]:
    return [projection.site for projection in projections]


def move(projections: Iterable[Projection], step: int) -> None:
    """A small update that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for projection in projections:
            for p in projection.parameters:
                p += 1e-3 * torch.randn(p.shape, generator=generator).to(p.dtype)


def steps(
    spectra: Spectra, projections: Sequence[Projection], upto: int, start: int = 0
) -> dict[tuple[int, str, str | None], Array]:
    """Train and update at every step: values by step, metric and site."""
    found = {}
    for step in range(start, upto):
        move(projections, step)
        found |= {(step, r.metric, r.site): r.values for r in spectra.update(step, sites_of(projections))}
    return found


def held(spectra: Spectra) -> list[int]:
    return [len(turn.ring) for turn in spectra._turns.values()]


def test_windows_carry_a_suffix_and_wait_for_their_history() -> None:
    (site,) = some(1)
    seen: dict[int, set[str]] = {}
    for step, name, _ in steps(Spectra(windows=(10, 50)), [site], 61):
        seen.setdefault(step, set()).add(name)
    assert list(seen) == [10, 20, 30, 40, 50, 60]
    assert not any("@50" in name for step in (10, 20, 30, 40) for name in seen[step])
    assert {name for name in seen[50] if "@" in name} == {
        f"{n}@50" for n in seen[40] if n not in (*PEAKS, UPDATE_RATIO)
    }
    assert all(metric(name).axis in ("heads", "scalar") for name in seen[60])


@pytest.mark.parametrize("count", [1, 7, 23])
@pytest.mark.parametrize(
    ("windows", "stride"), [((10, 50), None), ((10,), None), ((4, 6, 10), None), ((50, 10), 10), ((10, 25), 20)]
)
def test_no_step_pays_for_all_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, count: int, windows: tuple[int, ...], stride: int | None
) -> None:
    """With a stride of 1 every site is measured at every step: what to compare with."""
    read: Counter[int] = Counter()
    spread = Spectra(windows, stride)
    take = module._factors
    monkeypatch.setattr(module, "_factors", lambda *args: read.update([spread._last]) or take(*args))
    found = steps(spread, some(count), 75)
    monkeypatch.undo()
    at_once = steps(Spectra(windows, 1), some(count), 75)
    every = spread.stride
    bound = math.ceil(count * len(windows) / every) + 1
    turns: dict[tuple[str, str | None], list[int]] = {}
    for step, name, site in found:
        turns.setdefault((name, site), []).append(step)
    assert max(Counter(step for (name, _), at in turns.items() if name == NORM for step in at).values()) <= bound
    assert max(read.values()) <= max(bound, len(windows) * math.ceil(count / every))
    for (name, _), at in turns.items():
        window = int(name.partition("@")[2] or windows[0])
        assert np.diff(at).tolist() == [every] * (len(at) - 1)
        assert window <= at[0] < window + every  # as soon as its turn allows
    assert turns.keys() == {(name, site) for _, name, site in at_once}
    for key, values in found.items():
        np.testing.assert_allclose(values, at_once[key], rtol=1e-9)


@pytest.mark.parametrize(
    ("windows", "stride", "copies"),
    [
        ((10, 50), None, 5),
        ((10,), None, 1),
        ((50,), None, 1),
        ((10, 25), None, 4),
        ((10, 50), 50, 2),
        ((4, 6), None, 3),
    ],
)
def test_no_more_is_kept_than_the_windows_need(windows: tuple[int, ...], stride: int | None, copies: int) -> None:
    """Between two turns; at its turn a site has one more."""
    spectra, projections, most = Spectra(windows, stride), some(3), 0
    for step in range(130):
        spectra.update(step, sites_of(projections))
        most = max(most, *held(spectra))
    assert most == copies


def test_weights_of_16_bits_are_kept_in_16_bits() -> None:
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        (site,), spectra = some(1), Spectra(windows=(10,))
        for p in site.parameters:
            p.data = p.data.to(dtype)
        spectra.update(0, [site.site])
        (entry,) = spectra._turns["site0"].ring
        assert {x.element_size() for x in (entry.factors.q[0], entry.factors.k[0])} == {size}


def test_turns_are_on_the_sampled_step_and_right_before_it() -> None:
    spectra = Spectra(windows=(10,))
    spectra.update(0, sites_of(projections := some(12)))
    assert [turn.slot for turn in spectra._turns.values()] == [0, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 9]
    more = [*projections, separate("late", heads=2, groups=1, d=12, h=3, seed=99)]
    spectra.update(1, sites_of(more))
    assert spectra._turns["late"].slot == 8


def test_where_steps_go_by_unseen_what_fell_due_is_done_and_ages_stay_exact() -> None:
    projections, spectra = some(3), Spectra(windows=(10,))
    norms: dict[int, int] = {}
    for step in range(61):
        move(projections, step)
        if step % 5 == 0 and step != 30:
            found = [r for r in spectra.update(step, sites_of(projections)) if r.metric == NORM]
            norms[step] = len(found)
    # Slots 0, 9 and 8: the last two are due at 9, 8, 19, 18 and done at 10, 20. At 40, the base of 30 is missing.
    assert norms == {0: 0, 5: 0, 10: 1, 15: 0, 20: 3, 25: 0, 35: 0, 40: 0, 45: 0, 50: 3, 55: 0, 60: 3}


def test_sites_that_share_weights_share_a_turn() -> None:
    one, other = some(2)
    twin = replace(one.site, id="twin")
    spectra, sites = Spectra(windows=(10,)), [one.site, twin, other.site]
    found: dict[str | None, Array] = {}
    for step in range(20):
        move([one], step)
        found |= {r.site: r.values for r in spectra.update(step, sites) if r.metric == NORM}
    assert held(spectra) == [1, 1]
    assert found.keys() == {"site0", "twin", "site1"}
    np.testing.assert_array_equal(found["site0"], found["twin"])
    assert (found["site1"] == 0).all()


def test_a_twin_that_comes_later_and_first_in_order_takes_no_turn_of_its_own() -> None:
    (one,) = some(1)
    spectra, twin = Spectra(windows=(10,)), replace(one.site, id="twin")
    for step in range(10):
        spectra.update(step, [one.site])
    assert {r.site for r in spectra.update(10, [twin, one.site])} == {"twin", "site0"}
    assert list(spectra._turns) == ["site0"]


def test_views_that_do_not_meet_are_left_out() -> None:
    (one,) = some(1)
    cut = replace(one.site, k_weight=one.site.k_weight.only(range(2)))
    spectra = Spectra(windows=(10,))
    assert all(spectra.update(step, [cut]) == [] for step in range(21))


def test_a_window_longer_than_the_run_has_no_reading() -> None:
    found = steps(Spectra(windows=(10, 500)), some(1), 100)
    assert found
    assert not any("@" in name for _, name, _ in found)


def test_a_parameter_that_is_freed_gives_up_its_turn_and_memory() -> None:
    projections, spectra = some(2), Spectra(windows=(10, 50))
    steps(spectra, projections, 75)
    sites = sites_of(projections)
    del projections[0]
    gc.collect()
    found = [r.site for step in range(75, 95) for r in spectra.update(step, sites)]
    assert set(found) == {"site1"}
    assert list(spectra._turns) == ["site1"]


def test_a_parameter_that_is_replaced_is_another_site_and_takes_the_free_turn() -> None:
    projections, spectra = some(3), Spectra(windows=(10,))
    steps(spectra, projections, 15)
    sites = sites_of(projections)
    projections[1] = separate("new", heads=2, groups=1, d=12, h=3, seed=50)
    gc.collect()
    sites.append(projections[1].site)
    found: dict[int, set[str | None]] = {}
    for step in range(15, 50):
        found[step] = {r.site for r in spectra.update(step, sites)}
    assert spectra._turns["new"].slot == 9
    assert found[20] == {"site0"}
    assert found[28] == {"site2"}
    assert found[29] == {"new"}
    assert not any("site1" in of for of in found.values())


@pytest.mark.parametrize("layout", ["heads of their own", "fused", "latent chains", "norm gains"])
def test_a_model_that_is_cast_in_mid_run_begins_anew(layout: str) -> None:
    """What the cast rounds away is no update."""
    projection, spectra = LAYOUTS[layout](), Spectra(windows=(10,))
    steps(spectra, [projection], 15)
    for p in projection.parameters:
        p.data = p.data.bfloat16()
    found = steps(spectra, [projection], 41, start=15)
    assert {step for step, _, _ in found} == {30, 40}


def test_weights_of_another_shape_begin_anew() -> None:
    (one,) = some(1)
    spectra = Spectra(windows=(10,))
    steps(spectra, [one], 15)
    q, k = (torch.nn.Parameter(torch.randn(n, 20)) for n in (6, 3))
    for old, new in zip(one.parameters, (q, k), strict=True):
        old.data = new.data
    assert {step for step, _, _ in steps(spectra, [one], 41, start=15)} == {30, 40}


@pytest.mark.parametrize("stop", [0, 7, 10, 11, 19, 23, 30, 38])
def test_a_run_that_is_saved_and_loaded_goes_on_as_if_never_stopped(stop: int) -> None:
    windows, count, end = (10, 25), 13, 70
    whole = steps(Spectra(windows), some(count), end)
    projections, first = some(count), Spectra(windows)
    before = steps(first, projections, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    del first
    second = Spectra(windows)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    after = before | steps(second, projections, end, start=stop)
    assert after.keys() == whole.keys()
    for key, values in whole.items():
        np.testing.assert_array_equal(after[key], values)


def test_after_a_resume_the_turn_of_a_site_waits_for_it_as_long_as_its_snapshots_last() -> None:
    projections, first = some(3), Spectra(windows=(10,))
    steps(first, projections, 12)
    second = Spectra(windows=(10,))
    second.load_state_dict(first.state_dict())
    assert [r.site for r in second.update(12, sites_of(projections[:1]))] == []
    found = {r.site for step in range(13, 21) for r in second.update(step, sites_of(projections))}
    assert found == {"site0", "site1", "site2"}


def test_reading_leaves_autograd_alone() -> None:
    (one,) = some(1)
    spectra = Spectra(windows=(10,))
    steps(spectra, [one], 11)
    assert all(p.requires_grad and p.grad is None for p in one.parameters)
    assert not any(
        x.requires_grad for t in spectra._turns.values() for e in t.ring for x in (*e.factors.q, *e.factors.k)
    )


def test_what_is_read_may_stand_elsewhere() -> None:
    """A reader gives masters in the parameters' place."""
    (narrow,), (wide,) = some(1), some(1)
    masters = {id(p): master for p, master in zip(narrow.parameters, wide.parameters, strict=True)}
    for p in narrow.parameters:
        p.data = p.data.bfloat16()
    through, directly = Spectra(windows=(10,), read=lambda p: masters[id(p)]), Spectra(windows=(10,))
    for step in range(11):
        move([wide], step)
        found, wanted = (s.update(step, [of.site]) for s, of in ((through, narrow), (directly, wide)))
    assert wanted
    for got, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got.values, expected.values)


def test_router_weights_match_brute_force() -> None:
    generator = torch.Generator().manual_seed(8)
    weight = torch.nn.Parameter(torch.randn(6, 16, generator=generator) + 0.5)
    found = {r.metric: r.values[0] for r in RouterWeights().update(0, [router(weight)])}
    rows = weight.detach().double().numpy()
    norms = np.linalg.norm(rows, axis=1)
    pairs = [rows[i] @ rows[j] / norms[i] / norms[j] for i, j in itertools.permutations(range(6), 2)]
    mean = rows.mean(0)
    share = np.linalg.svd(rows, compute_uv=False) ** 2
    share /= share.sum()
    expected = {
        "router/similarity": np.mean(pairs),
        "router/conditioning": max(np.linalg.norm(row - mean) for row in rows) / np.linalg.norm(mean),
        "router/effective_rank": np.exp(-(share * np.log(share)).sum()),
        "router/row_norm_min": norms.min(),
        "router/row_norm_max": norms.max(),
        "router/row_norm_mean": norms.mean(),
    }
    assert found == pytest.approx(expected, rel=1e-10)


def test_a_dead_router_row_gives_no_similarity_rather_than_an_error() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 8))
    with torch.no_grad():
        weight[1] = 0
    found = {r.metric: r.values[0] for r in RouterWeights().update(0, [router(weight)])}
    assert np.isnan(found["router/similarity"])
    assert found["router/row_norm_min"] == 0


def router(weight: torch.Tensor) -> Site:
    rows_of = view([weight], Stage(rows(0, 1, weight.shape[0]), (0,), (0,)))
    return Site("r", "r", "router", "test", experts=weight.shape[0], top_k=2, weight=rows_of)
