"""What ranks tell each other of themselves, each distinct text once, and how a rank is called."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from foreshock.errors import ForeshockError

_DIGEST, _SIZE = 32, 8  # bytes that stand for a text: its digest, and its length
_SPAN, _HOST = (
    8,
    64,
)  # bytes of a card: which ranks hold a rank's weights with it, by their digest, and the name of its host
CARD = _SPAN + _HOST
MOST = (
    1 << 26
)  # bytes of all texts of a job: of longer ones a rank would have to hold some GB, and read them for some s
Told = Sequence[tuple[Any, Sequence[int]]]  # texts, as JSON, each with the ranks that have it


def exchange(group: Any, texts: Sequence[str], record: bytes, timeout: float) -> tuple[list[bytes], list[Told]]:
    """The ``record`` of every rank, and what the ranks have for each of ``texts``.

    All ranks of ``group`` call it, with as many texts and a record of one size: one all-gather of the record and 40 bytes a text,
    and a broadcast for each distinct text. Raises what the group raises where one of them takes ``timeout`` seconds; and, on all
    ranks alike, `ForeshockError` where the texts are more than 64 MiB together.
    """
    own, limit = [text.encode() for text in texts], timedelta(seconds=timeout)
    device, here = device_of(group), distributed.get_rank(group)
    marks = [hashlib.sha256(text).digest() + len(text).to_bytes(_SIZE, "little") for text in own]
    mine = torch.frombuffer(bytearray(b"".join([*marks, record])), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(gathered, mine, group=group, async_op=True).wait(limit)
    told = [one.cpu().numpy().tobytes() for one in gathered]
    mark, holders = _DIGEST + _SIZE, [dict[bytes, list[int]]() for _ in own]
    for rank, one in enumerate(told):
        for place, of in enumerate(holders):
            of.setdefault(one[place * mark : (place + 1) * mark], []).append(rank)
    sizes = [int.from_bytes(one[_DIGEST:], "little") for of in holders for one in of]
    if sum(sizes) > MOST:
        raise ForeshockError(
            f"agreeing on what {len(told)} ranks merge: they describe themselves in {len(sizes)} different texts, "
            f"{sum(sizes) >> 20} MiB together, of which {MOST >> 20} MiB are read; where each rank trains weights of its own under "
            "the same names, give `merge=False`"
        )
    found: list[Told] = [
        [
            (_broadcast(group, text if ranks[0] == here else None, one, ranks[0], limit), ranks)
            for one, ranks in of.items()
        ]
        for text, of in zip(own, holders, strict=True)
    ]
    return [one[len(own) * mark :] for one in told], found


def _broadcast(group: Any, mine: bytes | None, mark: bytes, source: int, limit: timedelta) -> Any:
    device, size = device_of(group), int.from_bytes(mark[_DIGEST:], "little")
    at = source if group is None else distributed.get_global_rank(group, source)
    text = (
        torch.empty(size, dtype=torch.uint8) if mine is None else torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    )
    text = text.to(device)
    distributed.broadcast(text, at, group=group, async_op=True).wait(limit)
    return json.loads(text.cpu().numpy().tobytes())


def card(among: Sequence[int], host: str | None = None) -> bytes:
    """What a rank shows of itself: 8 bytes that stand for the ranks ``among`` which its weights lie (zeros: it has them whole), and
    the name of its host, this one by default."""
    shared = hashlib.sha256(repr(tuple(among)).encode()).digest()[:_SPAN] if among else bytes(_SPAN)
    return shared + (socket.gethostname() if host is None else host).encode()[:_HOST].ljust(_HOST)


def shown(cards: Sequence[bytes]) -> tuple[list[str], list[bytes]]:
    """Of each card the host, and what stands for the ranks that hold its rank's weights: nothing where it has them whole."""
    hosts = [one[_SPAN:].decode(errors="replace").strip() for one in cards]
    return hosts, [one[:_SPAN].strip(b"\0") for one in cards]


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks and the machines they are on, in words."""
    told = [f"{rank} ({hosts[rank]})" if rank < len(hosts) else str(rank) for rank in ranks[:3]]
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(told)}{more}"


def device_of(group: Any) -> torch.device:
    """Where tensors must be that go through ``group``."""
    nccl = distributed.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
