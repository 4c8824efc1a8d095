"""A job of many ranks in one process: what one of them sends is counted, and what the others would send is made up.

The ranks are alike but for the texts by which they describe what they merge when a layout is agreed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

from foreshock.exchange import CARD

ROOMS = ("merging", "exchange")  # of foreshock, where ranks speak to each other


class Simulated:
    """Stands for `torch.distributed` as rank 0 of ``ranks`` sees it. ``calls``: each collective and its bytes.

    ``told(rank)``: the texts by which a rank describes what it merges when a layout is agreed, and the number of the group of ranks
    that hold the weights between them, 0 for none; rank 0's own are among these. Without it all are as rank 0. ``seconds``: of the
    processor, that making up took.
    """

    ReduceOp = distributed.ReduceOp

    def __init__(self, ranks: int, told: Callable[[int], tuple[Sequence[str], int]] | None = None) -> None:
        self.ranks, self._told = ranks, told
        self._coming: list[str] = []  # texts that are broadcast next
        self.seconds = 0.0
        self.calls: list[tuple[str, int]] = []

    def get_rank(self, group: Any = None) -> int:
        return 0

    def get_world_size(self, group: Any = None) -> int:
        return self.ranks

    def get_global_rank(self, group: Any, rank: int) -> int:
        return rank

    def get_backend(self, group: Any = None) -> str:
        return "gloo"

    def new_group(self, **options: Any) -> Simulated:
        return self

    def all_reduce(self, vector: Tensor, op: Any, group: Any, async_op: bool = False) -> Simulated:
        """Ranks that are alike have the same numbers: of a largest, that is the number itself."""
        self._count("all_reduce", vector)
        if op == distributed.ReduceOp.SUM:
            vector *= self.ranks
        return self

    def wait(self, timeout: Any = None) -> None:
        """All is there at once."""

    def all_gather(self, records: list[Tensor], record: Tensor, group: Any = None, async_op: bool = False) -> Simulated:
        self._count("all_gather", record)
        start = time.process_time()
        for one in records:
            one.copy_(record)
        if self._told is not None:
            made: dict[tuple[tuple[str, ...], int], Tensor] = {}
            found = [dict[str, int]() for _ in self._told(0)[0]]
            for rank, one in enumerate(records):
                texts, group = self._told(rank)
                for known, text in zip(found, texts, strict=True):
                    known.setdefault(text, rank)
                key = tuple(texts), group
                if key not in made:
                    marks = [
                        hashlib.sha256(x).digest() + len(x).to_bytes(8, "little") for x in (t.encode() for t in texts)
                    ]
                    made[key] = torch.frombuffer(bytearray(b"".join(marks)), dtype=torch.uint8)
                one[: len(made[key])] = made[key]
                one[-CARD] = group
            self._coming = [text for known in found for text in known]
        self.seconds += time.process_time() - start
        return self

    def broadcast(self, tensor: Tensor, source: int, group: Any = None, async_op: bool = False) -> Simulated:
        """The next text, in the order in which ranks that have another one come."""
        self._count("broadcast", tensor)
        if self._told is not None:
            tensor.copy_(torch.frombuffer(bytearray(self._coming.pop(0).encode()), dtype=torch.uint8))
        return self

    def _count(self, name: str, tensor: Tensor) -> None:
        self.calls.append((name, tensor.nbytes))

    @contextmanager
    def running(self) -> Iterator[Simulated]:
        """Within it foreshock speaks to these ranks."""
        with (
            mock.patch(f"foreshock.{ROOMS[0]}.distributed", self),
            mock.patch(f"foreshock.{ROOMS[1]}.distributed", self),
            mock.patch("foreshock._torch.allow"),
        ):
            yield self
