"""Weights of which a rank holds a share between the steps: FSDP2 makes them whole for a call and frees them after it.

Nothing here gathers a weight. What is to be read of one is copied when a graph is called with it; the sites take turns over the
ranks that hold their weights between them, so that each is read, and its snapshots kept, by one of these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreshock import _torch
from foreshock.instances import Instance, Instances
from foreshock.records import Read, Site, WeightView

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
_UNSEEN = {torch.bfloat16: "2^-9", torch.float16: "2^-12"}


@dataclass(frozen=True, slots=True)
class _Whole:
    parameter: weakref.ref[Tensor]
    rank: int
    ranks: int


class Sharding:
    """Knows the parameters that FSDP2 makes whole, by what graphs were called with. ``readers`` are monitors with ``take(step,
    sites)``, before the calls of a step, and ``catch(site)``, at each first call of a site in it; ``weigh`` is told the step for
    which both are done."""

    def __init__(self, instances: Instances, fail: Callable[[str, Exception], None]) -> None:
        self._instances, self._fail = instances, fail
        self._known: dict[int, _Whole] = {}
        self._modules: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._taking: int | None = None
        self.readers: list[Any] = []

    @property
    def gathers(self) -> bool:
        """Whether any weight met so far is whole during calls only."""
        return bool(self._known)

    def bind(self, model: torch.nn.Module) -> None:
        """Learn the paths of ``model``'s modules: the parameters of them are others during a call."""
        self._modules.update({module: name for name, module in model.named_modules()})

    def learn(self, parameters: Iterable[Any]) -> None:
        """A graph is captured or called with ``parameters``: know those that are made whole for it, under their full names."""
        new = {id(p) for p in parameters if isinstance(p, torch.nn.Parameter) and self.share(p) is None}
        if not new:
            return
        for found in _torch.gathered_parameters():
            if id(found.whole) in new:  # others are another model's
                self._known[id(found.whole)] = _Whole(weakref.ref(found.whole), found.rank, found.ranks)
                path, bound = self._modules.get(found.module), found.module in self._modules
                name = ".".join(filter(None, (path, found.own_name))) if bound else found.name
                for wrapper in _WRAPPERS:
                    name = name.replace(wrapper, "")
                self._instances.learn_names([(found.whole, name)] if name else [], bound=True)
            self._instances.parameter_ids.add(id(found.sharded))

    def share(self, parameter: Tensor) -> tuple[int, int] | None:
        """This rank's place among those that hold ``parameter`` between them, and their number; None if it always stands."""
        known = self._known.get(id(parameter))
        return (known.rank, known.ranks) if known is not None and known.parameter() is parameter else None

    def reading(self, read: Read) -> Read:
        """``read``, but of what stands for a call alone itself: whoever keeps its master keeps it in shares."""
        return lambda parameter: read(parameter) if self.share(parameter) is None else parameter

    # -- when what is read -----------------------------------------------------------------------------------------------

    def weigh(self, step: int, weigh: Callable[[int], None], *, last: bool = False) -> None:
        """``step`` is over. Its weights are read now where they stand, and by the calls of the next step where they do not; then
        ``weigh(step)`` follows. ``last``: no calls will come."""
        if not self.gathers:
            weigh(step)
            return
        if self._taking is not None and (self._taking < step or last):
            weigh(self._taking)
        if self._taking != step and step >= 0:
            self._taking = step
            sites = [instance.site for instance in self._instances]
            for reader in self.readers:
                self._guarded(reader, reader.take, step, sites)

    def called(self, instances: Collection[Instance]) -> None:
        """A graph is about to run in training with the weights of ``instances``."""
        if self.gathers:
            for instance in instances:
                for reader in self.readers:
                    self._guarded(reader, reader.catch, instance.site)

    def _guarded(self, reader: Any, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:
            self._fail(f"monitor {type(reader).__name__}", error)

    def state_dict(self) -> dict[str, Any]:
        """The step of which the weights are being read."""
        return {"taking": self._taking}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._taking = state["taking"]

    # -- the ledger ------------------------------------------------------------------------------------------------------

    def notes(self, site: Site, families: Collection[str]) -> tuple[str, ...]:
        """What is not read of a site's weights because a rank has a share of them."""
        held = [x for view in _views(site) for x in view.held() or ()]
        shares = [x for x in held if self.share(x) is not None]
        notes = []
        if shares:
            ranks = self._known[id(shares[0])].ranks
            notes.append(
                f"sharded over {ranks} ranks and whole in calls alone: each site's weights are read on one of them"
            )
            coarse = {x.dtype: "" for x in shares if x.dtype in _UNSEEN}
            for dtype in coarse:
                told = f"gathered in {str(dtype).removeprefix('torch.')}"
                notes.append(f"{told}: updates below {_UNSEEN[dtype]} of a weight are not seen")
        if families and (shares or any(hasattr(x, "placements") for x in held)):
            notes.append(f"no {', '.join(sorted(families))}: the optimizer has shares of the weights (DTensor)")
        return tuple(notes)


def _views(site: Site) -> list[WeightView]:
    named = (site.q_weight, site.k_weight, site.weight, *site.weights.values())
    return [view for view in named if view is not None]
