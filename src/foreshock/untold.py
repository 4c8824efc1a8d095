"""What ranks have measured and not told each other: saved at any step, and loaded by as many ranks as there are then.

Most save points lie between a sampled step and the end of its flush. As a rank may save by itself, nothing can be exchanged there:
each saves what it has to tell and the description by which ranks lay out their vectors. The job that resumes merges it where
its ranks have met (`foreshock.rejoin`); what it saves before is that, and what it has measured itself, a second job's.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch

from foreshock.agreement import this_rank
from foreshock.apart import Apart
from foreshock.collector import Collector
from foreshock.errors import ForeshockError
from foreshock.gradients import WHOLE
from foreshock.merging import NOTHING, Merging
from foreshock.records import Array
from foreshock.rejoin import Earlier, Entry, Fail, Member, Probes, same_on_all
from foreshock.resume import PENDING
from foreshock.shards import Local, Loose, Whole, extent, span


class Untold:
    """What this rank has measured and not told: saved, loaded, and merged with what the others had.

    ``packed``: what it has to tell, by step. ``since``: the step from which on not all is recorded. ``apart``: which ranks stood
    apart so far.
    """

    def __init__(self, collector: Collector, probes: Probes, fail: Fail) -> None:
        self._collector, self._probes, self._fail = collector, probes, fail
        self.packed: dict[int, Local] = {}
        # Jobs whose state was loaded and is not merged yet, in the order in which they ran.
        self._earlier: list[Earlier] = []
        self._note: Callable[[str], None] = lambda told: None
        self.since = 0
        self.apart = Apart()

    @property
    def waits(self) -> bool:
        """Whether something was loaded that is not merged yet, the same on all ranks."""
        return bool(self._earlier)

    def pack(self, step: int, now: Local) -> None:
        """Keep what this rank has to tell of ``step``, with what was packed of it for a checkpoint before."""
        known = self.packed.get(step, Local(step, {}, {}))
        self.packed[step] = Local(step, {**known.sums, **now.sums}, {**known.loose, **now.loose})

    def next(self) -> Local:
        """What is to be told first, which then is no more kept here."""
        return self.packed.pop(next(iter(self.packed)))

    # -- saved ---------------------------------------------------------------------------------------------------------------

    def state_dict(self, step: int, due: Sequence[int]) -> dict[str, Any]:
        """The entries of a state at ``step``, of which the sampled steps ``due`` are over and not told: one for each place that
        this rank takes, with what is to be told there, job by job. Calls no collective."""
        rank, ranks = this_rank()
        merging = self._collector.merging
        jobs = [{at: member.entry for at, member in job.members.items()} for job in self._earlier]
        before = [job.before for job in self._earlier]
        if merging is not None:
            try:
                for over in due:
                    self.pack(over, self._collector.local(over))
                own = self._entry(merging, step)
            except Exception as error:
                own = {}
                self._fail("saving what ranks have not merged", error)
            jobs, before = [*jobs, {rank: own}], [*before, ranks]
        since = self.since if before else step
        now = {"step": step, "since": since, "ranks": before}
        places = {rank, *(at for job in jobs for at in job)}
        return {f"{PENDING}{at}": ({**now, "jobs": [job.get(at) for job in jobs]},) for at in places}

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
        told = knows._description() if saved else NOTHING
        return {"locals": saved, "told": list(told), "span": list(among), "host": socket.gethostname()}

    # -- loaded --------------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Any], step: int, wanted: bool, note: Callable[[str], None]) -> None:
        """Take the places of the ranks that saved ``state`` at ``step``; ``wanted``: those of this process are one run again."""
        self.drop()
        rank, ranks = this_rank()
        named = ((name.removeprefix(PENDING), of[0]) for name, of in state.items() if name.startswith(PENDING))
        entries = {int(at): entry for at, entry in named if entry.get("step") == step}
        self._note = note if wanted else lambda told: None
        self.since = min((entry["since"] for entry in entries.values()), default=step)
        for number, before in enumerate(state["shared"][0]["untold"]):
            mine = range(rank, before, ranks) if wanted else [rank]
            held = {at: dict(enumerate(entries[at].get("jobs", ()))).get(number) for at in mine if at in entries}
            members = {at: self._member(at, before, entry) for at, entry in held.items() if entry is not None}
            there = {at: member for at, member in members.items() if member is not None}
            self._earlier.append(Earlier(before, there, partial(self._blank, before)))

    def _member(self, at: int, before: int, entry: Entry) -> Member | None:
        try:
            return Member(at, before, entry, self._collector, self._probes, self._fail)
        except Exception as error:
            self._fail(f"resuming; what rank {at} had not told is lost", error)
            return None

    def _blank(self, before: int, at: int) -> Member:
        return Member(at, before, {}, self._collector, self._probes, self._fail)

    def drop(self) -> None:
        """Let go of all of it: training goes on elsewhere."""
        self.packed.clear()
        self.forget()

    def forget(self) -> None:
        """Let go of what was loaded."""
        self._earlier.clear()

    def wholes(self, among: Merging | None) -> Iterator[tuple[Whole, bool, Merging]]:
        """What the jobs before had to tell, as `Earlier.wholes` has it; called by every rank of those that merge."""
        before = [job.before for job in self._earlier]
        if among is not None and not same_on_all(among, before):
            self.forget()
            told = "they have loaded states of other saves; what these held and was not merged is lost"
            self._fail("merging what ranks had measured when the state was saved", ForeshockError(told))
        for behind in [*before[1:], 1 if among is None else among.world]:
            if not self._earlier:
                return
            for whole, judged, member in self._earlier[0].wholes(among, self.apart, self._note):
                self.since = whole.step + 1
                yield whole, judged, member
            if self._earlier and self._earlier[0].before != behind:
                self.apart.forget()  # ranks have other numbers from here on
            del self._earlier[:1]


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


def _loose(loose: Mapping[Loose, Array]) -> list[Any]:
    return [[*key, np.asarray(values, float).tolist()] for key, values in loose.items()]
