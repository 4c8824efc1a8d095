"""One model being trained in one way, plain or watched, and what its compilation and its steps are counted to cost."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hooks import Collected
from measuring import peak_bytes, processor_seconds
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch._inductor.utils import clear_caches

from foreshock import Watch

Make = Callable[[], tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]]  # a model, and its loss
_TO_HOST = ("numpy", "tolist")  # of a tensor
_BLOCK = 10  # steps in which everything that foreshock does from time to time comes up once


@dataclass(frozen=True)
class Way:
    """``watch``: options of the watch, None for none. ``hooks``: what a user would write instead."""

    watch: dict[str, Any] | None = None
    hooks: bool = False
    compiled: bool = True


@dataclass(frozen=True)
class Compiled:
    """What compiling took and made. Seconds are the processor's, up to the end of each step."""

    seconds: tuple[float, ...]
    graphs: int
    breaks: int
    recompiles: int
    kernels: int


@dataclass(frozen=True)
class Brought:
    """To the host: single numbers, each of which waits for the device, and tensors, each of them a copy from a device."""

    numbers: int
    copies: int


class Trained:
    """A model that is trained step by step. ``close`` lets go of the watch."""

    def __init__(self, make: Make, way: Way, folder: Path | None = None) -> None:
        torch.manual_seed(0)
        self.model, loss = make()
        self.watch = None if way.watch is None else Watch(folder, strict=True, detectors=[], **way.watch)
        self._collected = Collected(self.model) if way.hooks else None
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        inductor = torch._dynamo.lookup_backend("inductor")
        backend: Any = inductor if self.watch is None else self.watch.backend
        if way.hooks:  # Dynamo does not guard on hooks: by the same backend it would serve the graph without them
            backend = lambda module, inputs: inductor(module, inputs)  # noqa: E731
        run = torch.compile(self.model, backend=backend) if way.compiled else self.model
        self._loss = lambda: loss(run)
        self.copies = 0  # packed vectors that the step left which `syncs` looked at

    def step(self) -> None:
        """Forward, backward, AdamW, and all that is done about the step when it is over."""
        self.train()
        if self.watch is not None:
            _ = self.watch.alarms
        if self._collected is not None:
            self._collected.numbers()

    def train(self) -> None:
        """The step itself."""
        self._loss().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def settle(self) -> None:
        """As many steps that train nothing as the longest window of the weight spectra has: from then on each is measured."""
        if self.watch is not None:
            for _ in range(max(self.watch.settings.windows)):
                self.watch.begin_forward(list(self.watch.instances))
                self._optimizer.step()

    def held_bytes(self) -> int:
        """Parameters, gradients and Adam's two moments."""
        return 4 * sum(p.numel() * p.element_size() for p in self.model.parameters())

    def snapshot_bytes(self) -> int:
        """What the weight spectra keep by now."""
        if self.watch is None or "spectra" not in self.watch.families:
            return 0
        turns = self.watch._spectra.state_dict()["turns"].values()
        held = {id(x): x for _, ring in turns for entry in ring for side in entry[2:4] for x in side}
        return sum(x.numel() * x.element_size() for x in held.values())

    def peak(self) -> int:
        """The most held in any of ten steps, bytes."""
        gc.collect()
        return self.held_bytes() + peak_bytes(lambda: [self.step() for _ in range(_BLOCK)])

    def brought(self) -> Brought:
        """What comes to the host in a plain loop of ten steps that nobody drains: a sample is worked off in the forward behind
        it, and there the host waits for a device. One runs before, so that each step meets what those before left."""
        copies = 0

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal copies
            if event == "c_call" and argument.__name__ in _TO_HOST:
                copies += isinstance(getattr(argument, "__self__", None), torch.Tensor)

        self.train()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            sys.setprofile(profile)
            try:
                for _ in range(_BLOCK):
                    self.train()
            finally:
                sys.setprofile(None)
        numbers = sum(e.count for e in profiled.key_averages() if e.key == "aten::_local_scalar_dense")
        return Brought(numbers, copies)

    def close(self) -> None:
        if self.watch is not None:
            self.watch.close()


@contextmanager
def caching_in(folder: Path) -> Iterator[None]:
    """The compilers remember nothing but what ``folder`` holds."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_caches()
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(folder)):
        yield
    clear_caches()


def compiled(make: Make, way: Way, cache: Path, steps: int = 1, folder: Path | None = None) -> tuple[Trained, Compiled]:
    """Trained for ``steps`` with ``cache`` as the compilers' folder, and what that took; steps are short beside it."""
    counters.clear()
    before = metrics.generated_kernel_count
    with caching_in(cache):
        trained = Trained(make, way, folder)
        start, taken = processor_seconds(), list[float]()
        for _ in range(steps):
            trained.step()
            taken.append(processor_seconds() - start)
    found = Compiled(
        tuple(taken),
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
        sum(counters["recompiles"].values()),
        metrics.generated_kernel_count - before,
    )
    return trained, found
