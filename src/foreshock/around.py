"""What a watch does around each optimizer step: one hook before it and one behind it, for every optimizer of the process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreshock import _torch

if TYPE_CHECKING:
    from foreshock.watch import Watch


class AroundSteps:
    """The hooks of ``watch``, in force until `remove`."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._hooks = [_torch.on_optimizer_step(self._after), _torch.before_optimizer_step(self._before)]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        watch = self._watch
        if watch.closed or _torch.is_capturing():  # what is captured has not run
            return
        try:
            if not watch.clock.concerns(optimizer, watch.instances.parameter_ids) or watch.clock.idles(optimizer):
                return
            if watch.ranks.are_one():
                watch.ranks.exchange()
            if watch.collector.steps and watch.ranks.given_up is None and watch.is_sampled(watch.clock.forward_step):
                watch.collector.before_optimizer(optimizer)
        except Exception as error:
            watch.fail("reading the optimizer", error)

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        watch = self._watch
        if watch.closed or _torch.is_capturing():  # what is captured has not run
            return
        try:
            watch.masters.met(optimizer)
            if not watch.clock.concerns(optimizer, watch.instances.parameter_ids) or watch.clock.idles(optimizer):
                return
            if watch.ranks.given_up is None and watch.is_sampled(watch.clock.forward_step):
                watch.collector.optimizer(watch.clock.forward_step, optimizer)
        except Exception as error:
            watch.fail("reading the optimizer", error)
        watch.clock.tick(optimizer)
        watch.acting.after_step(watch.clock.step, looks=not watch.ranks.hears_all())
