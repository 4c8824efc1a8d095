"""One step for every rank: what a distributed job does about an alarm that a single rank may have heard.

No collective: ranks have different sites, and one that waits for the others waits for ever. The rank that hears the alarm
writes it, with a step a little ahead, into the key-value store that the job was started with; every rank looks there once a
sampled step and acts when its own step gets to the one that was written. Whoever writes first is followed by all. Ranks are
never further apart than a step where each step ends in an exchange of gradients, and the step written is further ahead.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

from torch import distributed

from foreshock import _torch
from foreshock.records import Alarm

_log = logging.getLogger("foreshock")
AHEAD = 2  # sampled steps: the next one, at which the other ranks read, and one more
WHAT = "agreeing with the other ranks on an alarm"


def is_shared() -> bool:
    """Whether this process is one of several in a job of torch.distributed."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def this_rank() -> tuple[int, int]:
    """``(rank, ranks)``: of torch.distributed where it is initialized, else of torchrun's variables, else ``(0, 1)``."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), ranks) if ranks > 1 else (0, 1)


class Agreement:
    """The same alarm at the same step on every rank. ``every``: how often to look, in steps, the same on all ranks.

    ``fail`` is told of a store that does not answer; then nothing is agreed, this rank does not act by itself, and asks again at
    its next sampled step. Agreements of a process are told apart by the order in which they are made, which must be the same on
    every rank.
    """

    _made = 0  # in this process; asking the store would lead ranks apart where it does not answer one of them

    def __init__(self, every: int, fail: Callable[[str, Exception], None]) -> None:
        self._every, self._fail = every, fail
        self._store: Any = None
        Agreement._made += 1
        self._number = Agreement._made
        self._turn = 0  # agreements that this rank has acted on
        self._heard: Alarm | None = None  # on this rank, and not in the store yet
        self._agreed: tuple[int, Alarm] | None = None

    def propose(self, alarm: Alarm, step: int) -> None:
        """This rank heard ``alarm`` while at ``step``: bind all ranks to a later one, or learn what they are bound to."""
        if self._agreed is None:
            self._heard = self._heard or alarm
            self._ask(step)

    def reached(self, step: int, looks: bool) -> Alarm | None:
        """Call once a step is over: the alarm that all ranks act on now, if there is one. ``looks``: whether others may have heard
        one that this rank does not hear, so that the store is asked."""
        if self._agreed is None and step % self._every == 0 and (looks or self._heard is not None):
            self._ask(step)
        if self._agreed is None or step < self._agreed[0]:
            return None
        (at, alarm), self._agreed = self._agreed, None
        self._turn += 1
        if step > at:
            _log.warning("acting at step %d on an alarm for which all ranks were bound to step %d", step, at)
        return alarm

    def _ask(self, step: int) -> None:
        """Write to the store or read it; after a failure the next attempt goes through a new connection."""
        try:
            if self._store is None:
                self._store = _torch.job_store()
            if self._heard is not None:
                at = (step // self._every + AHEAD) * self._every
                told = json.dumps({"step": at, "rank": distributed.get_rank(), "alarm": self._heard.to_json()})
                self._take(self._store.compare_set(self._key(), "", told))
            elif self._store.check([self._key()]):
                self._take(self._store.get(self._key()))
        except Exception as error:
            self._store = None
            self._fail(WHAT, error)

    def _take(self, text: bytes) -> None:
        told = json.loads(text)
        at, alarm, self._heard = told["step"], Alarm.from_json(told["alarm"]), None
        self._agreed = at, alarm
        _log.warning("rank %d heard an alarm; all ranks act at step %d: %s", told["rank"], at, alarm.message)

    def _key(self) -> str:
        return f"alarm/{self._number}/{self._turn}"
