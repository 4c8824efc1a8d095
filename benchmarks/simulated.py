"""A job of many ranks in one process: what one of them sends is counted, and what the others would send is made up.

The ranks are alike but for the texts by which they describe what they merge when a layout is agreed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

from foreshock.exchange import CARD

ROOMS = ("merging", "exchange")  # of foreshock, where ranks speak to each other


class Simulated:
    """Stands for `torch.distributed` as rank 0 of ``ranks`` sees it. ``calls``: each collective and its bytes.

    ``texts``: of each stage of the model what its ranks tell, rank 0's own in front; stages have equal shares of the ranks, one
    after the other. ``rest``: the same of all ranks of a stage but its first, where these hold its weights between them.
    """

    ReduceOp = distributed.ReduceOp

    def __init__(self, ranks: int, texts: Sequence[str] = ("",), rest: Sequence[str] = ()) -> None:
        self.ranks, self._sharded = ranks, bool(rest)
        self._texts, self._rest = ([text.encode() for text in of] for of in (texts, rest or texts))
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
            vector *= self.ranks // len(self._texts)
        return self

    def wait(self, timeout: Any = None) -> None:
        """All is there at once."""

    def all_gather(self, records: list[Tensor], record: Tensor, group: Any = None, async_op: bool = False) -> Simulated:
        self._count("all_gather", record)
        made: dict[tuple[int, bool], Tensor] = {}
        for rank, one in enumerate(records):
            stage, leads = self._place(rank)
            if (stage, leads) not in made:
                made[stage, leads] = told = record.clone()
                text = self._text_of(rank)
                if rank and len(self._texts) + self._sharded > 1:
                    mark = hashlib.sha256(text).digest() + len(text).to_bytes(8, "little")
                    told[: len(mark)] = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
                if self._sharded:
                    told[-CARD] = 1 + stage
            one.copy_(made[stage, leads])
        return self

    def broadcast(self, tensor: Tensor, source: int, group: Any = None, async_op: bool = False) -> Simulated:
        """The text of ``source``."""
        self._count("broadcast", tensor)
        if source:
            tensor.copy_(torch.frombuffer(bytearray(self._text_of(source)), dtype=torch.uint8))
        return self

    def _place(self, rank: int) -> tuple[int, bool]:
        """The stage of a rank, and whether it is the first one there."""
        stage = rank * len(self._texts) // self.ranks
        return stage, rank == 0 or (rank - 1) * len(self._texts) // self.ranks < stage

    def _text_of(self, rank: int) -> bytes:
        stage, leads = self._place(rank)
        return (self._texts if leads else self._rest)[stage]

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
