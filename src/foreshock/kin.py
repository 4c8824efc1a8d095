"""Which ranks have one site, and what it is called: worked out by distinct texts, with no loop over all ranks for each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreshock.exchange import Told


@dataclass(frozen=True, eq=False)
class Alike:
    """Ranks that told the same, in order, and hold their weights between the same ranks, for which ``span`` stands: empty where
    each has its weights whole."""

    ranks: Sequence[int]
    span: bytes


def alike(ranks: Iterable[int], spans: Sequence[bytes]) -> list[Alike]:
    """``ranks`` that told the same, taken apart; ``spans``: of each rank of the job."""
    found: dict[bytes, list[int]] = {}
    for rank in ranks:
        found.setdefault(spans[rank], []).append(rank)
    return [Alike(of, span) for span, of in found.items()]


def families(told: Iterable[tuple[str | None, int, Sequence[Alike]]]) -> list[list[Alike]]:
    """The ranks that have a site of one id, by which site that is; the family of the first rank in front.

    Of one are ranks whose weights are the same as they stand, or parts of the same tensors. ``told``: the print of the weights, how
    many heads or experts the whole site has where ranks have parts, and the ranks that told so.
    """
    found: list[tuple[set[Any], list[Alike]]] = []
    for known_by, whole, groups in told:
        for group in groups:
            shared = group.span
            marks: set[Any] = {mark for mark in (known_by, shared) if mark} if shared or not whole else {whole}
            marks = marks or {None}
            kin = [family for family in found if not family[0].isdisjoint(marks)]
            found = [family for family in found if family[0].isdisjoint(marks)]
            found.append((marks.union(*(of for of, _ in kin)), [group, *(one for _, own in kin for one in own)]))
    return sorted((own for _, own in found), key=first)


def first(family: Sequence[Alike]) -> int:
    """The first rank of it."""
    return min(group.ranks[0] for group in family)


def names(found: Told, spans: Sequence[bytes]) -> list[dict[str, dict[str, list[Sequence[int]]]]]:
    """Of each text that ranks told of their sites: what a site of an id is called in the whole run, and by which of these ranks."""
    groups = [alike(ranks, spans) for _, ranks in found]
    told: dict[str, list[tuple[str | None, int, Sequence[Alike]]]] = {}
    for (plain, _), own in zip(found, groups, strict=True):
        for one in plain:
            site, _, whole = one["key"]
            told.setdefault(site, []).append((one["print"], whole, own))
    called: dict[tuple[str, int], str] = {}
    for site, of in told.items():
        for number, family in enumerate(families(of)):
            name = f"{site}@{first(family)}" if number else site
            called |= {(site, id(group)): name for group in family}
    return [_by_name(plain, own, called) for (plain, _), own in zip(found, groups, strict=True)]


def _by_name(
    plain: Sequence[Mapping[str, Any]], own: Sequence[Alike], called: Mapping[tuple[str, int], str]
) -> dict[str, dict[str, list[Sequence[int]]]]:
    found: dict[str, dict[str, list[Sequence[int]]]] = {}
    for site in dict.fromkeys(one["key"][0] for one in plain):
        for group in own:
            found.setdefault(site, {}).setdefault(called[site, id(group)], []).append(group.ranks)
    return found
