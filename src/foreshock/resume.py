"""What a watch saves, and how another goes on from it, also as one of more or fewer ranks.

A state has three entries: ``shared``, the same on every rank, with what all have heard where they are merged; ``rankN``, what rank
N alone knows; ``pendingN``, what it has measured and the ranks have not merged (`foreshock.untold`). Each is a tuple of one
dictionary, because `torch.distributed.checkpoint` stores a tuple whole and takes dictionaries and lists apart: it
loads what it is asked for by name, and a watch that has seen nothing yet cannot name what is in there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from foreshock.agreement import this_rank
from foreshock.errors import ConfigError

VERSION = 3
PENDING = "pending"
ALIKE = ("bias law", "judge", "collector", "actions", "pace", "apart")  # where ranks are merged: all hear the same
Fail = Callable[[str, Exception], None]


def save(
    clock: Any, parts: Mapping[str, Any], fail: Fail, merged: bool, untold: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The state of this rank: Python's own values and tensors only. A part that cannot be saved is left out and reported.
    ``merged``: whether ranks are watched as one run. ``untold``: what they have not told each other."""
    rank, ranks = this_rank()
    saved = {}
    for name, part in parts.items():
        try:
            saved[name] = plain(part.state_dict())
        except Exception as error:
            fail(f"saving the state of the {name}", error)
    shared = {"version": VERSION, "ranks": ranks, "merged": merged, "clock": clock.state_dict()}
    shared["parts"] = {name: saved.pop(name) for name in ALIKE if merged and name in saved}
    (entry,) = next(iter(untold.values()))
    shared["untold"] = entry["ranks"]  # of each job that had something to tell, how many ranks it had
    return {"shared": (shared,), f"rank{rank}": ({"step": clock.step, "parts": saved},), **untold}


def stateful(monitors: Sequence[Any]) -> dict[str, Any]:
    """Those of ``monitors`` that have a state, each by its class, and those of one class by their order."""
    names = [type(monitor).__name__ for monitor in monitors]
    named = {f"monitor {name} {names[:at].count(name)}": monitors[at] for at, name in enumerate(names)}
    return {name: monitor for name, monitor in named.items() if hasattr(monitor, "state_dict")}


def restore_clock(state: Mapping[str, Any], clock: Any, fail: Fail) -> bool:
    """Set the step clock, which is the same on all ranks. False for what no watch saved, which is reported."""
    try:
        (shared,) = state["shared"]
        if shared["version"] == VERSION:
            clock.load_state_dict(shared["clock"])
            return True
        told = f"it has version {shared['version']}, this foreshock reads {VERSION}"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    fail("resuming; the watch begins anew", ConfigError(f"no state that this version of foreshock saved ({told})"))
    return False


def restore(
    state: Mapping[str, Any],
    parts: Mapping[str, Any],
    note: Callable[[str], None],
    fail: Fail,
    merged: bool = False,
) -> None:
    """Hand each part what this rank saved. Where it saved nothing, or something of another step, all parts begin anew, but where
    ranks are ``merged`` those that are alike on all of them: they go on with what all had heard. Where ranks were watched as one
    run and no longer are, or the other way round, what they heard was of other series: what judges begins anew."""
    rank, ranks = this_rank()
    try:
        (shared,), (own,) = state["shared"], state.get(f"rank{rank}", ({},))
        step, before = shared["clock"]["step"], shared["ranks"]
        there = (
            own.get("step") == step
        )  # a checkpoint without it leaves what the watch filled in itself when it was loaded
        turned = min(before, ranks) > 1 and shared["merged"] != merged
        saved = {**shared["parts"], **own["parts"]} if there else shared["parts"] if merged and not turned else {}
    except Exception as error:
        fail(f"resuming; what rank {rank} knew begins anew", error)
        return
    changed = f"resuming at step {step}: saved by {before} rank{'s' * (before > 1)}, now {ranks}; "
    if not there:
        note(
            f"{changed}of rank {rank} there is no state, so its {'' if saved else 'detectors and '}weight snapshots begin anew"
        )
    if turned:
        told = (
            "what each rank heard for itself, and now they are one run"
            if merged
            else "one run, and now each is for itself"
        )
        note(f"{changed}the state is of {told}: detectors begin anew, alarms and weight snapshots go on")
        saved = _turned(saved, merged)
    elif there and before != ranks:
        left = ", and what the other ranks knew is left" if before > ranks else ""
        note(f"{changed}rank {rank} goes on with what it knew{left}")
    for name, part in parts.items():
        if name in saved:
            _load(name, part, saved[name], fail)


def _turned(saved: Mapping[str, Any], together: bool) -> dict[str, Any]:
    """``saved`` without what was concluded from series that are no more; and where ranks must act ``together``, without when each
    last did."""
    kept = {name: part for name, part in saved.items() if name not in ("bias law", "judge", *["actions"] * together)}
    return kept | {"collector": {**saved["collector"], "unjudged": []}} if "collector" in saved else kept


def _load(name: str, part: Any, saved: Any, fail: Fail) -> None:
    """All of ``saved`` or none of it."""
    try:
        fresh = part.state_dict()
    except Exception as error:
        fail(f"restoring the {name}", error)
        return
    try:
        part.load_state_dict(saved)
    except Exception as error:
        part.load_state_dict(fresh)
        fail(f"restoring the {name}; it begins anew", error)


def plain(value: Any) -> Any:
    """``value`` with NumPy's scalars and arrays as Python's own: all that ``torch.load(weights_only=True)`` takes."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([plain(entry) for entry in value])
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
