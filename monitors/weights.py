"""Router weights, read as they stand (arXiv 2606.28116): are the experts' rows growing alike?

Row ``w_i`` of a router is expert ``i``'s direction, ``[hidden]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from foreshock.records import Array, Read, Reading, Site, as_it_is


class RouterWeights:
    """``router/similarity``, ``conditioning``, ``effective_rank`` and row norms of every router whose weight is known.

    ``read`` gives the tensor to read in a parameter's place (its fp32 master).
    """

    def __init__(self, read: Read = as_it_is) -> None:
        self.read = read

    def update(self, step: int, sites: Sequence[Site]) -> list[Reading]:
        """One reading of length 1 per metric and router; a router whose weight is gone is skipped."""
        readings = []
        for site in sites:
            if site.kind != "router" or site.weight is None or site.weight.resolve() is None:
                continue
            rows = site.weight.factors(self.read)[0].T.double().cpu().numpy()
            readings += [Reading(name, site.id, np.array([value])) for name, value in router_statistics(rows).items()]
        return readings

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept between steps."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept between steps."""


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
