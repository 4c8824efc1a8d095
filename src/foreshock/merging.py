"""One run out of many ranks: what each rank measured in a step, merged by the rule of each quantity.

A flush is two all-reduces of packed float64 vectors, one that adds and one that takes the largest, whatever a rank has sites or
samples of. Their layout is agreed between all ranks and holds until a rank has something new to tell: the first number of the sum
counts such ranks, and where it is not zero the ranks exchange what they have (digests first, each distinct description once) and
repeat the flush. So every rank makes the same calls in the same order, and none waits for one that has nothing.

A site on several ranks is one site. With the same heads (data parallel, sharded parameters) its sums add up and its maxima are
compared; with heads of its own on each rank (tensor parallel, by ``head_offset``) the readings stand side by side; with other
weights under the same name (pipeline stages that count layers from zero) it is another site, ``ID@RANK``. Laws are not diluted:
of each the worst rank counts, and `Merged.ranks` says which that is.

Vectors travel through a gloo group of the watch's own, or through a group that the user gives.
"""

from __future__ import annotations

import ast
import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import distributed

from foreshock import _torch
from foreshock.apart import LOSS, OF_LOSS, OWN, Apart, folded, trends_of
from foreshock.errors import ConfigError, ForeshockError
from foreshock.exchange import Told, card, device_of, exchange, named, shown
from foreshock.gradients import SHARDS, WHOLE, copies
from foreshock.instances import Instance
from foreshock.kin import names
from foreshock.records import Alarm, Array, Probe, Reading, Site, SiteStatus
from foreshock.runtime import Merged as Sums
from foreshock.shards import (
    LARGEST,
    Layout,
    Local,
    Loose,
    Part,
    Shard,
    Whole,
    described,
    extent,
    is_literal,
    is_told,
    joined,
    placed,
    put,
    scale,
    side_by_side,
    span,
    spans,
    with_rank,
    without_rank,
    worst_ranks,
)

NOTHING = "[]", "[]", "[]"  # a description
LONGEST = 600.0  # seconds a flush may be on its way: behind a pipeline's last stage the first has much of a step to go


