"""The step clock: which optimizer step a forward pass belongs to, with no word from the training script."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
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

    def forward(self) -> None:
        """A training forward pass ran."""
        self.forward_step = self.step

    def tick(self, optimizer: Any) -> None:
        """``optimizer`` made a step."""
        count = self._counts.get(optimizer, self.forward_step) + 1
        self._counts[optimizer] = count
        self.step = max(self.step, count)

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

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = self.forward_step = int(state["step"])
        self._counts.clear()
