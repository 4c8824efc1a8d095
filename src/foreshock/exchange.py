"""What ranks tell each other of themselves, each distinct text once, and how a rank is called."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# Bytes of a text's digest, of that of the ranks with which one shares its weights, and of a host's name.
_DIGEST, _SPAN, _HOST = 32, 8, 64
Told = Sequence[tuple[Mapping[str, Any], Sequence[int]]]


def exchange(group: Any, text: str, among: Sequence[int], timeout: float) -> tuple[list[str], list[bytes], Told]:
    """Of each rank its host, and what stands for the ranks ``among`` which it said its weights lie (empty: for none); and every
    text, as JSON, with the ranks that have it. All ranks of ``group`` call it: one all-gather of 104 bytes, and two broadcasts for
    each distinct text. Raises what the group raises where one of them takes ``timeout`` seconds."""
    mine, device, here = text.encode(), device_of(group), distributed.get_rank(group)
    shared = hashlib.sha256(repr(among).encode()).digest()[:_SPAN] if among else bytes(_SPAN)
    host = socket.gethostname().encode()[:_HOST].ljust(_HOST)
    record = torch.frombuffer(bytearray(hashlib.sha256(mine).digest() + shared + host), dtype=torch.uint8).to(device)
    records = [torch.empty_like(record) for _ in range(distributed.get_world_size(group))]
    limit = timedelta(seconds=timeout)
    distributed.all_gather(records, record, group=group, async_op=True).wait(limit)
    told = [bytes(x.cpu().tolist()) for x in records]
    holders: dict[bytes, list[int]] = {}
    for rank, one in enumerate(told):
        holders.setdefault(one[:_DIGEST], []).append(rank)
    found = [
        (_broadcast(group, mine if ranks[0] == here else None, ranks[0], limit), ranks) for ranks in holders.values()
    ]
    hosts = [one[_DIGEST + _SPAN :].decode(errors="replace").strip() for one in told]
    return hosts, [one[_DIGEST : _DIGEST + _SPAN].strip(b"\0") for one in told], found


def _broadcast(group: Any, mine: bytes | None, source: int, limit: timedelta) -> dict[str, Any]:
    device = device_of(group)
    at = source if group is None else distributed.get_global_rank(group, source)
    size = torch.tensor([len(mine or b"")], device=device)
    distributed.broadcast(size, at, group=group, async_op=True).wait(limit)
    if mine is None:
        text = torch.empty(int(size), dtype=torch.uint8, device=device)
    else:
        text = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
    distributed.broadcast(text, at, group=group, async_op=True).wait(limit)
    plain: dict[str, Any] = json.loads(bytes(text.cpu().tolist()))
    return plain


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks and the machines they are on, in words."""
    told = [f"{rank} ({hosts[rank]})" if rank < len(hosts) else str(rank) for rank in ranks[:3]]
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(told)}{more}"


def device_of(group: Any) -> torch.device:
    """Where tensors must be that go through ``group``."""
    nccl = distributed.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
