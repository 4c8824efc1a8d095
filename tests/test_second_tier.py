"""The second tier end to end: off unless asked for, and when it is on nothing of the training changes.

One thread, as in test_bitwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, tokens
from test_bitwise import Block, batches, language, loss_of, ordinary, train
from test_counters import SHAPES, counted
from test_counters import train as train_lengths
from torch.fx import GraphModule

from foreshock import ConfigError, Watch
from foreshock.config import FIRST_TIER, SECOND_TIER, Settings
from foreshock.monitors.attention_probe import ATTENTION
from foreshock.monitors.metrics import METRICS, family, metric
from foreshock.monitors.router_probe import ROUTER
from foreshock.monitors.second_tier import KINDS, ROWS

pytestmark = pytest.mark.usefixtures("one_thread")


def of_second_tier(watch: Watch) -> dict[str, set[str]]:
    """Recorded metrics of the second tier, by family."""
    found: dict[str, set[str]] = {}
    for name in watch.metrics():
        if family(name) in SECOND_TIER:
            found.setdefault(family(name), set()).add(name)
    return found


# -- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, FIRST_TIER),
        ([object()], FIRST_TIER),
        ("default", FIRST_TIER),
        ("all", (*FIRST_TIER, *SECOND_TIER)),
        ("adam", ("adam",)),
        (["default", "residual"], (*FIRST_TIER, "residual")),
        (["laws", "experts"], ("laws", "experts")),
    ],
)
def test_families_by_name(given: Any, wanted: Sequence[str]) -> None:
    with Watch(settings=Settings(), monitors=given) as watch:
        assert watch.families == set(wanted)


def test_an_unknown_family_is_named_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"names 'activation' \(did you mean activations.*there are laws, .*experts"):
        Watch(settings=Settings(), monitors=["default", "activation"])
    monkeypatch.setenv("FORESHOCK_MONITORS", "default,gradents")
    with pytest.raises(ConfigError, match=r"FORESHOCK_MONITORS: monitors names 'gradents' \(did you mean gradients"):
        Watch()
    monkeypatch.setenv("FORESHOCK_MONITORS", "default,gradients")
    with Watch() as watch:
        assert watch.families == {*FIRST_TIER, "gradients"}


def test_every_metric_of_the_tier_is_registered() -> None:
    names = {f"{kind}/{row[0]}" for kind, rows in ROWS.items() for row in rows}
    assert names <= {entry.name for entry in METRICS}
    assert {family(name) for name in names} == set(SECOND_TIER) == set(KINDS.values())
    for name in names:
        entry = metric(name)
        assert all((entry.formula, entry.axis, entry.merge, entry.source, entry.meaning)), name


# -- off -----------------------------------------------------------------------------------------------------------------


def graphs_of(**options: Any) -> tuple[list[list[str]], int, Watch]:
    """The nodes of every graph that reaches the inner compiler, the size of what comes back, and the watch."""
    seen: list[list[str]] = []
    sizes = []

    def inner(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        seen.append([f"{node.op} {node.target} {node.args} {node.kwargs}" for node in gm.graph.nodes])

        def run(*args: Any) -> Any:
            results = gm(*args)
            sizes.append(results[-1].numel())
            return results

        return run

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = FAMILIES["olmoe"].make().train()
    with Watch(settings=Settings(), every=1, inner=inner, strict=True, detectors=[], **options) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        optimizer = torch.optim.AdamW(model.parameters())
        compiled(**tokens(torch.Generator().manual_seed(1))).loss.backward()
        optimizer.step()
    (size,) = sizes
    return seen, size, watch


def test_off_by_default_not_a_node_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default's graphs are, to the letter, those that the first tier's own two probes give."""
    own = {probe.kind: probe for probe in (ATTENTION, ROUTER)}
    nodes, size, watch = graphs_of()
    assert watch.probes_for("attention") == (ATTENTION,)
    assert watch.probes_for("router") == (ROUTER,)
    assert of_second_tier(watch) == {}
    assert all(not status.site.weights and not status.notes for status in watch.coverage)
    assert watch.collector.steps == []
    monkeypatch.setattr("foreshock.watch.built_in", lambda families: tuple(own.values()))
    assert graphs_of()[:2] == (nodes, size)
    assert graphs_of(monitors=["gradients", "adam", "updates", "experts"])[:2] == (nodes, size)
    monkeypatch.undo()
    grown, larger, _ = graphs_of(monitors=["default", "activations", "residual"])
    assert list(map(len, grown)) == list(map(len, nodes))  # one op a site, which computes more
    assert larger - size == 2 * (
        4 * (5 + 3 * 4) + (5 + 3 * 4) + 2 * 32 + 2
    )  # two layers: q, k, v, out; input; the stream


# -- on ------------------------------------------------------------------------------------------------------------------

