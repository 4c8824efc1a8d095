"""Which rank stands apart, of ranks that are only numbers here; a job of four is in tests/test_merging.py."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest

from foreshock.apart import LEAST, LOSS, OF_LOSS, WINDOW, Apart, folded, trends_of
from foreshock.monitors.policy import TRENDS
from foreshock.shards import with_rank, without_rank

SITE, METRIC = "attention:layers.0", "attention/entropy_norm"


def flushes(readings: np.ndarray, loss: np.ndarray | None = None) -> list[Apart]:
    """Ranks that told each other ``readings [flushes, ranks]`` of one series, and perhaps of their losses."""
    ranks = [Apart() for _ in range(readings.shape[1])]
    for site, metric, rows in ((SITE, METRIC, readings), (None, LOSS, () if loss is None else loss)):
        tell(ranks, rows, site, metric)
    return ranks


def tell(ranks: list[Apart], rows: Iterable[np.ndarray], site: str | None, metric: str) -> None:
    for row in rows:
        told = [one.tell((site, 0), np.array([x])) for one, x in zip(ranks, row, strict=True)]
        sums = np.sum([added for added, _ in told], 0)
        largest = np.max([with_rank(far, rank) for rank, (_, far) in enumerate(told)], 0)
        for one in ranks:
            one.hear((site, 0), [metric], sums, *without_rank(largest))


def named(readings: np.ndarray) -> int | None:
    (found,) = {one.rank(METRIC, SITE) for one in flushes(readings)}  # the same on all
    return found


def noise(ranks: int, seed: int, steps: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, 0.01, (steps, ranks))


@pytest.mark.parametrize("ranks", [4, 16, 256])
@pytest.mark.parametrize("which", [0, 3])
def test_a_rank_that_departs_is_named_whatever_the_job_does(ranks: int, which: int) -> None:
    readings = 1.0 + noise(ranks, 0) + np.linspace(0, 0.3, 40)[:, None]  # all drift, slowly
    readings[30:, which] += 0.5
    assert named(readings) == which


def test_a_departure_of_all_names_nobody() -> None:
    readings = 1.0 + noise(4, 0)
    readings[30:] += np.linspace(0.1, 1.0, 10)[:, None]
    assert named(readings) is None


def test_two_of_two_ranks_differ_alike() -> None:
    readings = 1.0 + noise(LEAST - 1, 0)
    readings[30:, 1] += 5.0
    assert named(readings) is None


def test_a_few_flushes_are_too_few() -> None:
    readings = 1.0 + noise(4, 0, WINDOW // 2)
    readings[4:, 1] += 5.0
    assert named(readings) is None  # of the first there is nothing to differ from


def test_by_chance_hardly_anybody_is_named() -> None:
    assert sum(named(noise(4, seed, WINDOW + 1)) is not None for seed in range(200)) <= 4
    assert sum(named(noise(16, seed, WINDOW + 1)) is not None for seed in range(20)) == 0


def test_ranks_without_a_reading_are_none_of_the_others() -> None:
    readings = 1.0 + noise(5, 0)
    readings[30:, 2] += 0.5
    readings[:, 4] = np.nan
    assert named(readings) == 2


def test_what_no_rank_measures_by_itself_is_blamed_on_whom_the_site_or_the_loss_names() -> None:
    readings = 1.0 + noise(4, 0)
    readings[30:, 2] += 0.5
    weights, elsewhere = ("attention/delta2_norm", SITE), ("attention/delta2_norm", "attention:layers.1")
    silent, loud = flushes(readings)[0], flushes(readings, readings)[0]
    assert (silent.rank(*weights), silent.rank(*elsewhere)) == (2, None)
    assert (loud.rank(*weights), loud.rank(*elsewhere)) == (2, 2)
    assert flushes(readings, readings[:, [0, 2, 1, 3]])[0].rank(*weights) is None  # they contradict each other


def test_readings_are_told_as_they_are_judged() -> None:
    entropies = np.array([0.5, np.nan, 0.25])
    found = trends_of({METRIC: entropies, "own/thing": entropies})
    assert found == [trend for trend in TRENDS if trend.metric == METRIC]
    assert [folded(trend, entropies) for trend in found] == [0.375, 0.25]
    assert folded(OF_LOSS, np.array([np.e])) == pytest.approx(1.0)
    assert np.isnan(folded(OF_LOSS, np.array([-1.0])))
    assert np.isnan(folded(OF_LOSS, np.array([np.inf])))


def test_a_resumed_run_names_the_rank_that_one_never_stopped_would() -> None:
    readings = 1.0 + noise(4, 0)
    readings[36:, 2] += 0.5  # few of these were heard when the state was saved
    whole, before = flushes(readings), flushes(readings[:38])
    state = json.loads(json.dumps(before[0].state_dict()))
    resumed = [Apart() for _ in range(4)]
    for one in resumed:
        one.load_state_dict(state)
    tell(resumed, readings[38:], SITE, METRIC)
    assert {one.rank(METRIC, SITE) for one in (*whole, *resumed)} == {2}
    assert resumed[0].state_dict() == whole[0].state_dict()
    resumed[0].forget()
    assert resumed[0].rank(METRIC, SITE) is None
