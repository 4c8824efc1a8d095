"""The cost model of large jobs counts what is sent: held to sizes counted by hand, and to those of a job that was run."""

from __future__ import annotations

import numpy as np
import pytest
from fleet import Layer, Network, agreement, flush, merging_of, of_many, trained
from simulated import Simulated

from foreshock.apart import LOSS, trends_of
from foreshock.gradients import WHOLE
from foreshock.shards import Local, is_told

RANKS, LAYERS = 8, 3


@pytest.fixture(scope="module")
def layer() -> Layer:
    return trained(experts=4, heads=2)


def counted(layer: Layer, local: Local) -> tuple[int, int]:
    """Numbers that are added and numbers that are compared, by the rules of docs/ranks.md."""
    added, compared = 1, 2  # ranks with news; the step, twice
    for instance, sums in local.sums.items():
        maxima = {(probe.name, name) for probe in instance.probes for name in probe.maxima}
        found = {r.metric: r.values for r in layer.watch.collector.finished(instance, sums)}
        own = len(trends_of(found))
        added += 1 + 3 * own + sum(len(of) for name, of in sums.items() if name not in maxima)
        compared += own + sum(len(of) for name, of in sums.items() if name in maxima)
        compared += sum(len(of) for name, of in found.items() if is_told(name))
    for (metric, *_), of in local.loose.items():
        added += (1 + len(of)) * (metric != WHOLE) + 3 * (metric == LOSS)
        compared += metric == LOSS
    return added, compared


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_a_flush_is_two_reductions_of_as_many_numbers_as_are_counted(layer: Layer, layers: int) -> None:
    local = of_many(layer.local, layers)
    calls, host = flush(layer, local, RANKS)
    assert calls == [("all_reduce", 8 * numbers) for numbers in counted(layer, local)]
    assert host > 0


def test_one_layer_is_as_large_as_in_the_job_that_was_run(layer: Layer) -> None:
    """Everything that is read beside the sites included."""
    merging = layer.watch.collector.merging
    assert merging is not None
    calls, _ = flush(layer, of_many(layer.local, 1), RANKS)
    assert [nbytes for _, nbytes in calls] == [8 * size for size in merging._layout.sizes]
    told = {metric for metric, *_ in merging._layout.loose}
    assert told >= {"run/loss", "optim/grad_square_of_shards", "router/row_norm_max", "attention/delta2_norm@50"}


@pytest.mark.parametrize("stages", [1, LAYERS])
def test_an_agreement_is_a_gather_and_a_broadcast_for_each_text(layer: Layer, stages: int) -> None:
    """Of each stage there is one of sites and one of readings beside them; and one of prints, alike here."""
    merging, local = merging_of(layer, of_many(layer.local, LAYERS // stages)), of_many(layer.local, LAYERS // stages)
    with Simulated(RANKS).running():
        merging.launch(local)
        sites, loose, prints = (len(text) for text in merging._description())
    for ranks in (LAYERS * RANKS, 64 * LAYERS * RANKS):
        calls, _ = agreement(layer, LAYERS, ranks, stages)
        assert calls == [
            ("all_gather", 192),
            *(("broadcast", size) for size in stages * [sites] + stages * [loose] + [prints]),
        ]


def test_ranks_that_hold_weights_between_them_tell_no_more_the_more_there_are(layer: Layer) -> None:
    """One of them tells prints of weights, and each that has turns the readings of its own sites."""
    whole, _ = agreement(layer, LAYERS, 64)
    few, many = (agreement(layer, LAYERS, ranks, sharded=True)[0] for ranks in (64, 4096))
    assert few == many
    sites = 2 * LAYERS  # an attention and a router each
    assert len(few) == 1 + 2 + (sites + 1) + 1
    assert sum(size for _, size in few) < 3 * sum(size for _, size in whole)


def test_ranks_that_are_alike_have_the_mean_of_one(layer: Layer) -> None:
    local = of_many(layer.local, LAYERS)
    with Simulated(RANKS).running() as job:
        merging = merging_of(layer, local)
        merging.launch(local)
        whole = merging.receive()
    assert [name for name, _ in job.calls] == [
        *("all_reduce", "all_reduce", "all_gather", *["broadcast"] * 3, "all_reduce", "all_reduce")
    ]
    readings = {(r.metric, r.site): r.values for at, of in whole.readings if at == local.step for r in of}
    for instance, sums in local.sums.items():
        for one in layer.watch.collector.finished(instance, sums):
            if one.metric in ("attention/q_rms", "attention/entropy", "router/entropy", "router/load"):
                np.testing.assert_allclose(readings[one.metric, one.site], one.values, rtol=1e-12)
    assert readings["run/loss", None] == local.loose["run/loss", None, 0]


def test_the_network_is_what_it_is_said_to_be() -> None:
    network = Network(latency=1.0, bandwidth=10.0)
    assert network.ring(80, 4) == 2 * 3 + 2 * 3 / 4 * 8
    assert network.tree(80, 4) == 2 * 2 + 2 * 8
    assert network.gather(10, 4) == 3 * (1 + 1)
    assert network.broadcast(10, 4) == 2 * (1 + 1)
