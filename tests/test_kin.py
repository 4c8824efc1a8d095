"""What sites are called on many ranks, by distinct texts: the cost does not grow with sites times ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from foreshock.errors import ConfigError
from foreshock.kin import names
from foreshock.merging import Merging

RANKS = 4096
SITES = [f"attention:layers.{number}" for number in range(8)]


def text(print_: str) -> list[dict[str, Any]]:
    return [{"key": [site, 0, 0], "print": f"{print_} {site}"} for site in SITES]


def test_ranks_are_not_walked_for_each_site() -> None:
    """Two stages of the same names: whoever told the same is one list, shared by all sites."""
    first, second = list(range(RANKS // 2)), list(range(RANKS // 2, RANKS))
    here, there = names([(text("a"), first), (text("b"), second)], [b""] * RANKS)
    assert here == {site: {site: [first]} for site in SITES}
    assert there == {site: {f"{site}@{RANKS // 2}": [second]} for site in SITES}
    assert len({id(ranks) for by in here.values() for of in by.values() for ranks in of}) == 1


def test_one_text_told_by_two_stages_is_two_sites() -> None:
    """Under FSDP2 prints are None, and what tells them apart is with whom they share their weights."""
    told = [{"key": [SITES[0], 0, 0], "print": None}]
    (found,) = names([(told, [0, 1, 2, 3])], [b"x", b"y", b"x", b"y"])
    assert found == {SITES[0]: {SITES[0]: [[0, 2]], f"{SITES[0]}@1": [[1, 3]]}}


def test_a_quantity_of_another_size_is_left_out_and_said_so() -> None:
    said: list[tuple[str, Exception]] = []
    merging = Merging(lambda kind: (), lambda *args: [], fail=lambda what, error: said.append((what, error)))
    vector, key = np.zeros(4), ("attention:layers.0", 0, "attention", "q_rms")
    merging._put(vector, {key: slice(1, 3)}, key, np.ones(2))
    merging._put(vector, {}, ("elsewhere",), np.ones(5))
    assert said == []
    merging._put(vector, {key: slice(1, 3)}, key, np.full(3, 2.0))
    assert vector.tolist() == [0, 1, 1, 0]
    ((what, error),) = said
    assert what == "merging attention:layers.0 attention q_rms, which is left out"
    with pytest.raises(ConfigError, match="another size than was agreed between ranks, 3 numbers"):
        raise error
