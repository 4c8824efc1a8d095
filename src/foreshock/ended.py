"""A step that is over, while what was measured in it is on its way to the host.

Its numbers are sent, and its weights and the user's numbers read, as soon as the step is over; it is worked off once they have
arrived. On CPU that is at once. On CUDA the device may still be at the step's backward then, and the host does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from foreshock.records import Reading
from foreshock.runtime import Sample
from foreshock.transfer import Later, Packet, Transfers

MOST_UNDER_WAY = 4  # steps that are over and not worked off; before there are more, the first of them is waited for


@dataclass(frozen=True, slots=True)
class Ended:
    """``samples`` of training, none where numbers were logged alone; ``logged``, and what was read ``beside`` them; ``part``: of
    the account."""

    step: int
    part: str
    samples: Sequence[Sample]
    logged: Later[list[Reading]]
    beside: Sequence[Later[list[Reading]]]

    def has_arrived(self) -> bool:
        """Whether all of it is on the host."""
        read = (self.logged, *self.beside)
        return all(later.has_arrived() for later in read) and all(sample.has_arrived() for sample in self.samples)


def logged(
    numbers: Sequence[tuple[str, Any]], transfers: Transfers, number: Callable[[str, Any], float | None]
) -> Later[list[Reading]]:
    """The user's own numbers as readings. ``number(name, value)`` says what a value is, None where it is no number; those on a
    device are sent instead, in float32, as which all of them are stored."""
    found = [(name, transfers.start(value.reshape(1).float()) if _is_far(value) else value) for name, value in numbers]

    def make() -> list[Reading]:
        values = [(name, x()[0] if isinstance(x, Packet) else number(name, x)) for name, x in found]
        return [Reading(f"run/{name}", None, np.array([x], np.float64)) for name, x in values if x is not None]

    return Later([x for _, x in found if isinstance(x, Packet)], make)


def _is_far(value: Any) -> bool:
    one = type(value) is Tensor and value.device.type != "cpu" and value.numel() == 1
    return one and not value.is_complex()
