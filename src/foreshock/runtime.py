"""One captured graph while it runs: which variant serves a call, and what a sampled call leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from foreshock import _torch
from foreshock.instances import Instance
from foreshock.passes import Instrumented, Quantity
from foreshock.records import Array
from foreshock.rows import Rows
from foreshock.transfer import Packet, Transfer

Compiled = Callable[..., Any]
Fail = Callable[[str, Exception], None]
CAPTURED = (
    "calls inside a CUDA graph that the script captures (torch.cuda.graph): its replays run no Python, so that no step of them is "
    "counted or sampled; mode='reduce-overhead' of torch.compile is watched"
)
Merged = dict[Instance, dict[tuple[str, str], Array]]  # by probe and name, 1-D float64, merged over the calls of a step


@dataclass(eq=False)
class Sample:
    """What one sampled call left: a packed vector on its way to the host, and one more for each backward that has run."""

    step: int
    instances: Sequence[Instance]
    forward: Sequence[Quantity]
    backward: Sequence[Quantity]
    packed: Packet
    gradients: Sequence[Packet]

    def is_training(self) -> bool:
        """A forward pass whose taps never saw a gradient was an evaluation."""
        return not self.backward or bool(self.gradients)

    def has_arrived(self) -> bool:
        """Whether all of it is on the host."""
        return self.packed.has_arrived() and all(gradient.has_arrived() for gradient in self.gradients)

    def merge_into(self, merged: Merged) -> None:
        """Add what this call measured to what others of its step did."""
        _merge(merged, self.instances, self.forward, self.packed)
        for gradient in self.gradients:
            _merge(merged, self.instances, self.backward, gradient)


def merged(samples: Sequence[Sample]) -> Merged:
    """What the calls of a step measured together."""
    found: Merged = {}
    for sample in samples:
        sample.merge_into(found)
    return found


def _take_gradient(transfer: Transfer, gradients: list[Packet], fail: Fail, slot: torch.Tensor) -> None:
    """Each backward's statistics by themselves: a second one would be added to the first, maxima too."""
    try:
        if slot.grad is not None:
            gradients.append(transfer.start(slot.grad))
            slot.grad = None
    except Exception as error:
        fail("taking gradient statistics to the host", error)


def _merge(merged: Merged, instances: Sequence[Instance], layout: Sequence[Quantity], packed: Packet) -> None:
    """Read ``packed``, cut it by ``layout`` and merge each stretch by its own rule."""
    values = packed()
    at = 0
    for quantity in layout:
        part = values[at : at + quantity.size]
        at += quantity.size
        quantities = merged.setdefault(instances[quantity.site], {})
        key = (quantity.probe, quantity.name)
        known = quantities.get(key)
        if known is not None:
            part = np.maximum(known, part) if quantity.merge == "max" else known + part
        quantities[key] = part


