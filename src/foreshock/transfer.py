"""How a packed vector comes to the host: at once on CPU, on a side stream elsewhere, and nothing waits until it is read.

On CUDA `Transfer.start` orders three things, all by events, none by waiting:

1. the side stream waits for what the training stream has queued so far, the graph that wrote the vector included;
2. the side stream copies the vector into a pinned slot and records the slot's event;
3. the training stream waits (on the device) for that copy before it goes on.

The third makes replayed CUDA graphs safe: the vector lies in the graph's own memory, which the next replay, on the training
stream, writes over; and it frees the allocator from knowing the side stream, for memory is given out again in the order of the
training stream. The copy is some kilobytes behind the last kernel of a graph: microseconds of the device, none of the host.

A slot is one of a ring and is used again once its numbers were read. A capture of a CUDA graph must not meet foreign streams:
while one is under way the vector is cloned, and copied when it is read. Other devices clone, too.

None of this has run on a GPU yet; `pytest -m gpu` and `benchmarks/gpu.sh` are there for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from foreshock.records import Array

Read = Callable[[], Array]  # waits, if it has to, and gives float64 [n]


class Transfer:
    """Brings the vectors of one device to the host; ``copies`` counts those under way or made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies = 0
        self._free: dict[int, list[torch.Tensor]] = {}  # pinned, by the numbers they hold
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, numbers: torch.Tensor) -> torch.Tensor:
        """Host numbers on the device, without waiting."""
        if self._side is not None:
            numbers = numbers.pin_memory()
        return numbers.to(self.device, non_blocking=True)

    def start(self, vector: torch.Tensor) -> Read:
        """Begin to copy ``vector``, which may be written over afterwards, and say how to read it."""
        self.copies += 1
        vector = vector.detach()
        if self.device.type == "cpu":
            return lambda: _float64(vector)
        if self._side is None or torch.cuda.is_current_stream_capturing():
            kept = vector.clone()
            return lambda: _float64(kept.cpu())
        return self._copy(self._side, vector)

    def _copy(self, side: torch.cuda.Stream, vector: torch.Tensor) -> Read:
        training = torch.cuda.current_stream(self.device)
        slot, done = self._slot(vector.numel()), torch.cuda.Event()
        side.wait_stream(training)
        with torch.cuda.stream(side):
            slot.copy_(vector, non_blocking=True)
            done.record(side)
        training.wait_event(done)

        def read() -> Array:
            done.synchronize()
            found = _float64(slot)
            self._free.setdefault(slot.numel(), []).append(slot)
            return found

        return read

    def _slot(self, numbers: int) -> torch.Tensor:
        free = self._free.get(numbers)
        return free.pop() if free else torch.empty(numbers, dtype=torch.float32, pin_memory=True)


def _float64(vector: torch.Tensor) -> Array:
    found: Array = vector.numpy().astype(np.float64)
    return found
