"""A run beside healthy references: what differs, from when on, and what cannot be compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Layer

from foreshock import ConfigError, Run, RunError, Watch, cli, open_run
from foreshock.monitors.compare import Comparison, Departure, compare
from foreshock.records import Coverage, Reading, Site, SiteStatus
from foreshock.store import RunStore

SITES = (
    Site("attention:a", "a", "attention", "sdpa", heads=4, kv_heads=4, head_dim=8),
    Site("router:r", "r", "router", "topk", experts=8, top_k=2),
)
Change = Callable[[int, dict[str, Any]], None]


def _record(
    path: Path,
    seed: int,
    *,
    steps: range = range(0, 600, 2),
    change: Change = lambda step, values: None,
    sites: tuple[Site, ...] = SITES,
) -> Run:
    """A run whose loss falls, and whose heads and experts are noise; ``change(step, values)`` breaks it."""
    rng = np.random.default_rng(seed)
    store = RunStore(path)
    level = rng.normal(1, 0.01)
    for step in steps:
        values: dict[str, Any] = {
            "run/loss": 2 + np.exp(-step / 100) + rng.normal(0, 0.02),
            "run/tokens": 1000.0 * (step + 1),
            "optim/lr": 1e-3,
            "attention/entropy": level * rng.normal(2, 0.1, 4),
            "router/dead_experts": 0.0,
            "router/load": rng.dirichlet(np.full(8, 50.0)),
        }
        change(step, values)
        named = {"attention": "attention:a", "router": "router:r"}
        store.write(
            step,
            [
                Reading(metric, named.get(metric.split("/")[0]), np.atleast_1d(np.asarray(value, float)))
                for metric, value in values.items()
                if value is not None
            ],
        )
    store.coverage(Coverage(tuple(SiteStatus(site, 1, 1, {}) for site in sites)))
    store.close()
    return open_run(path)


def _departed(comparison: Comparison) -> dict[tuple[str, str], Departure]:
    return {(departure.metric, departure.over): departure for departure in comparison.departures}


@pytest.fixture
def references(tmp_path: Path) -> list[Run]:
    return [_record(tmp_path / f"healthy{seed}", seed) for seed in range(3)]


def _broken(step: int, values: dict[str, Any]) -> None:
    if step >= 300:
        values["attention/entropy"][2] -= 1.5
    if step >= 400:
        values["router/dead_experts"] = 1.0
    if step >= 500:
        values["run/loss"] += (step - 500) * 0.01


@pytest.mark.parametrize("count", [1, 3])
def test_departures_in_the_order_in_which_they_begin(tmp_path: Path, references: list[Run], count: int) -> None:
    comparison = compare(_record(tmp_path / "broken", 7, change=_broken), references[:count])
    assert comparison.missing == ()
    assert (comparison.sites, comparison.span) == (2, (0.0, 598.0))
    assert comparison.series == 1 + 1 + 2 + 1 + 2  # tokens are no series, heads and experts are two each
    found = _departed(comparison)
    assert [key[0] for key in found] == ["attention/entropy", "router/dead_experts", "run/loss"]
    entropy, dead, loss = found.values()
    assert entropy.over == "mean"
    assert abs(entropy.first - 300) <= 8
    assert abs(dead.first - 400) <= 8
    assert 500 <= loss.first <= 540
    assert (entropy.direction, dead.direction, loss.direction) == ("below", "above", "above")
    assert entropy.end < 0 < loss.end
    assert loss.worst == pytest.approx(loss.end, rel=0.2)
    assert loss.worst_step > 580
    assert dead.end > 1000
    assert not any(departure.started for departure in comparison.departures)


@pytest.mark.parametrize("count", [1, 3])
def test_healthy_runs_do_not_depart(tmp_path: Path, references: list[Run], count: int) -> None:
    for seed in range(10, 16):
        comparison = compare(_record(tmp_path / f"run{seed}", seed), references[:count])
        assert comparison.departures == ()


def test_another_level_is_outside_from_the_start(tmp_path: Path, references: list[Run]) -> None:
    run = _record(tmp_path / "run", 7, change=lambda step, values: values.update({"optim/lr": 2e-3}))
    (departure,) = compare(run, references).departures
    assert (departure.metric, departure.first, departure.started, departure.site) == ("optim/lr", 0, True, None)


def test_lengths_sampling_and_what_is_missing(tmp_path: Path, references: list[Run]) -> None:
    def fewer(step: int, values: dict[str, Any]) -> None:
        values["router/load"] = None
        values["router/z"] = 1.0
        _broken(step, values)

    sparse = _record(tmp_path / "sparse", 8, steps=range(0, 450, 7))
    run = _record(tmp_path / "run", 7, steps=range(100, 1000, 5), change=fewer)
    comparison = compare(run, [sparse])
    assert comparison.span == (100.0, 445.0)  # beyond, there is nothing to compare with
    assert comparison.missing == (
        "metrics of run that sparse lacks: router/z",
        "metrics of sparse that run lacks: router/load",
    )
    found = _departed(comparison)
    assert abs(found["attention/entropy", "mean"].first - 300) <= 25
    assert ("run/loss", "value") not in found  # it departs where no reference reaches
    both = compare(run, [sparse, references[0]])
    assert both.span == (100.0, 595.0)
    assert ("run/loss", "value") in _departed(both)


def test_values_that_are_not_finite(tmp_path: Path, references: list[Run]) -> None:
    def diverges(step: int, values: dict[str, Any]) -> None:
        if step >= 200:
            values["attention/entropy"][:] = np.nan  # missing, not broken
        elif step >= 100:
            values["attention/entropy"][0] = np.nan
        if step >= 500:
            values["run/loss"] = np.nan
            values["router/load"][3] = np.inf
        if step == 50:
            values["optim/lr"] = np.inf

    comparison = compare(_record(tmp_path / "run", 7, change=diverges), references)
    found = _departed(comparison)
    assert set(found) == {("run/loss", "value"), ("router/load", "mean"), ("router/load", "max")}
    assert {departure.end for departure in found.values()} == {np.inf}
    assert all(abs(departure.first - 500) <= 8 for departure in found.values())
    turned = compare(references[0], [open_run(tmp_path / "run")])  # and in a reference such samples say nothing
    assert turned.departures == ()


def test_by_tokens(tmp_path: Path) -> None:
    def twice(step: int, values: dict[str, Any]) -> None:
        """The batch is twice as large: the loss falls in half the steps."""
        values["run/tokens"] *= 2
        values["run/loss"] += np.exp(-step / 50) - np.exp(-step / 100)
        if step >= 200:
            values["router/dead_experts"] = 1.0

    reference = _record(tmp_path / "healthy", 1)
    run = _record(tmp_path / "run", 2, change=twice, steps=range(0, 300, 2))
    found = _departed(compare(run, [reference], align="tokens"))
    assert {metric for metric, _ in found} == {"router/dead_experts"}
    dead = found["router/dead_experts", "value"]
    assert abs(dead.first - 200) <= 8
    assert dead.place == 2000.0 * (dead.first + 1)
    assert compare(run, [reference]).span == (0.0, 298.0)
    assert compare(run, [reference], align="tokens").span == (2000.0, 598000.0)
    without = _record(tmp_path / "without", 3, change=lambda step, values: values.update({"run/tokens": None}))
    with pytest.raises(RunError, match="aligning without by tokens: it recorded none; log them"):
        compare(without, [reference], align="tokens")
    per_step = _record(tmp_path / "per_step", 3, change=lambda step, values: values.update({"run/tokens": 512}))
    with pytest.raises(RunError, match="does not rise at every step; log the number of tokens seen so far"):
        compare(run, [per_step], align="tokens")


def test_another_model_is_an_error(tmp_path: Path, references: list[Run]) -> None:
    wider = (Site("attention:a", "a", "attention", "sdpa", heads=8, kv_heads=4, head_dim=8), SITES[1])
    with pytest.raises(RunError, match=r"different models, a has heads 8 and 4; give a reference of the same model"):
        compare(_record(tmp_path / "wider", 5, sites=wider), references)
    other = (Site("attention:b", "b", "attention", "sdpa", heads=4), Site("router:a", "a", "router", "topk"))
    with pytest.raises(RunError, match=r"no site has the same name \(b, a and a, r\)"):
        compare(_record(tmp_path / "other", 5, sites=other), references)
    deeper = (*SITES, Site("attention:c", "c", "attention", "sdpa", heads=4))
    comparison = compare(_record(tmp_path / "deeper", 5, sites=deeper), references[:1])
    assert comparison.missing == ("sites of deeper that healthy0 lacks: c",)


def test_nothing_in_common_is_an_error(tmp_path: Path, references: list[Run]) -> None:
    with pytest.raises(RunError, match="no series of theirs has a step in common"):
        compare(_record(tmp_path / "later", 5, steps=range(5000, 5100)), references)
    with pytest.raises(ConfigError, match="give 'step' or 'tokens'"):
        compare(references[0], references[1:], align="epoch")
    with pytest.raises(ConfigError, match="there is no reference"):
        compare(references[0], [])


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["foreshock", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return int(leaving.value.code or 0)


def test_the_command(
    tmp_path: Path, references: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path / "broken", 7, change=_broken)
    healthy, broken = [tmp_path / f"healthy{seed}" for seed in range(3)], tmp_path / "broken"
    assert call(monkeypatch, "compare", *healthy, broken) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("broken beside healthy0, healthy1, healthy2: 7 series at 2 sites, step 0 to 598\n")
    assert "Alarms, with the references as baseline:" in printed
    assert "3 series end outside the references' band, 0 of them from the start (*)" in printed
    assert "1000 or more" in printed
    assert call(monkeypatch, "compare", healthy[0], broken, "--json", "--align", "tokens") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["align"]) == ("broken", "tokens")
    assert [departure["direction"] for departure in told["departures"]] == ["below", "above", "above"]
    assert isinstance(told["alarms"], list)
    assert call(monkeypatch, "compare", healthy[1], healthy[0]) == 0
    assert "No series ends outside the references' band." in capsys.readouterr().out
    assert call(monkeypatch, "compare", tmp_path / "nowhere", healthy[0]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert call(monkeypatch, "compare", healthy[0]) == 2


# -- real runs ---------------------------------------------------------------------------------------------------------


def _train(path: Path, change: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Layer()
    with Watch(path, every=1, inner="eager", strict=True) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(40):
            change(step, optimizer)
            optimizer.zero_grad()
            loss = compiled(torch.randn(4, 6, 8)).square().mean()
            loss.backward()
            optimizer.step()
            watch.log(loss=loss)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")

    def faster(step: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 1e-3 if step < 20 else 3.0

    _train(folder / "healthy")
    _train(folder / "twin")
    _train(folder / "broken", faster)
    return folder


def test_a_run_is_within_its_own_twin(trained: Path) -> None:
    comparison = compare(open_run(trained / "twin"), [open_run(trained / "healthy")])
    assert comparison.departures == ()
    assert comparison.series > 30


def test_a_learning_rate_that_jumps_is_seen_where_it_jumps(trained: Path) -> None:
    comparison = compare(open_run(trained / "broken"), [open_run(trained / "healthy")])
    found = _departed(comparison)
    assert abs(found["optim/lr", "value"].first - 20) <= 2
    assert comparison.departures[0].first >= 18
    assert {departure.site for departure in comparison.departures} > {None}


def test_a_watch_takes_one_reference_or_several(trained: Path, tmp_path: Path) -> None:
    for baseline in (trained / "healthy", str(trained / "healthy"), [trained / "healthy", str(trained / "twin")]):
        with Watch(baseline=baseline) as watch:
            given = baseline if isinstance(baseline, list) else [baseline]
            assert watch.settings.baseline == tuple(map(str, given))
    for wrong, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "holds no"), (trained, "pass one of")):
        with pytest.raises(RunError, match=message):
            Watch(tmp_path / "run", baseline=[trained / "healthy", wrong])
    with pytest.raises(ConfigError, match="baseline must be tuple"):
        Watch(baseline=[3])  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()
