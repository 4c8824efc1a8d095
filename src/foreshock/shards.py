"""What ranks have to tell each other of a step, and where it stands in two vectors: the nouns of `foreshock.merging`."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from foreshock import _torch
from foreshock.apart import LOSS, OWN
from foreshock.errors import ForeshockError
from foreshock.instances import Instance
from foreshock.monitors.metrics import metric
from foreshock.records import Alarm, Array, Facts, Reading, Site, local
from foreshock.runtime import Merged as Sums

LARGEST = float(np.finfo(np.float64).max)  # stands for NaN, which a maximum on the way would lose
_RANKS = 16  # low bits of a float64 that name a rank: 65,536 of them, and 36 bits of the number are left
_PRINT = 64  # entries of a weight that tell it from another of the same name
PARTS = ("heads", "kv_heads", "experts")  # axes along which shards stand side by side
SCALED = (
    "attention/grad_",
    "router/grad_norm",
)  # in units of a gradient, which the ranks of a loss's mean each see N times
UNSCALED = ("attention/grad_nonfinite", "attention/grad_delta_sign")
SQUARED = ("law/bias_num", "law/bias_den")  # in units of its square
TOLD = ("law/", "attention/nonfinite", "attention/grad_nonfinite", "router/nonfinite", "router/grad_nonfinite")
POOLED = ("law/bias_num", "law/bias_den", "law/key_gain", "law/euler_gain")

Key = tuple[str, int, int]  # a site's id, and the first of its heads or experts that is on this rank
Loose = tuple[str, str | None, int]  # a reading that no probe made: metric, site, and how many steps before the flush
Part = tuple[str, str | None, int, int]  # the same of one shard of the site


@dataclass(frozen=True)
class Local:
    """What one rank measured up to a step: sums of its sites, and readings by metric, site and age."""

    step: int
    sums: Sums
    loose: Mapping[Loose, Array]


@dataclass(frozen=True)
class Whole:
    """The same of all ranks: readings by age, the sites they are of, and at which rank a number that is told was the largest."""

    step: int
    readings: list[tuple[int, list[Reading]]]
    sites: Mapping[str, Site]
    ranks: Mapping[tuple[str, str | None], Array]


@dataclass
class Shard:
    """A site, or those of its heads that some ranks have: what it takes to finish its sums anywhere."""

    instance: Instance
    quantities: list[tuple[str, str, int, str]]  # probe, name, size, merge
    told: list[tuple[str, int]]  # metric, size
    first: int  # of its heads or experts, in the whole site's
    whole: int  # heads or experts of the whole site; 0 where this is all of it
    holders: list[Sequence[int]] = field(default_factory=list)  # the ranks that have it, text by text


class Layout:
    """Where everything stands in the two vectors: by site and number of the shard, and what of it; or by a loose reading's key."""

    def __init__(self, shards: Mapping[str, list[Shard]], loose: Mapping[Part, int]) -> None:
        self.shards, self.loose = shards, dict(loose)
        self.sums: dict[tuple[Any, ...], slice] = {}
        self.largest: dict[tuple[Any, ...], slice] = {}
        at, top = 1, 2  # behind the count of ranks with news; behind the step and its negative
        for site in sorted(shards):
            for number, shard in enumerate(shards[site]):
                for probe, name, size, merge in shard.quantities:
                    if merge == "max":
                        self.largest[site, number, probe, name] = slice(top, top := top + size)
                    else:
                        self.sums[site, number, probe, name] = slice(at, at := at + size)
                for name, size in shard.told:
                    self.largest[site, number, name] = slice(top, top := top + size)
                    if name == OWN:
                        self.sums[site, number, name] = slice(at, at := at + 3 * size)
                self.sums[site, number] = slice(at, at := at + 1)  # ranks that sampled it
        for key in sorted(self.loose, key=repr):
            self.sums[key] = slice(at, at := at + 1 + self.loose[key])
            if key[0] == LOSS:
                self.sums[OWN, *key], self.largest[OWN, *key] = slice(at, at := at + 3), slice(top, top := top + 1)
        self.sizes = at, top