WANTED = {
    "llama": {"activations": 7, "residual": 5, "gradients": 2, "adam": 6, "updates": 2},
    "olmoe": {"activations": 7, "residual": 5, "gradients": 3, "adam": 6, "updates": 3, "experts": 2},
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", WANTED)
def test_training_is_bitwise_the_same(name: str, inner: str) -> None:
    build = language()(name)
    plain = train(build, ordinary, inner)
    with Watch(every=2, inner=inner, strict=True, detectors=[], monitors="all") as watch:
        watched = train(build, ordinary, watch.backend)
    assert [key for key, value in plain.items() if not torch.equal(value, watched[key])] == []
    assert watch.coverage.warnings == ()
    assert all(status.notes == () for status in watch.coverage)
    found = of_second_tier(watch)
    assert {key: len(names) for key, names in found.items()} == WANTED[name]
    for metric_name in (one for names in found.values() for one in names):
        at = [site for site in watch.sites if site.id in watch.collector.store.sites_of(metric_name)]
        assert at
        for site in at:
            steps, values = watch.series(metric_name, site.id)
            assert steps.tolist() == [0, 2, 4], metric_name
            assert np.isfinite(values).all(), metric_name


@pytest.mark.parametrize(("name", "shapes"), [("llama", "second-length"), ("olmoe", "dynamic")])
def test_dynamo_counts_the_same(name: str, shapes: str) -> None:
    lengths, options = SHAPES[shapes]
    sections = ("frames", "stats", "graph_break", "unimplemented", "recompiles", "recompile_limit")
    found = []
    for monitors in ("default", "all"):
        with Watch(every=2, inner="aot_eager", strict=True, detectors=[], monitors=monitors) as watch:
            found.append(counted(sections, lambda w=watch: train_lengths(name, w.backend, lengths, **options)))
    assert found[0] == found[1]
    assert found[1]["stats"]["unique_graphs"] > 0


def test_names_of_sites_do_not_depend_on_the_families() -> None:
    ids = [[site.id for site in graphs_of(monitors=monitors)[2].sites] for monitors in ("default", "all")]
    assert ids[0] == ids[1]


def test_under_inductor_the_numbers_are_the_same() -> None:
    series = []
    for inner in ("eager", "inductor"):
        with Watch(every=2, inner=inner, strict=True, detectors=[], monitors="all") as watch:
            train(lambda: Block(dropout=0.0), ordinary, watch.backend)
        (site,) = watch.sites
        series.append({n: watch.series(n, site.id)[1] for names in of_second_tier(watch).values() for n in names})
    assert series[0].keys() == series[1].keys()
    for name in series[0]:
        np.testing.assert_allclose(series[1][name], series[0][name], rtol=1e-4, err_msg=name)


def test_accumulated_gradients_and_merged_activations() -> None:
    """Three microbatches of one step, by hand: one sample of all their tokens, and the gradient that the step took."""
    kept: list[Any] = []

    def loop(model: Any, compiled: Any) -> list[torch.Tensor]:
        draw, optimizer, losses = batches(model), torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(2):
            seen = [draw() for _ in range(3)]
            for batch in seen:
                loss = loss_of(compiled, batch) / 3
                loss.backward()
                losses.append(loss.detach())
            with torch.no_grad():
                tensors = [model(**batch) for batch in seen]
            before = model.q.weight.detach().double().clone()
            optimizer.step()
            kept.append(
                (tensors, model.q.weight.grad.double().clone(), before, model.q.weight.detach().double().clone())
            )
            optimizer.zero_grad()
        return losses

    families = ["activations", "residual", "gradients", "updates"]
    with Watch(every=1, inner="aot_eager", strict=True, detectors=[], monitors=families) as watch:
        train(lambda: Block(dropout=0.0), loop, watch.backend)
    (status,) = watch.coverage
    assert status.notes == (
        "no residual stream: its projected output is added to nothing that the queries are made from",
    )
    assert set(of_second_tier(watch)) == {"activations", "gradients", "updates"}
    assert {family(name) for name in watch.metrics()} == {"activations", "gradients", "updates"}
    for step, (tensors, grad, before, after) in enumerate(kept):
        q, k, out = (torch.cat([one[place] for one in tensors]).double() for place in (1, 2, 3))
        for place, x in ((0, q), (1, k), (3, out)):
            rms, kurtosis = x.square().mean().sqrt(), x.pow(4).mean() / x.square().mean().square()
            np.testing.assert_allclose(watch.series("activation/rms")[1][step, place], rms, rtol=1e-5)
            np.testing.assert_allclose(watch.series("activation/kurtosis")[1][step, place], kurtosis, rtol=1e-5)
            small = ((x.abs() < 2.0**-6) & (x != 0)).double().mean()
            np.testing.assert_allclose(
                watch.series("activation/underflow")[1][step].reshape(4, 4)[place, 2], small, rtol=1e-6
            )
        heads = grad.reshape(2, -1).norm(dim=1)
        np.testing.assert_allclose(watch.series("gradient/q_norm")[1][step], heads, rtol=1e-6)
        moved = (after - before).reshape(2, -1).norm(dim=1) / before.reshape(2, -1).norm(dim=1)
        np.testing.assert_allclose(watch.series("update/q_ratio")[1][step], moved, rtol=1e-5)


def test_the_stream_of_a_model_is_read() -> None:
    """Against the hidden states that the model itself hands out."""
    torch.manual_seed(0)
    model = FAMILIES["llama"].make().train()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 9] = 30.0
    batch = tokens(torch.Generator().manual_seed(1))
    with Watch(every=1, inner="aot_eager", strict=True, detectors=[], monitors=["residual"]) as watch:
        torch.compile(model, backend=watch.backend)(**batch).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        for layer, site in enumerate(watch.sites):
            x_TD = states[layer].double().flatten(0, 1).abs()
            values = {
                name: watch.series(f"residual/{name}", site.id)[1][0] for name in ("rms", "top_ratio", "top_channels")
            }
            np.testing.assert_allclose(values["rms"], x_TD.square().mean().sqrt(), rtol=1e-5)
            assert values["top_channels"][0] == 9
            ratio = x_TD.amax(0).max() / np.median(x_TD.mean(0).numpy())
            np.testing.assert_allclose(values["top_ratio"][0], ratio, rtol=1e-5)
            np.testing.assert_array_equal(watch.series("residual/massive_channels", site.id)[1], [1])
