"""A stored run judged again says what was said while it ran."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import foreshock
from foreshock.demo.model import Config
from foreshock.demo.train import FAULTS, train
from foreshock.rejudge import rejudge


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty steps at ``every=2``, with a biased kernel in layer 1 from step 20 on."""
    path: Path = tmp_path_factory.mktemp("run") / "broken"
    torch.compiler.reset()
    with foreshock.Watch(path, every=2, inner="aot_eager") as watch:
        small = Config(hidden=32, length=32, experts=4)
        loss = lambda step, value: watch.log(loss=value)  # noqa: E731
        train(watch.backend, steps=40, seed=4, fault=FAULTS["attention"], at=20, config=small, on_step=loss)
    return path


def test_the_same_judge_says_the_same(run: Path) -> None:
    with foreshock.open_run(run) as opened:
        told = opened.alarms
        assert told
        assert told[0].step == 20
        assert rejudge(opened) == told


def test_a_sparser_sampling_hears_it_at_its_own_next_sample(run: Path) -> None:
    with foreshock.open_run(run) as opened:
        assert rejudge(opened, every=16)[0].step == 32


def test_options_reach_the_judge(run: Path) -> None:
    with foreshock.open_run(run) as opened:
        said = rejudge(opened, kernel_dtype="float64")
    assert said[0].step < 20, "no bfloat16 kernel is as exact as float64"