def with_rank(values: Array, rank: int) -> Array:
    """Numbers from zero on, with ``rank`` in their lowest bits, so that the largest says whose it is; NaN is less than all."""
    bits = np.clip(values, 0.0, LARGEST).view(np.int64) >> _RANKS << _RANKS | rank
    return np.where(np.isnan(values), -np.inf, bits.view(np.float64))


def without_rank(largest: Array) -> tuple[Array, Array]:
    """The numbers, to 36 bits, and the ranks; NaN and -1 where no rank had one."""
    absent = largest == -np.inf
    bits = np.where(absent, 0.0, largest).view(np.int64)
    values = (bits >> _RANKS << _RANKS).view(np.float64)
    return np.where(absent, np.nan, values), np.where(absent, -1, bits & ((1 << _RANKS) - 1))


def put(vector: Array, where: slice | None, values: Array) -> bool:
    """``values`` in their place, unless there is none, or one of another size; whether it is not of another."""
    fits = where is None or where.stop - where.start == len(values)
    if where is not None and fits:
        vector[where] = values
    return fits


def is_told(name: str) -> bool:
    return name.startswith(TOLD) and name not in POOLED


def scale(name: str, sampled: float) -> float:
    """What a reading is divided by that each of ``sampled`` ranks saw so many times larger: the loss is their mean."""
    if name in SQUARED:
        return sampled**2
    return sampled if name.startswith(SCALED) and name not in UNSCALED else 1.0


def extent(site: Site) -> tuple[int, int]:
    """The first head (or expert) of ``site`` that is on this rank, and how many there are on all; 0 if these are all."""
    names = ("experts_offset", "experts_of") if site.kind == "router" else ("head_offset", "heads_of")
    first, whole = (int(site.facts.get(name, 0)) for name in names)
    own = site.experts if site.kind == "router" else site.heads
    return (0, 0) if whole == own else (first, whole)


def joined(sites: Sequence[Site], whole: int) -> Site:
    """The site with all its heads or experts."""
    site = sites[0]
    if not whole:
        return site
    if site.kind == "router":
        return replace(site, experts=whole)
    share = whole // (site.heads or whole)
    return replace(
        site, heads=whole, kv_heads=site.kv_heads and int(site.facts.get("kv_heads_of", site.kv_heads * share))
    )


def side_by_side(parts: Sequence[tuple[int, Mapping[str, Array]]]) -> dict[str, Array]:
    """Readings of a site's shards as the whole site's: heads and experts in their order, the rest by the metric's own rule. A shard
    that lacks one, or was not sampled, has NaN for it."""
    if len(parts) == 1:
        return dict(parts[0][1])
    found: dict[str, Array] = {}
    ordered = [of for _, of in sorted(parts, key=lambda part: part[0])]
    for name in dict.fromkeys(name for of in ordered for name in of):
        values = [of[name] for of in ordered if name in of]
        axis, merge = _rule(name)
        if axis in PARTS:
            absent = np.full(len(values[0]), np.nan)
            found[name] = np.concatenate([of.get(name, absent) for of in ordered])
        elif merge in ("max", "sum"):
            found[name] = np.max(values, 0) if merge == "max" else np.sum(values, 0)
        else:
            found[name] = np.mean(values, 0)
    return found


def worst_ranks(parts: Sequence[tuple[int, Mapping[str, tuple[Array, Array]]]]) -> dict[str, Array]:
    """Of each metric the ranks where it was the largest, side by side or, where shards have no parts, of the largest shard."""
    found: dict[str, Array] = {}
    ordered = [of for _, of in sorted(parts, key=lambda part: part[0])]
    for name in dict.fromkeys(name for of in ordered for name in of):
        told = [of[name] for of in ordered if name in of]
        if _rule(name)[0] in PARTS:
            absent = np.full(len(told[0][1]), -1)
            found[name] = np.concatenate([of[name][1] if name in of else absent for of in ordered])
        else:
            values, ranks = (np.array(x) for x in zip(*told, strict=True))
            largest = np.where(np.isnan(values), -np.inf, values).argmax(0)
            found[name] = np.take_along_axis(ranks, largest[None], 0)[0]
    return found