class WatchedGraph:
    """The callable that Dynamo gets. ``plain`` and ``instrumented`` compile a variant each, when it is first needed."""

    def __init__(
        self,
        *,
        plain: Callable[[], Compiled],
        instrumented: Callable[[], Compiled] | None,
        rewritten: Instrumented | None,
        device: torch.device,
        resolve: Callable[[Sequence[Any]], list[Instance]],
        wants_sample: Callable[[Sequence[Instance]], bool],
        deliver: Callable[[Sample], None],
        fail: Fail,
        note: Callable[[str], None],
        step: Callable[[], int],
        rows: Rows,
    ) -> None:
        self._make: Mapping[bool, Callable[[], Compiled]] = {False: plain, True: instrumented or plain}
        self._compiled: dict[bool, Compiled] = {}
        self._rewritten = rewritten
        self._device = device
        self._resolve = resolve
        self._wants_sample = wants_sample
        self._deliver = deliver
        self._fail, self._note = fail, note
        self._step = step
        self._broken = rewritten is None
        self._transfer = Transfer(device)
        self._rows = rows

    def compile(self, sampled: bool) -> Compiled:
        """The variant, compiled at the latest now."""
        if sampled not in self._compiled:
            with _torch.compiling():  # calls may come from several threads
                if sampled not in self._compiled:
                    self._compiled[sampled] = self._make[sampled]()
        return self._compiled[sampled]

    def give_up(self, what: str, error: Exception) -> None:
        """Serve every call with the plain variant from now on."""
        self._broken = True
        self.compile(False)
        self._fail(what, error)

    def __call__(self, *args: Any) -> Any:
        if _torch.is_rehearsal(args):
            return self._rehearse(args)
        if _torch.is_capturing():
            return self._captured(args)
        again = _torch.in_backward()  # activation checkpointing runs this forward again, and must meet the same variant
        try:
            instances = self._resolve(args)
        except Exception as error:
            self._broken, instances = True, []
            self._fail("telling which layer a call belongs to; the graph goes on without probes", error)
        for instance in () if again else instances:
            instance.evaluations += 1
        if self._rewritten is not None and self._wants_sample(instances) and not self._broken:
            return self._sampled(self._rewritten, instances, args, again)
        return self.compile(False)(*args)

    def _rehearse(self, args: Sequence[Any]) -> Any:
        """Each variant compiled so far answers its first call with fakes, and waits for that call."""
        result = None
        for sampled, run in self._compiled.items():
            if not sampled or self._rewritten is None:
                result = run(*args)
                continue
            with _torch.fake_mode_of(list(args)):
                rows = torch.empty(2 * self._rewritten.rows, dtype=torch.float32, device=self._device)
                slot = torch.empty(
                    self._rewritten.slot_size, dtype=torch.float32, device=self._device, requires_grad=True
                )
            *outputs, _ = run(*args, rows, slot)
            result = tuple(outputs)
        return result

    def _captured(self, args: Sequence[Any]) -> Any:
        """The plain variant: what is measured now would be judged before it is there, and hooks, events and pinned memory do not
        belong into a graph. Nothing is compiled while a graph is captured, if there is a variant that can serve."""
        self._note(CAPTURED)
        if self._rewritten is None or self._broken or False in self._compiled or True not in self._compiled:
            return self.compile(False)(*args)
        rows = torch.zeros(2 * self._rewritten.rows, dtype=torch.float32, device=self._device)
        slot = torch.zeros(self._rewritten.slot_size, dtype=torch.float32, device=self._device, requires_grad=True)
        *outputs, _ = self.compile(True)(*args, rows, slot)
        return tuple(outputs)

    def _sampled(self, rewritten: Instrumented, instances: list[Instance], args: Sequence[Any], again: bool) -> Any:
        state = None
        try:
            state = _torch.random_state(self._device)
            run = self.compile(True)
            rows = self._transfer.to_device(self._rows.draw(self._step(), instances, 2 * rewritten.rows, again))
            slot = torch.zeros(rewritten.slot_size, dtype=torch.float32, device=self._device, requires_grad=True)
            gradients: list[Packet] = []
            take = functools.partial(_take_gradient, self._transfer, gradients, self._fail)
            slot.register_post_accumulate_grad_hook(take)
            *outputs, packed = run(*args, rows, slot)
        except _torch.STOP_RECOMPUTATION:
            raise  # how activation checkpointing ends a recomputation early
        except Exception as error:
            self._broken = True
            if state is not None:
                _torch.restore_random_state(self._device, state)
            result = self.compile(False)(*args)
            self._fail("running the instrumented graph; it goes on without probes", error)
            return result
        if again:
            return tuple(outputs)
        for instance in instances:
            instance.sampled += 1
        try:
            kept = self._transfer.start(packed)
            self._deliver(Sample(self._step(), instances, rewritten.forward, rewritten.backward, kept, gradients))
        except Exception as error:
            self._fail("taking a sample to the host", error)
        return tuple(outputs)
