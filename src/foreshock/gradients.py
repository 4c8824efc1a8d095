"""The learning rate of a sampled step, and the norm of its gradients, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.records import Reading

NORM = "optim/grad_norm"
SHARDS = "optim/grad_square_of_shards"  # on its way to that norm


class Gradients:
    """Reads optimizers when they have stepped; numbers stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._steps: dict[int, dict[str, list[Any]]] = {}

    def read(self, step: int, optimizer: Any) -> None:
        """``optimizer`` made ``step``."""
        self._steps = {at: found for at, found in self._steps.items() if at >= step}  # others met no sample
        found = self._steps.setdefault(step, {"lr": [], "norms": [], "squares": []})
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        dense = [g for g in gradients if g.layout is torch.strided and type(g) in (torch.Tensor, torch.nn.Parameter)]
        found["lr"] += [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if dense:
            found["norms"].append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dense))))
        found["squares"] += squares(gradients)

    def readings(self, step: int, ranks: int | None) -> list[Reading]:
        """Of all optimizers that made ``step``. ``ranks``: how many there are of what is told of all of them as a mean, if any."""
        found = self._steps.pop(step, None)
        self._steps = {at: of for at, of in self._steps.items() if at >= step}
        if found is None:
            return []
        readings = [Reading("optim/lr", None, np.array([max(found["lr"])]))] if found["lr"] else []
        if found["norms"]:
            total = float(torch.linalg.vector_norm(torch.stack([norm.float() for norm in found["norms"]])))
            readings.append(Reading(NORM, None, np.array([total])))
        if found["squares"] or ranks is not None:
            readings.append(Reading(SHARDS, None, np.array([(ranks or 1) * sum(map(float, found["squares"]))])))
        return readings

    def clear(self) -> None:
        self._steps.clear()


def squares(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Of each gradient that ranks have parts of (DTensor), this rank's share of the square of its norm, on its device."""
    from torch.distributed.tensor import DTensor

    found = []
    for x in gradients:
        if isinstance(x, DTensor):
            copies = [size for size, at in zip(x.device_mesh.shape, x.placements, strict=True) if at.is_replicate()]
            found.append(x.to_local().float().square().sum() / int(np.prod(copies)))
    return found


def with_gradient_norm(readings: Sequence[Reading]) -> list[Reading]:
    """The norm of gradients that each rank has whole, and of those that it has a part of, as one."""
    square = sum(float(r.values[0]) for r in readings if r.metric == SHARDS)
    norm = sum(float(r.values[0]) for r in readings if r.metric == NORM)
    rest = [r for r in readings if r.metric not in (SHARDS, NORM)]
    if len(rest) == len(readings):
        return rest
    return [*rest, Reading(NORM, None, np.array([np.hypot(norm, square**0.5)]))]
