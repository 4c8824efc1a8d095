"""The step clock: which optimizer step a forward pass belongs to, with no word from the training script."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any


class StepClock:
    """Counts optimizer steps. ``step`` is the number completed; a forward pass now belongs to step ``step``.

    Several optimizers that each step once an iteration make one tick, because the clock is the largest count of any of
    them; one seen first in mid-run starts at the step under way. Optimizers of other models do not move it, once one that
    holds a watched parameter was seen: a sharded optimizer, or one with masters of its own, holds none and must count.
    """

    def __init__(self) -> None:
        self.step = 0
        self.forward_step = 0
        self._counts: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._relevant: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._met = False
        self._forwards = 0
        self._trained: weakref.WeakKeyDictionary[Any, int] = (
            weakref.WeakKeyDictionary()
        )  # forward passes at its last step
        self._waiting: list[int] = []  # counts of a saved run's optimizers, for those that take their places

    def forward(self) -> None:
        """A training forward pass ran."""
        self.forward_step = self.step
        self._forwards += 1

    def idles(self, optimizer: Any) -> bool:
        """Whether the step that ``optimizer`` made is none of training: at a rate of 0, and with no forward pass since its last.

        So `torch.distributed.checkpoint` makes the state of an optimizer that has none yet, or never has any.
        """
        rates = [group.get("lr") for group in optimizer.param_groups]
        return self._forwards == self._trained.get(optimizer, 0) and all(
            rate is not None and rate == 0 for rate in rates
        )

    def tick(self, optimizer: Any) -> None:
        """``optimizer`` made a step."""
        if optimizer not in self._counts:
            self._counts[optimizer] = self._waiting.pop(0) if self._waiting else self.forward_step
        count = self._counts[optimizer] = self._counts[optimizer] + 1
        self.step = max(self.step, count)
        self._trained[optimizer] = self._forwards

    def concerns(self, optimizer: Any, parameters: Iterable[int]) -> bool:
        """Whether ``optimizer`` holds any of the parameters with these ids, or none did so far; remembered an optimizer."""
        if optimizer not in self._relevant:
            known = set(parameters)
            if not known:
                return True
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._relevant[optimizer] = not known.isdisjoint(owned)
            self._met = self._met or self._relevant[optimizer]
        return self._relevant[optimizer] or not self._met

    def state_dict(self) -> dict[str, Any]:
        """The step, and the counts of the optimizers that made it or the one before, in the order in which they were met."""
        counts = [*self._counts.values(), *self._waiting]
        return {"step": self.step, "counts": [count for count in counts if count >= self.step - 1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; a resumed run has other optimizers, which are met in the same order."""
        self.step = self.forward_step = int(state["step"])
        self._waiting = list(state["counts"])
        self._counts.clear()
        self._forwards = 0
        self._trained.clear()
