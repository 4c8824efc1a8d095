"""How ranks meet: at one step, without waiting for one that is still to come, and with a word where it never does."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from torch import distributed

from foreshock import _torch
from foreshock.errors import ForeshockError
from foreshock.meeting import AHEAD, PATIENCE, Meeting

Came = Callable[..., bool]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Came]:
    """Three ranks of a job, in one process."""
    store = distributed.HashStore()
    monkeypatch.setattr(_torch, "job_store", lambda: store)

    def rank() -> Came:
        meeting = Meeting(3)

        def comes(step: int, timeout: float = 0.1, last: bool = False) -> bool:
            if meeting._number < 0:
                monkeypatch.setattr(Meeting, "_made", 0)  # each is the first of its own process
            return meeting.begins(step, timeout, last)

        return comes

    return [rank() for _ in range(3)]


def test_all_begin_at_one_step_and_nobody_waits_for_the_last(ranks: list[Came]) -> None:
    begun: list[list[int]] = [[], [], []]
    start = time.monotonic()
    for step in range(9):
        for number, comes in enumerate(ranks):
            if (number < 2 or step >= 3) and comes(step, timeout=60.0):
                begun[number].append(step)
    assert begun == [list(range(3 + AHEAD, 9))] * 3
    assert time.monotonic() - start < 30


def test_a_rank_that_never_comes_is_waited_for_once_and_nobody_begins(ranks: list[Came]) -> None:
    first, second, third = ranks
    for step in range(PATIENCE):
        assert not first(step)
    with pytest.raises(ForeshockError, match=r"0\.1 s not all 3 ranks had come to their watch; make it on every rank"):
        first(PATIENCE)
    start = time.monotonic()
    for late in (second, third):
        with pytest.raises(ForeshockError, match="merge=False"):
            late(1, timeout=60.0) or late(2, timeout=60.0)
    assert time.monotonic() - start < 30


def test_at_the_end_a_rank_waits_for_the_others(ranks: list[Came]) -> None:
    assert not ranks[0](0)
    assert not ranks[1](0)
    assert ranks[2](5, last=True)
    assert ranks[0](1, timeout=60.0, last=True)
    assert not ranks[1](5)
    assert ranks[1](5 + AHEAD)


def test_a_store_that_fails_once_is_asked_again(ranks: list[Came], monkeypatch: pytest.MonkeyPatch) -> None:
    store = _torch.job_store()

    def unreachable() -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(_torch, "job_store", unreachable)
    assert not ranks[0](0)
    with pytest.raises(ConnectionError):
        ranks[0](PATIENCE)
    monkeypatch.setattr(_torch, "job_store", lambda: store)
    for step in range(1, 1 + AHEAD):
        assert [comes(step) for comes in ranks] == [False] * 3
    assert [comes(1 + AHEAD) for comes in ranks] == [True] * 3
