"""How a job merges what the ranks of one that ended had measured and not told each other when a checkpoint was saved.

Each saved what it had to tell and the description by which ranks lay out their vectors (`foreshock.untold`). In the job that
resumes each of these is a `Member`, and what the members had to tell is merged as it would have been. Rank N takes the places of
ranks N, N + M, ... where there are M now; a process alone takes all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import distributed

from foreshock.apart import Apart
from foreshock.collector import Collector
from foreshock.exchange import CARD, Told, card, device_of, exchange, shown
from foreshock.merging import NOTHING, Merging
from foreshock.records import Array, Probe
from foreshock.shards import Local, Whole

Fail = Callable[[str, Exception], None]
Probes = Callable[[str], tuple[Probe, ...]]
Entry = Mapping[str, Any]


class Member(Merging):
    """Rank ``at`` of the ``before`` ranks that saved a state, for as long as it takes to merge what it had not told: ``entry``."""

    def __init__(self, at: int, before: int, entry: Entry, collector: Collector, probes: Probes, fail: Fail) -> None:
        super().__init__(probes, collector.finished, fail=fail)
        self._at, self._before = at, before
        self.entry = dict(entry)
        told = entry["told"] if entry.get("locals") else NOTHING
        self.card = card(entry.get("span", ()), entry.get("host", ""))
        by_key = {}
        for one in json.loads(told[0]):
            by_key[tuple(one["key"])] = instance = self._shard(one["key"][0], one, *one["key"][1:]).instance
            self._quantities[instance] = {}
        self.locals: dict[tuple[int, bool], Local] = {}
        for one in entry.get("locals", ()):
            sums = {by_key[tuple(key)]: _cut(names, x) for key, names, x in one["sums"] if tuple(key) in by_key}
            loose = {(metric, site, age): np.array(values, float) for metric, site, age, values in one["loose"]}
            self.locals[one["step"], one["judged"]] = Local(one["step"], sums, loose)
        self.texts = *told, json.dumps(sorted(self.locals, key=_order))  # the last: which steps it has to tell

    @property
    def rank(self) -> int:
        return self._at

    @property
    def world(self) -> int:
        return self._before

    def meet_again(self, cards: Sequence[bytes], told: Sequence[Told], apart: Apart) -> None:
        """Lay the vectors out as all members do."""
        self._hosts, self._spans = shown(cards)
        self.apart = apart
        self._lay_out(*told)

    def vectors(self, which: tuple[int, bool]) -> tuple[Array, Array]:
        """What this member had to tell of a step, to be added and to be compared."""
        sums, largest = (np.full(size, fill) for size, fill in zip(self._layout.sizes, (0.0, -np.inf), strict=True))
        try:
            if which in self.locals:
                self._pack(self.locals[which], sums, largest)
        except Exception as error:  # other ranks wait for this one
            sums[:], largest[:] = 0.0, -np.inf
            self._fail("packing what a checkpoint held of ranks that merge", error)
        return sums, largest

    def whole(self, step: int, sums: Array, largest: Array) -> Whole:
        return self._whole(step, sums, largest)

    def done(self, which: tuple[int, bool]) -> None:
        """What was told is no more to be saved."""
        left = [one for one in self.entry.get("locals", ()) if (one["step"], one["judged"]) != which]
        self.entry = {**self.entry, "locals": left}  # a new one, for states that were saved hold that of before


class Earlier:
    """A job of ``before`` ranks that ended. ``members``: those whose places this process takes. ``blank(rank)``: a rank of it that
    has nothing to tell."""

    def __init__(self, before: int, members: Mapping[int, Member], blank: Callable[[int], Member]) -> None:
        self.before, self.members, self._blank = before, dict(members), blank

    def wholes(
        self, among: Merging | None, apart: Apart, note: Callable[[str], None]
    ) -> Iterator[tuple[Whole, bool, Merging]]:
        """What all members had to tell, step by step, whether it is judged, and who knows its ranks. Called by every rank of those
        that merge, ``among`` whom this is one; None: it is alone. ``apart``: which ranks stood apart so far."""
        rank, ranks = (0, 1) if among is None else (among.rank, among.world)
        cards, (*told, waiting) = self._described(among, rank, ranks)
        steps = sorted({(step, judged) for plain, _ in waiting for step, judged in plain}, key=_order)
        absent = sorted(set(range(self.before)) - {at for _, of in waiting for at in of})
        if steps and absent:
            last = steps[-1][0]
            note(
                f"resuming at step {last + 1}: what waited to be merged of rank{'s' * (len(absent) > 1)} "
                f"{', '.join(map(str, absent))} was not loaded; steps {steps[0][0]} to {last} are told without"
            )
        blank = self._blank(rank)
        members = (*self.members.values(), blank)
        for member in members:
            member.meet_again(cards, told, apart)
        for which in steps:
            parts = [member.vectors(which) for member in members]
            sums, largest = np.sum([one for one, _ in parts], 0), np.max([one for _, one in parts], 0)
            if among is not None:
                sums, largest = _reduced(among, sums, "SUM"), _reduced(among, largest, "MAX")
            for member in members:
                member.done(which)
            yield blank.whole(which[0], sums, largest), which[1], blank

    def _described(self, among: Merging | None, rank: int, ranks: int) -> tuple[list[bytes], list[Told]]:
        """Of each rank of the job that saved its card; and the texts of each kind, with the members that have them."""
        slots = range(rank, rank + ranks * -(-self.before // ranks), ranks)
        here = [self.members.get(at) for at in slots]
        cards = [card((), "") if member is None else member.card for member in here]
        own = [[member and member.texts[kind] for member in here] for kind in range(1 + len(NOTHING))]
        rows: list[bytes] = [b"".join(cards)]
        found: list[Told] = [[(row, [0])] for row in own]
        if among is not None and ranks > 1:
            rows, found = exchange(among._group, [json.dumps(row) for row in own], b"".join(cards), among.timeout)
        cards = [rows[at % len(rows)][at // len(rows) * CARD :][:CARD] for at in range(self.before)]
        return cards, [_by_member(told, len(rows)) for told in found]


def same_on_all(among: Merging, what: Any) -> bool:
    """Whether all ranks of those that merge have the same. Called by each of them."""
    _, [told] = exchange(among._group, [json.dumps(what)], b"", among.timeout)
    return len(told) == 1


def _by_member(told: Told, ranks: int) -> Told:
    """The texts in rows that ranks told, each of the members ``rank + N * ranks`` in turn: every one once, with its members."""
    holders: dict[str, list[int]] = {}
    for row, of in told:
        for place, text in enumerate(row):
            if text is not None:
                holders.setdefault(text, []).extend(at + place * ranks for at in of)
    return sorted(((json.loads(text), sorted(members)) for text, members in holders.items()), key=lambda one: one[1])


def _order(which: Sequence[Any]) -> tuple[int, bool]:
    """Of one step what is judged comes first, and then what was logged too late for it."""
    return which[0], not which[1]


def _reduced(among: Merging, vector: Array, how: str) -> Array:
    tensor = torch.from_numpy(vector).to(device_of(among._group))
    work = distributed.all_reduce(tensor, getattr(distributed.ReduceOp, how), among._group, async_op=True)
    work.wait(timedelta(seconds=among.timeout))
    found: Array = tensor.cpu().numpy()
    return found


def _cut(names: Sequence[Sequence[Any]], values: torch.Tensor) -> dict[tuple[str, str], Array]:
    ends = np.cumsum([size for _, _, size in names])[:-1]
    parts = np.split(values.numpy().astype(np.float64), ends)
    return {(probe, name): part for (probe, name, _), part in zip(names, parts, strict=True)}
