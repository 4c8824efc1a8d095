"""Statistics in two stages: what must read the large tensors, and what is made of the little that is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foreshock.records import Facts, Tensors


@dataclass(frozen=True, slots=True)
class TwoStages:
    """A probe's ``forward`` or ``backward``: ``first`` leaves named tensors, ``rest`` makes the named quantities of them.

    Called, it is one function like any other. On CPU `passes` lets the compiler see ``first`` alone and runs ``rest`` as it is
    written: a loop over a few numbers takes the C++ compiler as long as one over millions. What ``first`` hands on is in memory
    then, which fuses no longer and is rounded to its dtype: hand on what is float32, or an operand of a kernel.
    """

    first: Callable[[Facts, Tensors, Any], Mapping[str, Tensor]]
    rest: Callable[[Facts, Tensors], Mapping[str, Tensor]]

    def __call__(self, facts: Facts, tensors: Tensors, more: Any) -> Mapping[str, Tensor]:
        """``more``: random rows, or gradients by role."""
        return self.rest(facts, self.first(facts, tensors, more))
