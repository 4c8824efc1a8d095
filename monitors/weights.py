"""Router weights, read as they stand (arXiv 2606.28116): are the experts' rows growing alike?

Row ``w_i`` of a router is expert ``i``'s direction, ``[hidden]``. Weights that ranks hold between them are read in the first call
with the whole ones after the step, by one of these ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.records import Array, Read, Reading, Share, Site, as_it_is
from foreshock.transfer import Later, Packet, Transfers

AT_ONCE = 2**22  # numbers of a vector that goes to the host: routers travel together, up to 16 MiB in float32


class RouterWeights:
    """``router/similarity``, ``conditioning``, ``effective_rank`` and row norms of every router whose weight is known.

    ``read`` gives the tensor to read in a parameter's place (its fp32 master); those that have a ``share`` are left to
    `SharedRouterWeights`.
    """

    def __init__(self, read: Read = as_it_is, share: Share = lambda parameter: None) -> None:
        self.read, self.share = read, share
        self._transfers = Transfers()

    def update(self, step: int, sites: Sequence[Site]) -> list[Reading]:
        """One reading of length 1 per metric and router; a router whose weight is gone is skipped."""
        return self.update_later(step, sites)()

    def update_later(self, step: int, sites: Sequence[Site]) -> Later[list[Reading]]:
        """The same of the weights as they are now; the numbers are on their way."""
        routers = {site.id: _rows(site, self.read) for site, weight in _routers(sites) if self.share(weight) is None}
        return _sent(routers, self._transfers)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept between steps."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept between steps."""


class SharedRouterWeights:
    """The same of routers whose weight is whole in calls alone: `catch` copies the weights after the steps that ``every`` divides,
    the ranks take the routers in turns, and ``update`` has the readings once the calls have been."""

    def __init__(self, every: int, read: Read, share: Share) -> None:
        self.every, self.read, self.share = every, read, share
        self._taking: int | None = None
        self._numbers: dict[str, int] = {}
        self._caught: dict[str, Tensor] = {}
        self._transfers = Transfers()

    def take(self, step: int, sites: Sequence[Site]) -> None:
        """``step`` is over, and its weights are whole from the next calls on."""
        self._taking, self._caught = step, {}
        self._numbers = {site.id: number for number, (site, _) in enumerate(_routers(sites))}

    def catch(self, site: Site) -> None:
        """``site`` is about to be called with its whole weight."""
        number = self._numbers.get(site.id)
        if self._taking is None or self._taking % self.every or number is None or site.id in self._caught:
            return
        for _, weight in _routers([site]):
            rank, ranks = self.share(weight) or (0, 0)
            if ranks and number % ranks == rank:
                self._caught[site.id] = _rows(site, self.read).clone()

    def update(self, step: int, sites: Sequence[Site]) -> list[Reading]:
        """The readings of ``step``."""
        caught, self._caught = self._caught if step == self._taking else {}, {}
        return _sent(caught, self._transfers)()

    def state_dict(self) -> dict[str, Any]:
        """Whose turn it is; a resumed run goes on without a gap."""
        return {"taking": self._taking, "numbers": self._numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._taking, self._numbers, self._caught = state["taking"], dict(state["numbers"]), {}


def _routers(sites: Sequence[Site]) -> Iterator[tuple[Site, Tensor]]:
    for site in sites:
        weight = site.weight.resolve() if site.kind == "router" and site.weight is not None else None
        if weight is not None:
            yield site, weight


def _rows(site: Site, read: Read) -> Tensor:
    """``[experts, hidden]``, on the weight's device."""
    assert site.weight is not None
    return site.weight.factors(read)[0].T


def _sent(routers: Mapping[str, Tensor], transfers: Transfers) -> Later[list[Reading]]:
    """The rows of these routers on their way to the host, several in a vector, and what is made of them there."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[list[str]]] = {}
    wide = {site: rows if rows.dtype == torch.float64 else rows.float() for site, rows in routers.items()}
    for site, rows in wide.items():
        together = by_kind.setdefault((rows.device, rows.dtype), [[]])
        if together[-1] and sum(wide[one].numel() for one in together[-1]) + rows.numel() > AT_ONCE:
            together.append([])
        together[-1].append(site)
    shapes = {site: rows.shape for site, rows in wide.items()}
    groups = [sites for together in by_kind.values() for sites in together]
    packets = [transfers.start(torch.cat([wide[site].reshape(-1) for site in sites])) for sites in groups]
    return Later(packets, lambda: list(_readings(groups, shapes, packets)))


def _readings(
    groups: Sequence[Sequence[str]], shapes: Mapping[str, torch.Size], packets: Sequence[Packet]
) -> Iterator[Reading]:
    for sites, packet in zip(groups, packets, strict=True):
        ends = np.cumsum([shapes[site].numel() for site in sites])
        for site, numbers in zip(sites, np.split(packet(), ends[:-1]), strict=True):
            statistics = router_statistics(numbers.reshape(shapes[site]))
            yield from (Reading(name, site, np.array([value])) for name, value in statistics.items())


def router_statistics(rows_ED: Array) -> dict[str, float]:
    """The formulas, from float64 ``[experts, hidden]``; NaN where one is not defined (a zero row, a single expert)."""
    experts = len(rows_ED)
    norms = np.linalg.norm(rows_ED, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        resultant = (rows_ED / norms[:, None]).mean(0)
        # The mean over ordered pairs i != j of w_i.w_j / |w_i||w_j|, without forming the pairs.
        similarity = (experts * resultant @ resultant - 1) / np.float64(experts - 1)
        centre = rows_ED.mean(0)
        conditioning = np.linalg.norm(rows_ED - centre, axis=1).max() / np.linalg.norm(centre)
        finite = np.isfinite(rows_ED).all()
        squares = torch.linalg.svdvals(torch.from_numpy(rows_ED)).numpy() ** 2 if finite else np.full(1, np.nan)
        share = squares / squares.sum()
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum()
    return {
        "router/similarity": float(similarity),
        "router/conditioning": float(conditioning),
        "router/effective_rank": float(np.exp(entropy)),
        "router/row_norm_min": float(norms.min()),
        "router/row_norm_max": float(norms.max()),
        "router/row_norm_mean": float(norms.mean()),
    }
