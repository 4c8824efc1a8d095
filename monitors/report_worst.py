"""Which series of a run stand nearest to their limits now: laws to their floors, judged series to the edge of their band."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foreshock.monitors.policy import LAWS
from foreshock.monitors.report_data import FOLDS, folded
from foreshock.monitors.report_limits import Band, Key, floors
from foreshock.records import Array, Site

if TYPE_CHECKING:
    from foreshock.reader import Run


@dataclass(frozen=True, slots=True)
class Standing:
    """``share`` of its limit that a series has reached: 1 is at it, inf is judged out. ``limit`` in words, ``recent`` its curve."""

    metric: str
    site: str | None
    value: float
    limit: str
    share: float
    recent: Array


def worst(run: Run, sites: Mapping[str, Site], bands: Mapping[Key, Band], most: int = 8) -> list[Standing]:
    """The nearest to their limits, or farthest beyond, first."""
    keys = frozenset(run.columns())
    found = [standing for key in keys if (standing := _law(run, keys, sites, key) or _trend(run, bands, key))]
    return sorted(found, key=lambda one: (-one.share, one.metric, one.site or ""))[:most]


def _law(run: Run, keys: frozenset[Key], sites: Mapping[str, Site], key: Key) -> Standing | None:
    metric, site = key
    if metric not in LAWS or site is None or site not in sites:
        return None
    steps, values = run.column(metric, site)
    limits = floors(run, keys, metric, sites[site], steps, values)
    if limits is None or not len(steps):
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.where(np.isfinite(limits), values / limits, -np.inf)
    head = int(excess[-1].argmax())
    share = float(excess[-1, head])
    if not share > -np.inf:
        return None
    return Standing(
        metric, site, float(values[-1, head]), f"at most {limits[-1, head]:.2g}", share, folded(values, "largest")
    )


def _trend(run: Run, bands: Mapping[Key, Band], key: Key) -> Standing | None:
    """The distance from the middle of the band, in half-widths, to a side that is judged; a band that has ended: it is out."""
    band = bands.get(key)
    if band is None or not len(band.steps):
        return None
    steps, values = run.column(*key)
    at = int(np.searchsorted(steps, band.steps[-1], side="right")) - 1
    curve = folded(values, FOLDS.get(band.fold, band.fold))
    if at < 0 or not np.isfinite(curve[at]):
        return None
    known = np.isfinite(band.low + band.high)
    if not known.any():
        return None
    last = int(np.flatnonzero(known)[-1])
    low, high = float(band.low[last]), float(band.high[last])
    limit = f"{low:.3g} to {high:.3g}"
    if not known[-1]:
        return Standing(*key, float(curve[at]), limit, np.inf, curve)
    off = (float(curve[at]) - (low + high) / 2) / max((high - low) / 2, 1e-300)
    share = max(0.0, *(side * off for side in band.directions))
    return Standing(*key, float(curve[at]), limit, share, curve)
