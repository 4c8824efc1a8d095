"""Which rows a sampled call looks at: drawn anew from what the call is, with no state to save.

A draw is made of the step, of the sites that the call evaluates and of how often they were sampled before in that step. A
resumed run, a recompiled graph and another number of ranks draw as the run would have that knew of none of it. All ranks
draw the same places. Their data differ, so they look at different rows all the same; what is replicated over ranks has
equal readings on each; and a rank's series does not hang on the number it was given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from foreshock.instances import Instance


class Rows:
    """Counts the calls of the step under way; ``draw`` answers one of them."""

    def __init__(self) -> None:
        self._step = -1
        self._calls: dict[tuple[str, ...], int] = {}

    def draw(self, step: int, instances: Sequence[Instance], count: int, again: bool = False) -> torch.Tensor:
        """Float32 ``[count]`` in [0, 1), on the CPU. ``again``: a recomputation, which is no call of its own."""
        if step != self._step:
            self._step, self._calls = step, {}
        sites = tuple([instance.site.id for instance in instances])
        call = self._calls.get(sites, 0)
        if not again:
            self._calls[sites] = call + 1
        told = hashlib.blake2b(repr((step, call, sites)).encode(), digest_size=4).digest()
        seeded = torch.Generator().manual_seed(int.from_bytes(told, "little"))
        return torch.rand(count, generator=seeded, dtype=torch.float32)