class Merging:
    """Merges the ranks of a job. ``launch`` and ``receive`` must be called by all of them, in turns.

    ``probes``: those of a kind of site, the same on every rank. ``finish(instance, sums) -> list[Reading]``. ``group``: a process
    group of all ranks that watch; None makes one on gloo, for which `meet` waits for the other ranks once. ``timeout``: seconds for
    which this rank waits for the others.
    """

    def __init__(
        self,
        probes: Callable[[str], tuple[Probe, ...]],
        finish: Callable[[Instance, Mapping[tuple[str, str], Array]], list[Reading]],
        *,
        fail: Callable[[str, Exception], None],
        prints: Callable[[], list[str]] = list,
        group: Any = None,
        timeout: float = 60.0,
    ) -> None:
        self._probes, self._finish, self._fail, self._group = probes, finish, fail, group
        self._prints = prints
        self._parameters = 0  # of which this rank has the gradients whole
        self._copies = np.ones(0)  # of each, how many ranks have it
        self.timeout = timeout
        self.apart = Apart()
        self._layout = Layout({}, {})
        self._own: dict[Instance, tuple[str, int]] = {}  # where this rank's sites stand in the layout
        self._sites: dict[str | None, tuple[str, int]] = {}  # the same, by the id that they have here
        self._known: set[Any] = set()  # what this rank has told of itself
        self._sizes: dict[Loose, int] = {}
        self._told: dict[Instance, dict[str, int]] = {}
        self._quantities: dict[Instance, dict[tuple[str, str], tuple[int, str]]] = {}
        self._flight: tuple[Local, Any, Any, list[Any]] | None = None
        self._described = True  # whether the others know what this rank has
        self._hosts: list[str] = []
        self._spans: list[bytes] = []  # of each rank, what stands for the ranks that hold its weights between them
        self.flushes = self.agreements = 0

    @property
    def in_flight(self) -> bool:
        """Whether a flush was launched and not received."""
        return self._flight is not None

    @property
    def rank(self) -> int:
        return distributed.get_rank(self._group)

    @property
    def world(self) -> int:
        return distributed.get_world_size(self._group)

    def meet(self) -> None:
        """Make the group, at the same place on every rank; raises what torch does where that cannot be done."""
        if self._group is None:
            self._group = distributed.new_group(backend="gloo", timeout=datetime.timedelta(seconds=self.timeout))
            _torch.allow(self._group, max(self.timeout, LONGEST))

    def launch(self, local: Local) -> None:
        """Begin the flush of ``local.step``."""
        self.meet()
        sums, largest = (np.full(size, fill) for size, fill in zip(self._layout.sizes, (0.0, -np.inf), strict=True))
        failed: Exception | None = None
        try:
            self._pack(local, sums, largest)
        except Exception as error:  # the others wait for this rank, which has nothing to tell then
            sums[:], largest[:] = 0.0, -np.inf
            failed = error
        largest[:2] = local.step, -local.step
        device = device_of(self._group)
        added, most = torch.from_numpy(sums).to(device), torch.from_numpy(largest).to(device)
        works = [
            distributed.all_reduce(added, distributed.ReduceOp.SUM, self._group, async_op=True),
            distributed.all_reduce(most, distributed.ReduceOp.MAX, self._group, async_op=True),
        ]
        self._flight = local, added, most, works
        self.flushes += 1
        if failed is not None:
            self._fail("packing what the ranks merge", failed)

    def _pack(self, local: Local, sums: Array, largest: Array) -> None:
        """Put everything of ``local`` that has a place into the two vectors, and whether something has none."""
        worst = {instance: self._worst(instance, of) for instance, of in local.sums.items()}
        loose = self._once(local.loose)
        sums[0] = self._learn(local.sums, loose, worst)
        if not self._described:  # of the gradients a sum of all is told, which is divided by the ranks
            loose = {key: np.zeros(len(values)) for key, values in loose.items() if key[0] == SHARDS}
        for instance, quantities in local.sums.items():
            if instance not in self._own:
                continue
            place = self._own[instance]
            put(sums, self._layout.sums[place], np.ones(1))
            for name, values in quantities.items():
                self._put(sums, self._layout.sums, (*place, *name), values)
                self._put(largest, self._layout.largest, (*place, *name), np.where(np.isnan(values), LARGEST, values))
            for told, values in worst[instance].items():
                if told == OWN:
                    added, values = self.apart.tell(place, values)
                    put(sums, self._layout.sums.get((*place, told)), added)
                put(largest, self._layout.largest.get((*place, told)), with_rank(values, self.rank))
        for (metric_, site, age), values in loose.items():
            known, number = self._sites.get(site, (site, 0))
            self._put(sums, self._layout.sums, (metric_, known, age, number), np.array([1.0, *values]))
            if metric_ == LOSS:
                added, far = self.apart.tell((None, 0), np.array([folded(OF_LOSS, values)]))
                put(sums, self._layout.sums.get((OWN, metric_, known, age, number)), added)
                put(largest, self._layout.largest.get((OWN, metric_, known, age, number)), with_rank(far, self.rank))

    def _put(self, vector: Array, places: Mapping[tuple[Any, ...], slice], key: tuple[Any, ...], values: Array) -> None:
        if not put(vector, places.get(key), values):
            what = " ".join(part for part in key if isinstance(part, str))
            told = f"it is of another size than was agreed between ranks, {len(values)} numbers; record one size, or another name"
            self._fail(f"merging {what}, which is left out", ConfigError(told))

    def receive(self) -> Whole:
        """Wait for the flush that was launched. Raises what the group raises when a rank is gone or late."""
        assert self._flight is not None
        local, added, most, works = self._flight
        self._flight = None
        for work in works:
            work.wait(datetime.timedelta(seconds=self.timeout))
        sums, largest = added.cpu().numpy(), most.cpu().numpy()
        if largest[0] != -largest[1]:
            raise ForeshockError(
                f"merging ranks: they are at different steps ({-largest[1]:.0f} to {largest[0]:.0f}); give every rank the same "
                "`every`, and the same state where they resume"
            )
        if sums[0]:
            self._agree()
            self.launch(local)
            return self.receive()
        return self._whole(local.step, sums, largest)

    def drop(self) -> None:
        """Let go of a flush under way, on every rank alike: nobody waits for it."""
        self._flight = None

    def statuses(self, own: Iterable[SiteStatus]) -> tuple[SiteStatus, ...]:
        """``own``, of whole sites where this rank has some heads, and of sites that this rank has not, whose counts are of merged
        steps."""
        found = []
        for status in own:
            site = self.called(status.site)
            shards = self._layout.shards.get(site.id)
            found.append(replace(status, site=joined([site], shards[0].whole)) if shards else status)
        here = {name for name, _ in self._own.values()}
        for name, shards in self._layout.shards.items():
            if name not in here:
                ranks = sorted({rank for shard in shards for of in shard.holders for rank in of})
                found.append(shards[0].instance.status((f"on other ranks: {named(ranks, self._hosts)}",)))
        return tuple(found)

    def called(self, site: Site) -> Site:
        """A site of this rank under the id that it has in the run."""
        return replace(site, id=self._sites.get(site.id, (site.id, 0))[0])

    def placed(self, alarm: Alarm, ranks: Mapping[tuple[str, str | None], Array]) -> Alarm:
        """The alarm with its rank, in words too; ``ranks``: as `Whole` has them."""
        return placed(alarm, ranks, lambda rank: named([rank], self._hosts), self.apart.rank)

    # -- what this rank has ------------------------------------------------------------------------------------------

    def _worst(self, instance: Instance, sums: Mapping[tuple[str, str], Array]) -> dict[str, Array]:
        """Of this rank alone, what is told of the worst one, and the readings that may stand apart."""
        found = {r.metric: r.values for r in self._finish(instance, sums)}
        told = {metric_: values for metric_, values in found.items() if is_told(metric_)}
        judged = [folded(trend, found[trend.metric]) for trend in trends_of(found)]
        return told | {OWN: np.array(judged)} if judged else told

    def _once(self, loose: Mapping[Loose, Array]) -> dict[Loose, Array]:
        """``loose`` with the squares of all gradients as one number, to which each rank adds its share of those it has whole."""
        found = dict(loose)
        for key, values in loose.items():
            if key[0] == WHOLE:
                many = np.ones(len(values))
                many[: len(self._copies)] = self._copies[: len(values)]
                self._parameters = max(self._parameters, len(values))
                del found[key]
                shards = SHARDS, *key[1:]
                found[shards] = found.get(shards, np.zeros(1)) + self.world * (values / many).sum()
        return found

    def _learn(
        self,
        sums: Sums,
        loose: Mapping[Loose, Array],
        worst: Mapping[Instance, Mapping[str, Array]],
    ) -> bool:
        """Whether there is something that the layout has no place for."""
        for instance, of_site in sums.items():
            known = self._quantities.setdefault(instance, {})
            for (probe, name), values in of_site.items():
                maxima = next((p.maxima for p in instance.probes if p.name == probe), frozenset())
                known[probe, name] = len(values), "max" if name in maxima else "sum"
            self._told.setdefault(instance, {}).update({m: len(values) for m, values in worst[instance].items()})
        self._sizes |= {key: len(values) for key, values in loose.items()}
        having: set[Any] = {(i, name) for i, names in self._quantities.items() for name in names}
        having |= {(i, name) for i, names in self._told.items() for name in names} | set(self._sizes)
        having |= {(i, *i.laws.items()) for i in self._quantities} | {self._parameters}
        news, self._known = not having <= self._known, having
        return news

    def _description(self) -> tuple[str, str, str]:
        """This rank's sites; its readings that no probe made, of which under FSDP2 each rank has those of other sites; and the
        prints of the parameters of which it has the gradients whole. Each is a text: what ranks have alike is told once."""
        shards, mine = [], distributed.get_rank()
        for instance, ranks in zip(
            self._quantities, spans(instance.site for instance in self._quantities), strict=True
        ):
            if is_literal(instance.facts):
                shards.append(described(instance, ranks, mine, self._quantities[instance], self._told[instance]))
            else:
                told = f"the facts of {instance.site.id} are no Python literals; it is not merged"
                self._fail("merging ranks", ConfigError(told))
        loose = [[*key, size] for key, size in self._sizes.items()]
        return json.dumps(shards), json.dumps(loose), json.dumps(self._prints() if self._parameters else [])

    # -- what all have -----------------------------------------------------------------------------------------------

    def _agree(self) -> None:
        """Exchange what each rank has, each distinct description once, and lay out the vectors anew. A rank that cannot describe
        itself takes part with nothing, and tells nothing until there is news again."""
        failed: Exception | None = None
        try:
            among, texts = span(instance.site for instance in self._quantities), self._description()
        except Exception as error:
            among, texts, failed = (), NOTHING, error
        self._described = failed is None
        cards, told = exchange(self._group, texts, card(among), self.timeout)
        self._hosts, self._spans = shown(cards)
        self._lay_out(*told)
        self.agreements += 1
        if failed is not None:
            self._fail("describing what the ranks merge; this rank has no part in it for now", failed)

    def _lay_out(self, sites: Told, loose: Told, prints: Told) -> None:
        own = {(*extent(instance.site), instance.site.id): instance for instance in self._quantities}
        shards: dict[str, list[Shard]] = {}
        here: list[dict[str | None, dict[tuple[str, int], None]]] = []  # of each text, where its sites stand
        self._own, self._sites = {}, {}
        self._copies = copies(prints, self.rank)
        for (plain, _), called in zip(sites, names(sites, self._spans), strict=True):
            here.append({})
            for one in plain:
                site, first, whole = one["key"]
                for name, holders in called[site].items():
                    number = next((n for n, s in enumerate(shards.get(name, [])) if s.first == first), None)
                    if number is None:
                        shards.setdefault(name, []).append(self._shard(name, one, first, whole))
                        number = len(shards[name]) - 1
                    here[-1].setdefault(site, {})[name, number] = None
                    shard = shards[name][number]
                    shard.quantities += [tuple(q) for q in one["quantities"] if tuple(q) not in shard.quantities]
                    shard.told += [tuple(t) for t in one["told"] if tuple(t) not in shard.told]
                    shard.holders += holders
                    if any(self.rank in of for of in holders) and (instance := own.get((first, whole, site))):
                        self._own[instance] = self._sites[site] = name, number
        text_of = {rank: number for number, (_, ranks) in enumerate(sites) for rank in ranks}
        parts: dict[Part, int] = {}
        for plain, ranks in loose:
            texts = {text_of[rank] for rank in ranks if rank in text_of}
            for metric_, site, age, size in plain:
                for text in texts:
                    for known, number in here[text].get(site, {(site, 0): None}):
                        parts[metric_, known, age, number] = size
        for name, of in shards.items():
            for before, shard in zip(self._layout.shards.get(name, ()), of, strict=False):
                shard.instance.sampled = shard.instance.evaluations = before.instance.sampled
        self._layout = Layout(shards, parts)

    def _shard(self, name: str, plain: Mapping[str, Any], first: int, whole: int) -> Shard:
        site = replace(Site.from_json(plain["site"]), id=name)
        instance = Instance(site, self._probes(site.kind), ast.literal_eval(plain["facts"]), plain["laws"], ())
        return Shard(instance, [], [], first, whole)

    def _whole(self, step: int, sums: Array, largest: Array) -> Whole:
        readings: list[Reading] = []
        sites: dict[str, Site] = {}
        ranks: dict[tuple[str, str | None], Array] = {}
        for name, shards in self._layout.shards.items():
            sites[name] = joined([shard.instance.site for shard in shards], shards[0].whole)
            parts, told = [], []
            for number, shard in enumerate(shards):
                sampled = float(sums[self._layout.sums[name, number]][0])
                if sampled:
                    shard.instance.sampled += 1
                    shard.instance.evaluations += 1
                found, worst = self._finished(name, number, shard, sums, largest, sampled) if sampled else ({}, {})
                parts.append((shard.first, found))
                told.append((shard.first, worst))
            readings += [Reading(m, name, values) for m, values in side_by_side(parts).items()]
            ranks |= {(m, name): values for m, values in worst_ranks(told).items()}
        ages: dict[int, list[Reading]] = {0: readings}
        loose: dict[Loose, list[tuple[int, dict[str, Array]]]] = {}
        for metric_, site, age, number in self._layout.loose:
            if metric_ == LOSS:
                key = OWN, metric_, site, age, number
                added, far = sums[self._layout.sums[key]], without_rank(largest[self._layout.largest[key]])
                self.apart.hear((None, 0), [LOSS], added, *far)
            many, *values = sums[self._layout.sums[metric_, site, age, number]]
            if many:
                known = self._layout.shards.get(site or "")
                first = known[number].first if known else 0
                loose.setdefault((metric_, site, age), []).append((first, {metric_: np.array(values) / many}))
        for (metric_, site, age), parts in loose.items():
            ages.setdefault(age, []).append(Reading(metric_, site, side_by_side(parts)[metric_]))
        return Whole(step, sorted(((step - age, of) for age, of in ages.items()), key=lambda one: one[0]), sites, ranks)

    def _finished(
        self, name: str, number: int, shard: Shard, sums: Array, largest: Array, sampled: float
    ) -> tuple[dict[str, Array], dict[str, tuple[Array, Array]]]:
        quantities = {}
        for probe, quantity, _, merge in shard.quantities:
            vector, places = (largest, self._layout.largest) if merge == "max" else (sums, self._layout.sums)
            values = vector[places[name, number, probe, quantity]]
            quantities[probe, quantity] = np.where(values == LARGEST, np.nan, values)
        found = {r.metric: r.values for r in self._finish(shard.instance, quantities)}
        losses = sampled * int(shard.instance.site.facts.get("losses", 1))
        found = {m: values / scale(m, losses) for m, values in found.items()}
        worst = {}
        for metric_, _ in shard.told:
            values, ranks = without_rank(largest[self._layout.largest[name, number, metric_]])
            if metric_ == OWN:
                metrics = [trend.metric for trend in trends_of(found)]
                self.apart.hear((name, number), metrics, sums[self._layout.sums[name, number, metric_]], values, ranks)
                continue
            worst[metric_] = values, ranks
            if metric_.startswith("law/"):
                found[metric_] = values
        return found, worst
