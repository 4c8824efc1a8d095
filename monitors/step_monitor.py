"""The second tier's families of the optimizer step: gradients, Adam's state, updates and the updates of experts.

Read in the hooks around a sampled step, where gradients still stand and the weights of before are still known; kept on the
device as one vector a step, and on its way to the host from then on. Weights are those of the sites: query and key
projections (of a low-rank chain the one nearest the kernel), router weights, and the experts' weights behind a router. What the
optimizer does not hold itself (masters of a sharded or mixed-precision optimizer) is not found.

Before the step the rows that `updates` and `experts` compare are copied: memory for one more copy of these weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreshock.monitors.step_statistics import ADAM, Rows, adam, change, norm
from foreshock.records import Reading, Site, WeightView
from foreshock.transfer import Later, Packet, Transfers

FAMILIES = frozenset({"gradients", "adam", "updates", "experts"})
_EXPERTS = re.compile(r"expert_weight_\d+")
Values = tuple[str, str, Tensor]  # metric, site id, 1-D


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The rows of one parameter that belong to one site. ``name`` is q, k or router; "" for experts."""

    site: str
    name: str
    parameter: Tensor
    rows: Rows

    @property
    def key(self) -> tuple[str, str, int]:
        return self.site, self.name, id(self.parameter)


class StepMonitor:
    """``before`` and ``after`` each optimizer step of a sampled step; ``update`` once it is worked off."""

    def __init__(self, families: Collection[str]) -> None:
        self.families = FAMILIES & set(families)
        self._known: dict[tuple[int, torch.device], Rows] = {}
        self._before: dict[tuple[str, str, int], Tensor] = {}
        self._found: dict[int, list[tuple[list[tuple[str, str, int]], Packet]]] = defaultdict(list)
        self._transfers = Transfers()

    @torch.no_grad()
    def before(self, optimizer: Any, sites: Sequence[Site]) -> None:
        """Copies what the step will change, if that is asked for."""
        self._before = {
            part.key: part.rows(part.parameter.detach()).clone()
            for part in self._parts(optimizer, sites)
            if ("updates" if part.name else "experts") in self.families
        }

    @torch.no_grad()
    def after(self, step: int, optimizer: Any, sites: Sequence[Site]) -> None:
        """Measures, and begins to bring the numbers to the host."""
        parts = list(self._parts(optimizer, sites))
        values = [*self._gradients(parts), *self._adam(optimizer, parts), *self._updates(parts), *self._experts(parts)]
        self._before = {}
        by_device: dict[torch.device, list[Values]] = defaultdict(list)
        for entry in values:
            by_device[entry[2].device].append(entry)
        for entries in by_device.values():
            layout = [(metric, site, x.numel()) for metric, site, x in entries]
            packet = self._transfers.start(torch.cat([x.float() for *_, x in entries]))
            self._found[step].append((layout, packet))

    def update(self, step: int, sites: Sequence[Site]) -> list[Reading]:
        """What was measured at ``step``; older steps that nobody asked for are dropped."""
        return self.update_later(step, sites)()

    def update_later(self, step: int, sites: Sequence[Site]) -> Later[list[Reading]]:
        """The same, later."""
        found = self._found.pop(step, [])
        for stale in [known for known in self._found if known < step]:
            del self._found[stale]

        def make() -> list[Reading]:
            readings = []
            for layout, packet in found:
                host, at = packet(), 0
                for metric, site, size in layout:
                    readings.append(Reading(metric, site, host[at : at + size]))
                    at += size
            return readings

        return Later([packet for _, packet in found], make)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept between steps."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Drops what was measured in the step under way."""
        self._found.clear()
        self._before = {}

    # -- each family ---------------------------------------------------------------------------------------------------

    def _gradients(self, parts: Sequence[_Part]) -> Iterator[Values]:
        for part in parts if "gradients" in self.families else ():
            if part.name and part.parameter.grad is not None and _is_plain(part.parameter.grad):
                yield f"gradient/{part.name}_norm", part.site, norm(part.rows(part.parameter.grad.detach()))

    def _adam(self, optimizer: Any, parts: Sequence[_Part]) -> Iterator[Values]:
        """One value a weight, of the query's and the key's NaN where one is not known."""
        if "adam" not in self.families:
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        by_site: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for part in parts:
            state = optimizer.state.get(part.parameter, {}) if part.name else {}
            found = adam(state, groups[id(part.parameter)], part.rows) if state else None
            if found is not None:
                by_site[part.site][part.name] = found
        for site, known in by_site.items():
            absent = torch.full_like(next(iter(known.values())), torch.nan)
            names = ("router",) if "router" in known else ("q", "k")
            table = torch.stack([known.get(name, absent) for name in names], 1)
            yield from ((f"adam/{name}", site, row) for name, row in zip(ADAM, table, strict=True))

    def _updates(self, parts: Sequence[_Part]) -> Iterator[Values]:
        for part in parts:
            if part.name and part.key in self._before:
                moved, whole = change(part.rows(part.parameter.detach()), self._before[part.key])
                yield f"update/{part.name}_ratio", part.site, moved / whole

    def _experts(self, parts: Sequence[_Part]) -> Iterator[Values]:
        """Over all weights of a site's experts."""
        by_site: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for part in parts:
            if not part.name and part.key in self._before:
                by_site[part.site].append(change(part.rows(part.parameter.detach()), self._before[part.key]))
        for site, found in by_site.items():
            moved, whole = (norm(torch.stack(column, 1)) for column in zip(*found, strict=True))
            yield "expert/update_norm", site, moved
            yield "expert/update_ratio", site, moved / whole

    # -- which rows ----------------------------------------------------------------------------------------------------

    def _parts(self, optimizer: Any, sites: Sequence[Site]) -> Iterator[_Part]:
        """Of every site's weights those that ``optimizer`` holds."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for site in sites:
            for name, view in _views(site):
                parameter = view.resolve()
                if parameter is not None and id(parameter) in owned and _is_plain(parameter):
                    yield _Part(site.id, name, parameter, self._rows(name, view, parameter.device))

    def _rows(self, name: str, view: WeightView, device: torch.device) -> Rows:
        key = (id(view.stages[0]), device)
        known = self._known.get(key)
        if known is None or known.stage is not view.stages[0]:
            known = self._known[key] = Rows.of(view.stages[0], device, each_channel=name == "router")
        return known


def _views(site: Site) -> Iterator[tuple[str, WeightView]]:
    named = (("q", site.q_weight), ("k", site.k_weight), ("router", site.weight))
    yield from ((name, view) for name, view in named if view is not None)
    yield from (("", view) for role, view in site.weights.items() if _EXPERTS.fullmatch(role))


def _is_plain(x: Tensor) -> bool:
    """No sharded, sparse or otherwise special tensor."""
    return x.layout is torch.strided and type(x) in (torch.Tensor, torch.nn.Parameter)
