"""What a series is and how one is asked for: the same answers from memory, from a file being written and from a finished run.

A series is one metric at one site (or of the run, site None) over steps. Where a step was written twice, the last one wins.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from foreshock.errors import ConfigError

Steps = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


def nearest(word: str, known: Sequence[str]) -> str:
    """`` (did you mean a, b?)`` for the known names close to ``word``, else nothing."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def join(parts: Sequence[tuple[Steps, npt.NDArray[Any]]]) -> tuple[Steps, Values]:
    """Parts ``([n], [n, m])`` in the order written, as one column of float64: steps rise, and the last value of a step stays."""
    if not parts:
        return np.zeros(0, np.int64), np.zeros((0, 1))
    width = max(values.shape[1] for _, values in parts)
    steps = np.concatenate([steps for steps, _ in parts])
    values = np.concatenate([_widen(values, width) for _, values in parts], dtype=np.float64)
    if (np.diff(steps) > 0).all():
        return steps, values
    unique, last = np.unique(steps[::-1], return_index=True)
    return unique, values[::-1][last]


def _widen(values: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    if values.shape[1] == width:
        return values
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=np.nan)


class Queries:
    """`metrics`, `sites_of`, `steps` and `series` over whatever ``_keys`` and ``_column`` answer."""

    def _keys(self) -> list[tuple[str, str | None]]:
        """Every (metric, site), in the order first seen."""
        raise NotImplementedError

    def _column(self, metric: str, site: str | None) -> tuple[Steps, Values]:
        """Steps ``[n]``, rising, and values ``[n, m]`` of one stored series."""
        raise NotImplementedError

    def columns(self) -> list[tuple[str, str | None]]:
        """Every series by its metric and site, in the order first seen; site None stands for the run itself."""
        return self._keys()

    def column(self, metric: str, site: str | None) -> tuple[Steps, Values]:
        """Steps ``[n]`` and values ``[n, m]`` of one of `columns`, which is not checked: for whoever reads all of them."""
        return self._column(metric, site)

    def metrics(self) -> list[str]:
        """Names of all metrics, sorted."""
        return sorted({metric for metric, _ in self._keys()})

    def sites_of(self, metric: str) -> list[str | None]:
        """Sites that have the metric, in the order first seen; None stands for the run itself."""
        sites = [site for name, site in self._keys() if name == metric]
        if not sites:
            known = self.metrics()
            raise ConfigError(
                f"reading the metric {metric!r}: nothing by that name was recorded{nearest(metric, known)}; "
                f".metrics() lists the {len(known)} there are"
            )
        return sites

    def series(self, metric: str, site: str | None = None) -> tuple[Steps, Values]:
        """Steps int64 ``[n]`` and values float64, ``[n]`` for one number a step, ``[n, m]`` for vectors.

        ``site=None`` is the run's own series where there is one, else the only site's, else all sites stacked in the
        order first seen, ``[n, sites]`` or ``[n, sites, m]``, on the union of steps with NaN where a site has no value.
        """
        sites = self.sites_of(metric)
        if site is not None and site not in sites:
            known = [name for name in sites if name is not None]
            raise ConfigError(
                f"reading {metric!r} at site {site!r}: it was not recorded there{nearest(site, known)}; "
                f"it was at {_some(sites)}"
            )
        if site is not None or None in sites or len(sites) == 1:
            steps, values = self._column(metric, site if site is not None or None in sites else sites[0])
            return steps, _squeeze(values)
        return self._stacked(metric, sites)

    def _stacked(self, metric: str, sites: list[str | None]) -> tuple[Steps, Values]:
        columns = [self._column(metric, site) for site in sites]
        widths = {values.shape[1] for _, values in columns}
        if len(widths) > 1:
            raise ConfigError(
                f"stacking {metric!r} over its sites: their lengths differ ({sorted(widths)}); "
                f"name one site of {_some(sites)}"
            )
        steps = np.unique(np.concatenate([steps for steps, _ in columns]))
        stacked = np.full((len(steps), len(sites), widths.pop()), np.nan)
        for position, (own, values) in enumerate(columns):
            stacked[np.searchsorted(steps, own), position] = values
        return steps, _squeeze(stacked)

    @property
    def steps(self) -> Steps:
        """Every step at which anything was recorded, rising."""
        return np.unique(np.concatenate([np.zeros(0, np.int64), *(self._column(*key)[0] for key in self._keys())]))


def _squeeze(values: Values) -> Values:
    return values[..., 0] if values.shape[-1] == 1 else values


def _some(sites: Sequence[str | None], limit: int = 12) -> str:
    shown = ", ".join("the run" if site is None else site for site in sites[:limit])
    return shown + (f" and {len(sites) - limit} more" if len(sites) > limit else "")
