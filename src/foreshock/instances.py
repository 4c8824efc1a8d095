"""Sites as they run: one instance for each distinct site and weight set, whichever graph or recompilation it came from."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from foreshock.patterns import Match
from foreshock.patterns.boundary import NO_GRADIENT, entering_heads
from foreshock.patterns.experts import ROLE as EXPERTS
from foreshock.patterns.pattern import line_of
from foreshock.records import Array, Facts, Probe, Site, SiteStatus, WeightView, met

_FIELDS = frozenset(field.name for field in fields(Site)) - {
    "id",
    "name",
    "kind",
    "pattern",
    "model",
    "facts",
    "weights",
}
_FORM = ("sinks", "softcap", "heads", "kv_heads")  # attentions of one weight set that differ here are different sites
Held = Mapping[str, tuple[torch.Tensor, ...]]  # weight role -> the parameters that stand for it in one call


@dataclass(eq=False)
class Instance:
    """A site with its counters."""

    site: Site
    probes: tuple[Probe, ...]
    facts: Facts
    laws: Mapping[str, str]
    notes: tuple[str, ...]
    evaluations: int = 0
    sampled: int = 0

    def is_live(self) -> bool:
        """Whether its weights still exist: the id of a freed parameter may be another's by now."""
        views = (self.site.q_weight, self.site.k_weight, self.site.weight, *self.site.weights.values())
        return all(view is None or view.resolve() is not None for view in views)

    def become(self, other: Instance) -> None:
        """What ``other`` says of the same site holds from now on."""
        self.site, self.facts, self.laws, self.notes = other.site, other.facts, other.laws, other.notes

    def finish(self, probe: Probe, quantities: Mapping[str, Array]) -> dict[str, Array]:
        """What ``probe`` makes of its merged quantities: 1-D float64 by metric."""
        made = probe.finish(self.facts, quantities)
        return {name: np.asarray(values, np.float64).reshape(-1) for name, values in made.items()}

    def status(self, more: tuple[str, ...] = ()) -> SiteStatus:
        """Its line of the ledger, with further notes."""
        return SiteStatus(self.site, self.evaluations, self.sampled, dict(self.laws), (*self.notes, *more))


