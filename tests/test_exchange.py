"""What ranks tell each other of themselves, of one process that is all of them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed

import foreshock.exchange
from foreshock.errors import ForeshockError
from foreshock.exchange import CARD, card, exchange, shown


@pytest.fixture
def job(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_card_tells_a_host_and_stands_for_ranks() -> None:
    cards = [card(()), card((0, 1), "there"), card([0, 1], "x" * 200), card((0, 2), "größe" * 20)]
    assert {len(one) for one in cards} == {CARD}
    hosts, spans = shown(cards)
    assert hosts[:3] == [socket.gethostname(), "there", "x" * 64]
    assert hosts[3].startswith("größe")
    assert spans[0] == b""
    assert spans[1] == spans[2] != spans[3]


@pytest.mark.usefixtures("job")
def test_texts_of_each_kind_come_with_the_ranks_that_have_them() -> None:
    texts = json.dumps({"a": "ü"}), json.dumps([])
    cards, found = exchange(None, texts, card((), "here"), 10.0)
    assert cards == [card((), "here")]
    assert found == [[({"a": "ü"}, [0])], [([], [0])]]


@pytest.mark.usefixtures("job")
def test_more_text_than_a_rank_can_hold_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreshock.exchange, "MOST", 100)
    texts = json.dumps("x" * 98), json.dumps([])
    with pytest.raises(ForeshockError, match=r"1 ranks merge: .* 2 different texts, .*merge=False"):
        exchange(None, texts, b"", 10.0)
    exchange(None, (json.dumps("x" * 96), texts[1]), b"", 10.0)
