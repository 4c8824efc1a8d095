"""How vectors come to the host: as they are on CPU, on a side stream on CUDA, and nothing waits until they are read.

On CUDA `Transfer.start` orders three things, all by events, none by waiting:

1. the side stream waits for what the training stream has queued so far, the graph that wrote the vector included;
2. the side stream copies the vector into a pinned slot and records the slot's event;
3. the training stream waits (on the device) for that copy before it goes on.

The third makes replayed CUDA graphs safe: the vector lies in the graph's own memory, which the next replay, on the training
stream, writes over; and it frees the allocator from knowing the side stream, for memory is given out again in the order of the
training stream. The copy is some kilobytes behind the last kernel of a graph: microseconds of the device, none of the host.

A slot is one of a ring and is used again once its numbers were read. Whoever does not want to wait asks `Packet.has_arrived`
first. Other devices clone, and copy when they are read.

None of this has run on a GPU yet; `pytest -m gpu` and `benchmarks/gpu.sh` are there for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from foreshock.records import Array

T = TypeVar("T")


class Packet:
    """A vector on its way to the host. Called, it waits if it has to and gives float64 ``[n]``, the same array every time."""

    def __init__(self, take: Callable[[], Array], has_arrived: Callable[[], bool] = lambda: True) -> None:
        self._take: Callable[[], Array] | None = take
        self._has_arrived = has_arrived
        self._lock = threading.Lock()
        self._found: Array | None = None

    def has_arrived(self) -> bool:
        """Whether a call would not wait."""
        return self._take is None or self._has_arrived()

    def __call__(self) -> Array:
        with self._lock:
            if self._take is not None:
                self._found, self._take = self._take(), None
            assert self._found is not None
            return self._found


@dataclass(frozen=True, slots=True)
class Later(Generic[T]):
    """What is made on the host of ``packets``, by a call that waits for them if it has to."""

    packets: Sequence[Packet]
    make: Callable[[], T]

    def has_arrived(self) -> bool:
        """Whether a call would not wait."""
        return all(packet.has_arrived() for packet in self.packets)

    def __call__(self) -> T:
        return self.make()


class Transfer:
    """Brings the vectors of one device to the host; ``copies`` counts those under way or made. Any thread may call it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies = 0
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}  # pinned, by what they hold
        self._lock = threading.Lock()
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, numbers: torch.Tensor) -> torch.Tensor:
        """Host numbers on the device, without waiting."""
        if self._side is not None:
            numbers = numbers.pin_memory()
        return numbers.to(self.device, non_blocking=True)

    def start(self, vector: torch.Tensor) -> Packet:
        """Begin to copy ``vector``, 1-D of float32 or float64, which may be written over afterwards (on CPU once it was read)."""
        with self._lock:
            self.copies += 1
        vector = vector.detach()
        if self.device.type == "cpu":
            return Packet(lambda: _float64(vector))
        if self._side is None:
            kept = vector.clone()
            return Packet(lambda: _float64(kept.cpu()))
        return self._copy(self._side, vector)

    def _copy(self, side: torch.cuda.Stream, vector: torch.Tensor) -> Packet:
        training = torch.cuda.current_stream(self.device)
        slot, done = self._slot(vector), torch.cuda.Event()
        side.wait_stream(training)
        with torch.cuda.stream(side):
            slot.copy_(vector, non_blocking=True)
            done.record(side)
        training.wait_event(done)

        def take() -> Array:
            done.synchronize()
            found = _float64(slot)
            with self._lock:
                self._free.setdefault((slot.numel(), slot.dtype), []).append(slot)
            return found

        return Packet(take, done.query)

    def _slot(self, vector: torch.Tensor) -> torch.Tensor:
        with self._lock:
            free = self._free.get((vector.numel(), vector.dtype))
            if free:
                return free.pop()
        return _pinned(vector.numel(), vector.dtype)


class Transfers:
    """A `Transfer` for each device that vectors come from."""

    def __init__(self) -> None:
        self._by_device: dict[torch.device, Transfer] = {}

    def start(self, vector: torch.Tensor) -> Packet:
        """As `Transfer.start`."""
        transfer = self._by_device.get(vector.device)
        if transfer is None:
            transfer = self._by_device.setdefault(vector.device, Transfer(vector.device))
        return transfer.start(vector)


def _pinned(numbers: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(numbers, dtype=dtype, pin_memory=True)


def _float64(vector: torch.Tensor) -> Array:
    found: Array = vector.numpy().astype(np.float64)
    return found