class Instances:
    """Finds or makes the instance of a match for the parameters that a call received."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        self.parameter_ids: set[int] = set()
        self._by_key: dict[tuple[Any, ...], Instance] = {}
        self._ids: set[str] = set()
        self.lock = threading.RLock()  # to hold over `resolve`: calls of watched graphs may come from several threads

    def __iter__(self) -> Iterator[Instance]:
        return iter(list(self._by_key.values()))

    def learn_names(self, names: Iterable[tuple[torch.Tensor, str]], *, bound: bool = False) -> None:
        """Names that the user gave (``bound``) win over those that Dynamo recorded first."""
        for parameter, name in names:
            known = self._names.get(id(parameter))
            if bound or known is None or known[0]() is not parameter:
                self._names[id(parameter)] = (weakref.ref(parameter), name)

    def name_of(self, parameter: torch.Tensor) -> str | None:
        """The name the user gave, else the first that Dynamo recorded. An id alone may be a freed parameter's."""
        known = self._names.get(id(parameter))
        return known[1] if known is not None and known[0]() is parameter else None

    def resolve(
        self,
        match: Match,
        name: str,
        probes: tuple[Probe, ...],
        facts: Facts,
        held: Held,
        beside: dict[Any, list[set[str]]],
    ) -> Instance:
        """``name`` and the line of source tell apart sites without weights, ``name`` alone those that lack one of two, and so do
        the heads of k and v as they enter, for readings are one a head. ``beside`` keeps, for one call of one graph, which laws
        hold at the sites of one key: where they differ, the sites do."""
        weights = tuple(id(parameter) for parameters in held.values() for parameter in parameters)
        rows = tuple(view.index.tobytes() for view in match.weights.values())
        form = (match.kind, match.pattern, *(match.facts.get(fact) for fact in _FORM), *entering_heads(match))
        lacking = match.kind == "attention" and len(match.weights) == 1
        key = (
            *form,
            weights or (line_of(match.anchor), repr(sorted(facts.items()))),
            rows,
            name * (lacking or not weights),
        )
        holding = {law for law, reason in match.laws.items() if not reason}
        kinds = beside.setdefault(key, [])
        if holding not in kinds:
            kinds.append(holding)
        at = (key, kinds.index(holding))
        found = self._by_key.get(at)
        if found is None or not found.is_live():
            found = self._by_key[at] = self._make(match, name, probes, facts, held)
        elif any(map(_unsaid, found.laws.values())) and not any(map(_unsaid, match.laws.values())):
            found.become(self._make(match, name, probes, facts, held, found.site.id))
        else:
            laws = _in_both(found.laws, match.laws)
            if not any(map(_unsaid, match.laws.values())) and _is_coarser(match.facts.get("dtype"), found.site.dtype):
                found.become(self._make(match, name, probes, facts, held, found.site.id))
            found.laws = laws
        return found

    def _make(
        self,
        match: Match,
        name: str,
        probes: tuple[Probe, ...],
        facts: Facts,
        held: Held,
        known_as: str | None = None,
    ) -> Instance:
        weights = met({role: self._rebind(view, held[role]) for role, view in match.weights.items()})
        model = "" if match.view is None else match.view.model
        paths = [view.names[0].split(".")[:-1] for role, view in weights.items() if not role.startswith(EXPERTS)]
        moved = any(view.resolve() is not match.weights[role].resolve() for role, view in weights.items())
        if paths:
            shared = ".".join(p[0] for p in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*paths, strict=False)))
            name = _located("" if name == match.anchor.name else name, shared, moved) or name
        if name == match.anchor.name:  # in no module below the one that was captured
            name = model or name
        everything: dict[str, Any] = {**match.facts, **weights}
        own = {key: value for key, value in everything.items() if key in _FIELDS}
        further = {key: value for key, value in match.facts.items() if key not in _FIELDS}
        others = {role: view for role, view in weights.items() if role not in _FIELDS}
        site = Site(
            known_as or self._fresh_id(match.kind, name),
            name,
            match.kind,
            match.pattern,
            model=model,
            **own,
            facts=further,
            weights=others,
        )
        told = (f"{role}: {note}" for role, view in weights.items() for note in view.notes)
        return Instance(site, probes, facts, match.laws, (*match.notes, *told))

    def _rebind(self, view: WeightView, parameters: tuple[torch.Tensor, ...]) -> WeightView:
        """``view`` on the parameters of this call: under regional compilation one graph serves many layers."""
        names = tuple(self.name_of(p) or old for p, old in zip(parameters, view.names, strict=True))
        return replace(view, names=names, parameters=tuple(weakref.ref(p) for p in parameters))

    def _fresh_id(self, kind: str, name: str) -> str:
        base = candidate = f"{kind}:{name}" if name else kind
        number = 2
        while candidate in self._ids:
            candidate, number = f"{base}#{number}", number + 1
        self._ids.add(candidate)
        return candidate


def _in_both(laws: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """``laws`` without those that do not hold in another graph of the same site, unless that one is of evaluation."""
    evaluated = any(map(_unsaid, more.values()))
    return {law: reason or ("" if evaluated else more.get(law, "")) for law, reason in laws.items()}


def _is_coarser(one: str | None, other: str | None) -> bool:
    """Whether a model was cast in mid-run, or meets autocast later, so that laws hold less exactly than at first."""
    named = [getattr(torch, name or "", None) for name in (one, other)]
    eps = [torch.finfo(dtype).eps for dtype in named if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    return len(eps) == 2 and eps[0] > eps[1]


def _unsaid(reason: str) -> bool:
    return reason.startswith(NO_GRADIENT)


def _located(name: str, path: str, moved: bool) -> str:
    """``name``, known from the compiled module down, with what ``path``, known from the model down, has in front of it.

    ``moved``: the call has other parameters than the capture had, so that a name which ``path`` does not hold is another's.
    """
    at = f".{path}.".rfind(f".{name}.") if name else -1
    return path[: at + len(name)] if at >= 0 else path if moved or not name else name
