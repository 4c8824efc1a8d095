"""What ranks had not told each other when a checkpoint was saved, and how a resumed job merges it, of as many ranks as it has.

Most save points lie between a sampled step and the end of its flush. As a rank may save by itself, nothing can be exchanged there:
each saves what it had to tell and the description by which ranks lay out their vectors. In the job that resumes each of these is a
`Member`, a rank of the job that saved, and what the members had to tell is merged as it would have been. Rank N takes the places of
ranks N, N + M, ... where there are M now; a process alone takes all of them.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import distributed

from foreshock.agreement import this_rank
from foreshock.apart import Apart
from foreshock.collector import Collector
from foreshock.exchange import device_of, exchange
from foreshock.gradients import WHOLE
from foreshock.merging import Merging
from foreshock.records import Array, Probe
from foreshock.resume import PENDING
from foreshock.shards import Local, Loose, Whole, extent, span

_SPAN, _HOST = 8, 64  # bytes of a digest of the ranks that hold a rank's weights with it, and of its host's name
Fail = Callable[[str, Exception], None]
Probes = Callable[[str], tuple[Probe, ...]]
Entry = Mapping[str, Any]
Found = list[tuple[Mapping[str, Any], list[int]]]  # descriptions, and the members that have them


class Member(Merging):
    """Rank ``at`` of the ``before`` ranks that saved a state, for as long as it takes to merge what it had not told: ``entry``."""

    def __init__(self, at: int, before: int, entry: Entry, collector: Collector, probes: Probes, fail: Fail) -> None:
        super().__init__(probes, collector.finished, fail=fail)
        self._at, self._before = at, before
        self.entry = dict(entry)
        self.told: dict[str, Any] = json.loads(entry["told"]) if entry.get("locals") else {}
        by_key = {}
        for one in self.told.get("shards", ()):
            by_key[tuple(one["key"])] = instance = self._shard(one["key"][0], one, *one["key"][1:]).instance
            self._quantities[instance] = {}
        self.locals: dict[tuple[int, bool], Local] = {}
        for one in entry.get("locals", ()):
            sums = {by_key[tuple(key)]: _cut(names, x) for key, names, x in one["sums"] if tuple(key) in by_key}
            loose = {(metric, site, age): np.array(values, float) for metric, site, age, values in one["loose"]}
            self.locals[one["step"], one["judged"]] = Local(one["step"], sums, loose)

    @property
    def rank(self) -> int:
        return self._at

    @property
    def world(self) -> int:
        return self._before

    def meet_again(self, hosts: list[str], spans: list[bytes], found: Found, apart: Apart) -> None:
        """Lay the vectors out as all members do."""
        self._hosts, self._spans, self.apart = hosts, spans, apart
        self._lay_out(found)

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
        self.entry["locals"] = [one for one in self.entry.get("locals", ()) if (one["step"], one["judged"]) != which]


class Untold:
    """What this rank has measured and not told: saved, loaded, and merged with what the others had.

    ``packed``: what it has to tell, by step. ``since``: the step from which on not all is recorded. ``waits``: whether something
    was loaded that is not merged yet, the same on all ranks. ``apart``: which ranks stood apart so far.
    """

    def __init__(self, collector: Collector, probes: Probes, fail: Fail) -> None:
        self._collector, self._probes, self._fail = collector, probes, fail
        self.packed: dict[int, Local] = {}
        self._members: dict[int, Member] = {}
        self._before = 0  # ranks of the job that saved what was loaded
        self._note: Callable[[str], None] = lambda told: None
        self.since = 0
        self.apart = Apart()

    @property
    def waits(self) -> bool:
        return self._before > 0

    def pack(self, step: int, now: Local) -> None:
        """Keep what this rank has to tell of ``step``, with what was packed of it for a checkpoint before."""
        known = self.packed.get(step, Local(step, {}, {}))
        self.packed[step] = Local(step, {**known.sums, **now.sums}, {**known.loose, **now.loose})

    def next(self) -> Local:
        """What is to be told first, which then is no more kept here."""
        return self.packed.pop(next(iter(self.packed)))

    # -- saved ---------------------------------------------------------------------------------------------------------------

    def state_dict(self, step: int, due: Sequence[int]) -> dict[str, Any]:
        """The entries of a state at ``step``, of which the sampled steps ``due`` are over and not told. Calls no collective."""
        rank, ranks = this_rank()
        merging = self._collector.merging
        if self.waits:
            now = {"step": step, "since": self.since, "ranks": self._before}
            held = {f"{PENDING}{at}": (member.entry | now,) for at, member in self._members.items()}
            return {f"{PENDING}{rank}": (now,)} | held
        entry: dict[str, Any] = {"step": step, "since": step, "ranks": 0}
        if merging is not None:
            entry |= {"since": self.since, "ranks": ranks}
            try:
                for over in due:
                    self.pack(over, self._collector.local(over))
                entry |= self._entry(merging, step)
            except Exception as error:
                self._fail("saving what ranks have not merged", error)
        return {f"{PENDING}{rank}": (entry,)}

    def _entry(self, merging: Merging, step: int) -> dict[str, Any]:
        flight, rest = merging._flight, self._collector.loose(step - 1)
        locals_ = [(one, True) for one in (*([flight[0]] if flight else []), *self.packed.values())]
        locals_ += [(Local(step - 1, {}, rest), False)] if rest else []
        knows = copy(merging)  # which tells of itself as if it had told this, and has learned nothing
        knows._quantities = {instance: dict(of) for instance, of in merging._quantities.items()}
        knows._told = {instance: dict(of) for instance, of in merging._told.items()}
        knows._sizes = dict(merging._sizes)
        saved, unmet = [], 0
        for local, judged in locals_:
            # Of parameters that ranks have met it is known how many have each; of others they learn it where they meet again.
            squares = [len(values) for key, values in local.loose.items() if key[0] == WHOLE]
            known = max(squares, default=0) <= len(merging._copies)
            unmet = unmet if known else max(squares)
            once, worst = knows._once(local.loose), {i: knows._worst(i, of) for i, of in local.sums.items()}
            knows._learn(local.sums, once, worst)
            loose = _loose(once if known else local.loose)
            saved.append({"step": local.step, "judged": judged, "sums": _sums(local), "loose": loose})
        knows._parameters = unmet  # whose prints are then told
        among = span(instance.site for instance in knows._quantities)
        told = knows._description() if saved else ""
        return {"locals": saved, "told": told, "span": list(among), "host": socket.gethostname()}

    # -- loaded --------------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Any], step: int, wanted: bool, note: Callable[[str], None]) -> None:
        """Take the places of the ranks that saved ``state`` at ``step``; ``wanted``: those of this process are one run again."""
        self.drop()
        self.since = step
        rank, ranks = this_rank()
        named = ((name.removeprefix(PENDING), of[0]) for name, of in state.items() if name.startswith(PENDING))
        entries = {int(at): entry for at, entry in named if entry.get("step") == step}
        self._before = state["shared"][0]["untold"]
        self._note = note if wanted else lambda told: None
        self.since = min((entry["since"] for entry in entries.values()), default=step)
        mine = set(range(rank, self._before, ranks) if wanted else [rank])
        for at, entry in entries.items():
            if at in mine:
                try:
                    self._members[at] = Member(at, self._before, entry, self._collector, self._probes, self._fail)
                except Exception as error:
                    self._fail(f"resuming; what rank {at} had not told is lost", error)

    def drop(self) -> None:
        """Let go of all of it: training goes on elsewhere."""
        self.packed.clear()
        self.forget()

    def forget(self) -> None:
        """Let go of what was loaded."""
        self._members.clear()
        self._before = 0

    # -- merged --------------------------------------------------------------------------------------------------------------

    def wholes(self, among: Merging | None) -> Iterator[tuple[Whole, bool, Merging]]:
        """What all members had to tell, step by step, whether it is judged, and who knows its ranks. Called by every rank of those
        that merge, ``among`` whom this is one; None: it is alone."""
        rank, ranks = (0, 1) if among is None else (among.rank, among.world)
        before, members = self._before, dict(self._members)
        hosts, spans, found = self._described(among, rank, ranks)
        steps = sorted({(step, judged) for plain, _ in found for step, judged in plain["steps"]}, key=_order)
        absent = sorted(set(range(before)) - {at for _, of in found for at in of})
        if steps and absent:
            last = steps[-1][0]
            self._note(
                f"resuming at step {last + 1}: what waited to be merged of rank{'s' * (len(absent) > 1)} "
                f"{', '.join(map(str, absent))} was not loaded; steps {steps[0][0]} to {last} are told without"
            )
        blank = Member(rank, before, {}, self._collector, self._probes, self._fail)
        for member in (*members.values(), blank):
            member.meet_again(hosts, spans, found, self.apart)
        for which in steps:
            parts = [member.vectors(which) for member in (*members.values(), blank)]
            sums, largest = np.sum([one for one, _ in parts], 0), np.max([one for _, one in parts], 0)
            if among is not None:
                sums, largest = _reduced(among, sums, "SUM"), _reduced(among, largest, "MAX")
            for member in members.values():
                member.done(which)
            self.since = which[0] + 1
            yield blank.whole(which[0], sums, largest), which[1], blank
        self.forget()
        if before != ranks:
            self.apart.forget()  # ranks have other numbers now

    def _described(self, among: Merging | None, rank: int, ranks: int) -> tuple[list[str], list[bytes], Found]:
        """Of each member its host, and what stands for the ranks that hold its weights; and the descriptions there are."""
        before, members = self._before, self._members
        told = {at: {**m.told, "steps": sorted(m.locals, key=_order)} for at, m in members.items() if m.told}
        told |= {at: {"steps": [], "shards": [], "loose": [], "gradients": []} for at in members if at not in told}
        if among is None or ranks == 1:
            records = [_record(members[at].entry if at in members else {}) for at in range(before)]
            found = [(plain, [at]) for at, plain in told.items()]
        else:
            slots = range(rank, rank + ranks * -(-before // ranks), ranks)
            text = json.dumps({"members": [told.get(at) for at in slots]})
            _, _, texts = exchange(among._group, text, (), among.timeout)
            own = b"".join(_record(members[at].entry if at in members else {}) for at in slots)
            size, gathered = _SPAN + _HOST, _gathered(among, own)
            records = [gathered[at % ranks][at // ranks * size :][:size] for at in range(before)]
            found = [
                (plain, [at + place * ranks for at in holders])
                for row, holders in texts
                for place, plain in enumerate(row["members"])
                if plain is not None
            ]
        hosts = [record[_SPAN:].decode(errors="replace").strip() for record in records]
        return hosts, [record[:_SPAN].strip(b"\0") for record in records], sorted(found, key=lambda one: one[1])


def _order(which: Sequence[Any]) -> tuple[int, bool]:
    """Of one step what is judged comes first, and then what was logged too late for it."""
    return which[0], not which[1]


def _record(entry: Entry) -> bytes:
    among = entry.get("span", ())
    shared = hashlib.sha256(repr(tuple(among)).encode()).digest()[:_SPAN] if among else bytes(_SPAN)
    return shared + str(entry.get("host", "")).encode()[:_HOST].ljust(_HOST)


def _gathered(among: Merging, own: bytes) -> list[bytes]:
    record = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device_of(among._group))
    records = [torch.empty_like(record) for _ in range(among.world)]
    work = distributed.all_gather(records, record, group=among._group, async_op=True)
    work.wait(timedelta(seconds=among.timeout))
    return [bytes(one.cpu().tolist()) for one in records]


def _reduced(among: Merging, vector: Array, how: str) -> Array:
    tensor = torch.from_numpy(vector).to(device_of(among._group))
    work = distributed.all_reduce(tensor, getattr(distributed.ReduceOp, how), among._group, async_op=True)
    work.wait(timedelta(seconds=among.timeout))
    found: Array = tensor.cpu().numpy()
    return found


def _sums(local: Local) -> list[Any]:
    """Of each site its key, the names and sizes of its quantities, and all of these as one float64 tensor."""
    return [
        [
            [i.site.id, *extent(i.site)],
            [[*name, len(x)] for name, x in of.items()],
            torch.tensor(np.concatenate([*of.values()])),
        ]
        for i, of in local.sums.items()
        if of
    ]


def _cut(names: Sequence[Sequence[Any]], values: torch.Tensor) -> dict[tuple[str, str], Array]:
    ends = np.cumsum([size for _, _, size in names])[:-1]
    parts = np.split(values.numpy().astype(np.float64), ends)
    return {(probe, name): part for (probe, name, _), part in zip(names, parts, strict=True)}


def _loose(loose: Mapping[Loose, Array]) -> list[Any]:
    return [[*key, np.asarray(values, float).tolist()] for key, values in loose.items()]
