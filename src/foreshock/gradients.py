"""The learning rate of a sampled step, and the norm of its gradients, wherever they are."""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.records import Array, Reading
from foreshock.transfer import Later, Packet, Transfers

NORM = "optim/grad_norm"
SHARDS = "optim/grad_square_of_shards"  # on its way to that norm
WHOLE = "optim/grad_squares_of_parameters"  # likewise, one a parameter: of how many ranks a copy each is they learn when they meet
_PLACES = 16  # entries of a parameter, and as many of its gradient, that tell it from others


@dataclass(slots=True)
class _Read:
    """What optimizers that made one step told: rates, and numbers on their way to the host. Of ``norms`` each is that of a
    parameter at a place, and the last one that of all of them."""

    rates: list[float | Packet] = field(default_factory=list)
    norms: list[tuple[Packet, list[int]]] = field(default_factory=list)
    squares: list[Packet] = field(default_factory=list)


class Gradients:
    """Reads optimizers when they have stepped; numbers are on their way to the host from then on."""

    def __init__(self) -> None:
        self._steps: dict[int, _Read] = {}
        self._transfers = Transfers()
        self._parameters: list[weakref.ref[Tensor]] = []  # those that ranks have whole, as they were met
        self._places: dict[int, int] = {}

    def read(self, step: int, optimizer: Any) -> None:
        """``optimizer`` made ``step``."""
        self._steps = {at: found for at, found in self._steps.items() if at >= step}  # others met no sample
        found = self._steps.setdefault(step, _Read())
        owners = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        dense = [p for p in owners if p.grad.layout is torch.strided and type(p.grad) in (Tensor, torch.nn.Parameter)]
        found.rates += [self._rate(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if dense:
            norms = torch.stack(torch._foreach_norm([p.grad for p in dense]))
            packed = torch.cat([norms.float(), torch.linalg.vector_norm(norms).float()[None]])
            found.norms.append((self._transfers.start(packed), [self._place(p) for p in dense]))
        parts = squares([p.grad for p in owners])
        if parts:
            found.squares.append(self._transfers.start(torch.stack(parts)))

    def readings(self, step: int, ranks: int | None) -> list[Reading]:
        """Of all optimizers that made ``step``. ``ranks``: how many there are of what is told of all of them as a mean, if any;
        then the squares of parameters stand in the order of `prints`."""
        return self.readings_later(step, ranks)()

    def readings_later(self, step: int, ranks: int | None) -> Later[list[Reading]]:
        """The same, later."""
        found = self._steps.pop(step, None)
        self._steps = {at: of for at, of in self._steps.items() if at >= step}
        if found is None:
            return Later((), list)
        rates = [rate for rate in found.rates if isinstance(rate, Packet)]
        return Later([*rates, *(of for of, _ in found.norms), *found.squares], lambda: self._made(found, ranks))

    def _rate(self, rate: Any) -> float | Packet:
        """A learning rate that is kept on a device is not waited for."""
        if isinstance(rate, Tensor) and rate.device.type != "cpu":
            return self._transfers.start(rate.detach().reshape(1).float())
        return float(rate)

    def _made(self, found: _Read, ranks: int | None) -> list[Reading]:
        rates = [float(rate()[0]) if isinstance(rate, Packet) else rate for rate in found.rates]
        readings = [Reading("optim/lr", None, np.array([max(rates)]))] if rates else []
        if found.norms and ranks is None:
            norms = torch.tensor([of()[-1] for of, _ in found.norms], dtype=torch.float32)
            readings.append(Reading(NORM, None, torch.linalg.vector_norm(norms, keepdim=True).double().numpy()))
        elif found.norms:
            values = np.zeros(len(self._parameters))
            for of, places in found.norms:
                values[places] = of()[:-1] ** 2
            readings.append(Reading(WHOLE, None, values))
        if found.squares or ranks is not None:
            total = sum(float(x) for of in found.squares for x in of())
            readings.append(Reading(SHARDS, None, np.array([(ranks or 1) * total])))
        return readings

    def clear(self) -> None:
        self._steps.clear()

    def _place(self, parameter: Tensor) -> int:
        at = self._places.get(id(parameter))
        if at is None or self._parameters[at]() is not parameter:
            at = self._places[id(parameter)] = len(self._parameters)
            self._parameters.append(weakref.ref(parameter))
        return at

    def prints(self) -> list[str]:
        """Of each parameter whose gradients were read whole: its shape, and some entries of it and of its gradient as they stand.
        The same on ranks that hold copies, and on no others: of weights that begin alike the gradients differ."""
        held = [(parameter(), at) for at, parameter in enumerate(self._parameters)]
        return [f"gone {at}" if p is None else _print(p) for p, at in held]


def copies(told: Sequence[tuple[Sequence[str], Sequence[int]]], rank: int) -> Array:
    """Of each parameter of ``rank`` how many ranks have it, where ``told`` is what ranks have for `Gradients.prints`."""
    holders: Counter[str] = Counter()
    for prints, ranks in told:
        holders.update(dict.fromkeys(prints, len(ranks)))
    return np.array([holders[one] for prints, ranks in told if rank in ranks for one in prints], float)


@torch.no_grad()
def _print(parameter: Tensor) -> str:
    told = hashlib.sha256(repr(tuple(parameter.shape)).encode())
    for x in (parameter, parameter.grad):
        if x is not None:
            flat = x.detach().reshape(-1)
            told.update(flat[:: max(1, len(flat) // _PLACES)].float().cpu().numpy().tobytes())
    return told.hexdigest()[:16]


def squares(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Of each gradient that ranks have parts of (DTensor), this rank's share of the square of its norm, on its device.

    A gradient is the same along a mesh's dimension where it is replicated, and on ranks of a larger mesh of others that its own
    has no dimension for: under FSDP2 and tensor parallelism, what is not tensor parallel is on the mesh of FSDP2 alone.
    """
    from torch.distributed.tensor import DTensor

    parts = [x for x in gradients if isinstance(x, DTensor)]
    meshes = {mesh: frozenset(mesh.mesh.flatten().tolist()) for mesh in {x.device_mesh for x in parts}}
    around = {mesh: max(len(other) for other in meshes.values() if own <= other) for mesh, own in meshes.items()}
    found = []
    for x in parts:
        replicas = [size for size, at in zip(x.device_mesh.shape, x.placements, strict=True) if at.is_replicate()]
        copies = int(np.prod(replicas)) * around[x.device_mesh] // len(meshes[x.device_mesh])
        found.append(x.to_local().float().square().sum() / copies)
    return found


def with_gradient_norm(readings: Sequence[Reading]) -> list[Reading]:
    """The norm of gradients that each rank has whole, and of those that it has a part of, as one."""
    square = sum(float(r.values[0]) for r in readings if r.metric == SHARDS)
    norm = sum(float(r.values[0]) for r in readings if r.metric == NORM)
    rest = [r for r in readings if r.metric not in (SHARDS, NORM)]
    if len(rest) == len(readings):
        return rest
    return [*rest, Reading(NORM, None, np.array([np.hypot(norm, square**0.5)]))]
