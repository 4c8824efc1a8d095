"""Several probes at one kind of site as one: their statistics stand side by side in the packed vector.

A probe that nothing is joined to stays the object it was, so that the graph it is traced into does not change by a node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from foreshock.records import Array, Facts, Probe


@dataclass(frozen=True, slots=True)
class _Each:
    """Calls every one of ``parts`` and puts what they return into one mapping. Names must differ."""

    parts: tuple[Callable[..., Mapping[str, Any]], ...]

    def __call__(self, *args: Any) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for part in self.parts:
            results = part(*args)
            if doubles := found.keys() & results.keys():
                raise ValueError(
                    f"joining probes: several return {', '.join(sorted(doubles))}; give each a name of its own"
                )
            found |= results
        return found


def joined(probe: Probe, *more: Probe) -> Probe:
    """``probe`` with the forward statistics and the metrics of ``more``; gradients are read by ``probe`` alone."""
    if not more:
        return probe
    every = (probe, *more)

    def finish(facts: Facts, quantities: Mapping[str, Array]) -> Mapping[str, Array]:
        return _Each(tuple(one.finish for one in every))(facts, quantities)

    return Probe(
        name="+".join(one.name for one in every),
        kind=probe.kind,
        forward=_Each(tuple(one.forward for one in every)),
        finish=finish,
        backward=probe.backward,
        maxima=frozenset().union(*(one.maxima for one in every)),
    )
