"""A job of many ranks in one process: what one of them sends is counted, and what the others would send is made up.

The ranks are alike but for the texts by which they describe themselves when a layout is agreed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

ROOMS = ("merging", "exchange")  # of foreshock, where ranks speak to each other


class Simulated:
    """Stands for `torch.distributed` as rank 0 of ``ranks`` sees it. ``calls``: each collective and its bytes.

    ``others``: the texts of ranks that are not alike rank 0; texts lie in equal shares, one after the other, over the ranks.
    ``sharded``: the ranks hold the weights between them.
    """

    ReduceOp = distributed.ReduceOp

    def __init__(self, ranks: int, others: Sequence[str] = (), *, sharded: bool = False) -> None:
        self.ranks, self._others, self._sharded = ranks, [text.encode() for text in others], sharded
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
            vector *= self.ranks // (1 + len(self._others))
        return self

    def wait(self, timeout: Any = None) -> None:
        """All is there at once."""

    def all_gather(self, records: list[Tensor], record: Tensor, group: Any = None, async_op: bool = False) -> Simulated:
        self._count("all_gather", record)
        record[32:40] = int(self._sharded)
        told = [record]
        for text in self._others:
            told.append(record.clone())
            told[-1][:32] = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.uint8)
        for rank, one in enumerate(records):
            one.copy_(told[self._text_of(rank)])
        return self

    def broadcast(self, tensor: Tensor, source: int, group: Any = None, async_op: bool = False) -> Simulated:
        """The length of the text of ``source``, or that text."""
        self._count("broadcast", tensor)
        if at := self._text_of(source):
            text = self._others[at - 1]
            tensor.copy_(
                torch.tensor([len(text)])
                if tensor.dtype == torch.int64
                else torch.frombuffer(bytearray(text), dtype=torch.uint8)
            )
        return self

    def _text_of(self, rank: int) -> int:
        return rank * (1 + len(self._others)) // self.ranks

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
