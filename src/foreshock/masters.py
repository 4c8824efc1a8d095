"""The fp32 masters of weights that a model holds in 16 bits: what the optimizer moves, where the model sees it rounded.

A bfloat16 weight does not move until its master has moved by 2^-9 of it, so its change over a few steps is rounding. Mixed
precision keeps masters in many places (the optimizer's state, its own parameters, an attribute of the weight, one flat
buffer), under no common name. So they are found by value: a float32 tensor as large as the weight whose rounding is the
weight, element by element. Where two fit, none is taken. What was found is looked at again in 64 places, others each time,
whenever it is read; nothing here keeps an optimizer or a tensor alive, and nothing is written.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreshock.records import Site, local

UNSEEN = {torch.bfloat16: "2^-9", torch.float16: "2^-12"}  # of a weight: what rounding to nearest takes away
PLACES = 64  # compared before all elements are, and whenever a master is read
CHUNK = 2**24  # elements of a flat buffer that are rounded at a time
START = 32  # elements by which a weight is looked for in a flat buffer
FEW = 8  # places where those fit, at most: a weight that begins like many others cannot be told from them


@dataclass(frozen=True, slots=True)
class Master:
    """Where the master of a parameter is: from element ``start`` of ``owner`` on."""

    owner: weakref.ref[Tensor]
    start: int = 0

    def of(self, parameter: Tensor) -> Tensor | None:
        """In the shape of ``parameter``; None once it is gone, or too small."""
        owner = self.owner()
        if owner is None or owner.numel() < self.start + parameter.numel():
            return None
        if owner.shape == parameter.shape:
            return owner.detach()
        return owner.detach().reshape(-1)[self.start : self.start + parameter.numel()].view(parameter.shape)


@dataclass(slots=True)
class _Known:
    """What is known of one parameter. ``searches`` and ``reads`` are counted since a find, a loss or a new optimizer."""

    parameter: weakref.ref[Tensor]
    master: Master | None = None
    searches: int = 0
    reads: int = 0


class Masters:
    """``met`` every optimizer; then `read` gives a 16-bit parameter's master, and any other parameter itself."""

    def __init__(self) -> None:
        self._optimizers: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        self._known: dict[int, _Known] = {}

    def met(self, optimizer: Any) -> None:
        """``optimizer`` made a step: from now on masters are looked for in it too."""
        if optimizer not in self._optimizers:
            self._optimizers[optimizer] = None
            for known in self._known.values():
                known.searches = known.reads = 0

    @torch.no_grad()
    def read(self, parameter: Tensor) -> Tensor:
        """The fp32 master of ``parameter``, in its shape, or ``parameter`` where it has none. Detached, and not a copy. Of a
        `DTensor` this rank's part of the master: ranks come here at times of their own, and compare their own parts."""
        if parameter.dtype not in UNSEEN:
            return parameter
        known = self._known.get(id(parameter))
        if known is None or known.parameter() is not parameter:
            self._known = {at: entry for at, entry in self._known.items() if entry.parameter() is not None}
            known = self._known[id(parameter)] = _Known(weakref.ref(parameter))
        if known.master is not None:
            master = known.master.of(local(parameter))
            if master is not None and _rounds_to(master, local(parameter), known.reads):
                known.reads += 1
                return master
            known.master, known.searches, known.reads = None, 0, 0
        known.reads += 1
        if known.reads & (known.reads - 1):  # a search that found nothing is repeated at the 2nd, 4th, 8th ... reading
            return parameter
        known.searches += 1
        known.master = self._search(parameter)
        master = None if known.master is None else known.master.of(local(parameter))
        return parameter if master is None else master

    def notes(self, site: Site) -> tuple[str, ...]:
        """A line for the ledger where weights were read in 16 bits because no master was found."""
        names: dict[torch.dtype, dict[str, None]] = {}
        for view in (site.q_weight, site.k_weight, site.weight):
            for name, parameter in zip(view.names, view.held() or (), strict=False) if view is not None else ():
                known = self._known.get(id(parameter))
                if known is not None and known.parameter() is parameter and known.searches and known.master is None:
                    names.setdefault(parameter.dtype, {})[name] = None
        return tuple(
            f"no optimizer keeps fp32 masters of {', '.join(found)} ({str(dtype).removeprefix('torch.')}): "
            f"updates below {UNSEEN.get(dtype, '2^-9')} of a weight are not seen"
            for dtype, found in names.items()
        )

    def _search(self, parameter: Tensor) -> Master | None:
        part = local(parameter)
        if not bool(part.any()):
            return None  # every moment that has not moved yet would fit
        optimizers = list(self._optimizers)
        states = [getattr(optimizer, "state", None) for optimizer in optimizers]
        own = [state.get(parameter) for state in states if isinstance(state, Mapping)]
        listed = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        for candidates in (_tensors([vars(parameter), *own]), _tensors(listed)):
            fitting = [x for x in candidates if x.numel() == part.numel() and _rounds_to(x, part)]
            if fitting:
                return Master(weakref.ref(fitting[0])) if len(fitting) == 1 else None
        flat = [(x, at) for x in _tensors([listed, *own]) for at in _places(x, part)]
        return Master(weakref.ref(flat[0][0]), flat[0][1]) if len(flat) == 1 else None


def _tensors(found: Any, depth: int = 4) -> Iterator[Tensor]:
    """The plain float32 tensors in nested containers, each once, whoever else holds a view of it."""
    seen: set[tuple[int, int]] = set()

    def walk(value: Any, depth: int) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            value = local(value)
            plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided
            if plain and value.dtype is torch.float32 and (place := (value.data_ptr(), value.numel())) not in seen:
                seen.add(place)
                yield value
        elif depth and isinstance(value, Mapping | list | tuple):
            inner = value.values() if isinstance(value, Mapping) else value
            yield from itertools.chain.from_iterable(walk(x, depth - 1) for x in inner)

    yield from walk(found, depth)


@torch.no_grad()
def _rounds_to(master: Tensor, parameter: Tensor, turn: int | None = None) -> bool:
    """Whether ``master`` rounded is ``parameter``: in the places of a turn, evenly spread, or in those of the first and in all."""
    if turn is None:
        return _rounds_to(master, parameter, 0) and _same(master.reshape(-1), parameter.reshape(-1))
    every = max(1, parameter.numel() // PLACES)
    at = slice(turn % every, None, every)
    return _same(master.reshape(-1)[at], parameter.reshape(-1)[at])


def _same(wide: Tensor, narrow: Tensor) -> bool:
    """Whether ``wide`` rounded is ``narrow``; NaN is NaN."""
    rounded = wide.to(narrow.device, narrow.dtype)
    return bool(((rounded == narrow) | (rounded.isnan() & narrow.isnan())).all())


@torch.no_grad()
def _places(flat: Tensor, parameter: Tensor) -> list[int]:
    """Where in a larger flat buffer ``parameter`` lies, rounded."""
    whole, size = parameter.reshape(-1), parameter.numel()
    if flat.dim() != 1 or flat.numel() <= size or size < START:
        return []
    first = whole[:START].to(flat.device)
    found: list[int] = []
    for start in range(0, flat.numel() - size + 1, CHUNK):
        rounded = flat[start : start + CHUNK + START - 1].to(parameter.dtype)
        at = torch.nonzero(rounded[: max(0, len(rounded) - START + 1)] == first[0])[:, 0]
        for offset in range(1, START):
            at = at[rounded[at + offset] == first[offset]]
        found += [start + place for place in at.tolist() if start + place + size <= flat.numel()]
        if len(found) > FEW:
            return []
    return [place for place in found if _same(flat[place : place + size], whole)]