def is_literal(facts: Facts) -> bool:
    """Whether another rank can read ``facts`` as they are written."""
    try:
        return bool(ast.literal_eval(repr(dict(facts))) == dict(facts))
    except (ValueError, SyntaxError):
        return False


def _rule(name: str) -> tuple[str, str]:
    try:
        known = metric(name)
    except ForeshockError:
        return "", "mean"  # a user's own
    return known.axis, known.merge


def fingerprint(site: Site) -> str | None:
    """Of the weights as they stand (of a `DTensor` this rank's part), the same on ranks that hold copies; None where they cannot be
    read now."""
    found = []
    for x in map(local, _weights(site)):
        stands = type(x) in (torch.Tensor, torch.nn.Parameter) and x.untyped_storage().nbytes()
        if not stands:
            return None
        found.append(x.detach().reshape(-1)[:_PRINT].double().cpu().numpy().tobytes())
    return hashlib.sha256(b"".join(found)).hexdigest()[:16] if found else None


def described(
    instance: Instance,
    ranks: Sequence[int],
    rank: int,
    quantities: Mapping[tuple[str, str], tuple[int, str]],
    told: Mapping[str, int],
) -> dict[str, Any]:
    """A site as ``rank`` tells it to others. Of ``ranks`` that hold its weights between them each has parts, with a print of its
    own: the first one's is enough, and the others' texts stay alike. Of parts that are heads each is a shard."""
    first, whole = extent(instance.site)
    tells = whole or not ranks or ranks[0] == rank
    return {
        "key": [instance.site.id, first, whole],
        "print": fingerprint(instance.site) if tells else None,
        "site": instance.site.to_json(),
        "facts": repr(dict(instance.facts)),
        "laws": dict(instance.laws),
        "quantities": [[*name, *of] for name, of in quantities.items()],
        "told": [[name, size] for name, size in told.items()],
    }


def spans(sites: Iterable[Site]) -> list[tuple[int, ...]]:
    """Of each site the ranks that hold its weights between them; none where every rank that has it has it whole."""
    gathered = {id(found.whole): found.mesh for found in _torch.gathered_parameters()}
    found: list[tuple[int, ...]] = []
    for site in sites:
        ranks: set[int] = set()
        for x in _weights(site):
            ranks.update(gathered.get(id(x), ()))
            if hasattr(x, "device_mesh"):
                ranks.update(x.device_mesh.mesh.flatten().tolist())
        found.append(tuple(sorted(ranks)))
    return found


def span(sites: Iterable[Site]) -> tuple[int, ...]:
    """Those of all ``sites``."""
    return tuple(sorted(set().union(*spans(sites))))


def _weights(site: Site) -> list[torch.Tensor]:
    views = [view for view in (site.q_weight, site.k_weight, site.weight) if view is not None]
    return [x for view in views for x in view.held() or ()]


def placed(
    alarm: Alarm,
    ranks: Mapping[tuple[str, str | None], Array],
    named: Callable[[int], str],
    apart: Callable[[str, str | None], int | None],
) -> Alarm:
    """The alarm with the rank where its number was the worst, or whose own readings alone stand ``apart``, if that is known."""
    at = ranks.get((alarm.metric, alarm.site))
    part = next((x for x in (alarm.head, alarm.expert) if x is not None), 0)
    rank: int | None = -1 if at is None else int(at[min(part, len(at) - 1)])
    where = "worst on {}"
    if rank == -1:
        rank, where = apart(alarm.metric, alarm.site), "{} alone stands apart"
    if rank is None:
        return alarm
    told = where.format(named(rank))
    message = f"{alarm.message} {told[0].upper()}{told[1:]}."
    return replace(alarm, ranks=(rank,), evidence=(*alarm.evidence, told), message=message)
