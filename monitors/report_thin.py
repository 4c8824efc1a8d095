"""Long series in few numbers, and numbers in few characters.

A thinned stretch keeps its lowest and its highest value, so no spike is lost; what is not finite is listed beside.
Shapes: N samples, H heads or experts, P kept.
"""

from __future__ import annotations

from base64 import b64encode

import numpy as np

from foreshock.records import Array

LARGEST = 3.38e38  # that bfloat16 can say


def thin(steps: Array, values: Array, points: int) -> tuple[Array, Array]:
    """At most ``points`` of a curve ``[N]``, each at its own step; what is not finite is NaN."""
    kept = keep(values, points)
    return steps[kept], np.where(np.isfinite(values[kept]), values[kept], np.nan)


def keep(values: Array, points: int) -> Array:
    """Positions of the lowest and the highest finite value of each stretch, rising; all if there are no more than ``points``."""
    count = len(values)
    if count <= points:
        return np.arange(count)
    values = np.where(np.isfinite(values), values, np.nan)
    edges = _edges(count, max(points // 2, 1))
    ranked = np.full((len(edges) - 1, np.diff(edges).max()), np.nan)
    row = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    ranked[row, np.arange(count) - edges[row]] = values
    low = np.where(np.isnan(ranked), np.inf, ranked).argmin(1)
    high = np.where(np.isnan(ranked), -np.inf, ranked).argmax(1)
    return np.unique(np.concatenate([edges[:-1] + low, edges[:-1] + high]))


def extremes(steps: Array, values_NH: Array, points: int) -> tuple[Array, Array, bool]:
    """Steps ``[P]``, values ``[H, P]``, and whether they are the lowest and highest of stretches, in turn, and no samples."""
    if len(steps) <= points:
        return steps, values_NH.T, False
    edges = _edges(len(steps), points // 2)[:-1]
    pairs = np.stack([np.fmin.reduceat(values_NH, edges), np.fmax.reduceat(values_NH, edges)], 1)
    middle = np.append(edges[1:], len(steps)) - 1
    at = np.stack([steps[edges], (steps[edges] + steps[middle]) // 2], 1).reshape(-1)
    return at, pairs.reshape(-1, values_NH.shape[1]).T, True


def odd(steps: Array, values_NH: Array, *, whole: bool, most: int = 200) -> list[list[int | str]]:
    """Steps with a value that is infinite, or, of a ``whole`` run's numbers, NaN; elsewhere NaN is "not available"."""
    infinite = np.asarray(np.isinf(values_NH).any(1))
    found = np.flatnonzero(infinite | (np.isnan(values_NH).any(1) & whole))
    if len(found) > most:
        found = found[_edges(len(found), most)[:-1]]
    return [[int(steps[i]), "infinite" if infinite[i] else "NaN"] for i in found]


def _edges(count: int, parts: int) -> Array:
    return np.unique(np.linspace(0, count, max(parts, 1) + 1).astype(int))


class Packed:
    """Arrays as base64 text, each once. ``texts``: a letter for the type (i: int32, f: float32, h: bfloat16), then the numbers."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._known: dict[str, int] = {}

    def steps(self, values: Array) -> int:
        return self._add("i", values.astype("<i4"))

    def floats(self, values: Array) -> int:
        with np.errstate(over="ignore"):
            return self._add("f", values.astype("<f4"))

    def halves(self, values: Array) -> int:
        """Three significant digits in two bytes: the upper half of a float32, rounded. Infinities and NaN stay."""
        real = np.isfinite(values)
        bits = np.where(real, np.clip(values, -LARGEST, LARGEST), values).astype("<f4").view("<u4")
        upper = (bits + np.where(real, 0x8000, 0).astype("<u4")) >> 16
        return self._add("h", upper.astype("<u2"))

    def _add(self, kind: str, values: Array) -> int:
        text = kind + b64encode(np.ascontiguousarray(values).tobytes()).decode()
        if text not in self._known:
            self._known[text] = len(self.texts)
            self.texts.append(text)
        return self._known[text]
