"""The records that pass between the rooms: sites, weights, readings, alarms and the coverage ledger.

Everything here is a frozen value; nothing here imports another part of foreshock.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Facts = Mapping[str, Any]  # plain facts of a site: sizes, scale, layout; JSON values only
Tensors = Mapping[str, torch.Tensor]  # by role


@dataclass(frozen=True, slots=True)
class Probe:
    """What is measured at one kind of site.

    ``forward(facts, tensors, rows)`` and ``backward(facts, tensors, gradients)`` return named tensors, spelled in pure torch
    ops without control flow on values; ``rows`` is a vector of fresh uniform numbers in [0, 1). They are traced into the
    user's graph. Each named result is a quantity that adds up over microbatches, or merges by maximum if it is in
    ``maxima``. ``finish(facts, quantities)`` turns the merged quantities (1-D float64 arrays) into metrics by name.
    """

    name: str
    kind: str
    forward: Callable[[Facts, Tensors, torch.Tensor], Mapping[str, torch.Tensor]]
    finish: Callable[[Facts, Mapping[str, Array]], Mapping[str, Array]]
    backward: Callable[[Facts, Tensors, Tensors], Mapping[str, torch.Tensor]] | None = None
    maxima: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class WeightView:
    """How to read one head's ``[hidden, head_dim]`` factor out of a parameter.

    ``index[h, j]`` is the position, along ``axis`` of the parameter, of channel ``j`` of head ``h``: it covers separate,
    fused, interleaved and transposed projections alike. Heads are distinct: under grouped-query attention a key weight has
    as many heads as there are key/value heads. ``head_map`` says which of them each head of the tensor at the kernel reads.
    """

    names: tuple[str, ...]
    index: Array  # int64 [heads, head_dim]
    axis: int
    head_map: tuple[int, ...]
    parameter: weakref.ref[torch.Tensor] | None = None
    scale: tuple[str, Array, float] | None = (
        None  # (parameter name, int64 [heads, head_dim], offset): factor * (p + offset)
    )
    scale_parameter: weakref.ref[torch.Tensor] | None = None

    @property
    def heads(self) -> int:
        """Number of distinct heads that can be asked of `factor`."""
        return int(self.index.shape[0])

    def read_by(self, query_heads: int) -> tuple[int, ...]:
        """Which head of this weight each of ``query_heads`` query heads meets."""
        at_kernel = len(self.head_map)
        return tuple(self.head_map[head * at_kernel // query_heads] for head in range(query_heads))

    def resolve(self) -> torch.Tensor | None:
        """The live parameter, or None once it is gone."""
        return self.parameter() if self.parameter is not None else None

    def factors(self) -> torch.Tensor:
        """All factors, ``[heads, hidden, head_dim]``, in the parameter's dtype, detached."""
        weight = self.resolve()
        if weight is None:
            raise LookupError(f"reading the weight {', '.join(self.names)}: the parameter no longer exists")
        weight = weight.detach()
        heads, head_dim = self.index.shape
        rows = weight.index_select(self.axis, torch.as_tensor(self.index.reshape(-1), device=weight.device))
        rows = rows if self.axis == 0 else rows.T
        factors = rows.reshape(heads, head_dim, -1).transpose(1, 2)
        scale = self.scale_parameter() if self.scale_parameter is not None else None
        if scale is None or self.scale is None:
            return factors
        _, positions, offset = self.scale
        gain = scale.detach().reshape(-1)[torch.as_tensor(positions, device=scale.device)] + offset
        return factors * gain[:, None, :]

    def factor(self, head: int) -> torch.Tensor:
        """Head ``head``'s factor, ``[hidden, head_dim]``, so that ``x @ factor`` is the head's projection of ``x``."""
        return self.factors()[head]

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names), "axis": self.axis, "heads": self.heads}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> WeightView:
        """A view with its names and no tensor."""
        empty = np.zeros((plain["heads"], 0), dtype=np.int64)
        return cls(tuple(plain["names"]), empty, plain["axis"], tuple(range(plain["heads"])))


@dataclass(frozen=True, slots=True)
class Site:
    """One watched functional boundary: an attention or a router, with the weights that feed it.

    ``masked``: keys are hidden by more than causality. ``sinks``: learned logits take a share of each row. ``groups``: a router
    first chooses among groups of experts. ``biased``: a bias moves the choice and not the weights. ``selection``: how experts
    are chosen ("topk", "argmax", "sort", "threshold", "tokens": experts choose tokens). ``facts`` and ``weights`` hold what a
    kind of site of the user's own has beyond these.
    """

    id: str
    name: str
    kind: str
    pattern: str
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    causal: bool | None = None
    scale: float | None = None
    dropout: float = 0.0
    masked: bool = False
    softcap: float | None = None
    sinks: bool = False
    dtype: str = "float32"
    q_weight: WeightView | None = field(default=None, compare=False)
    k_weight: WeightView | None = field(default=None, compare=False)
    experts: int | None = None
    top_k: int | None = None
    scoring: str | None = None
    selection: str | None = None
    groups: int | None = None
    biased: bool = False
    weight: WeightView | None = field(default=None, compare=False)
    facts: Facts = field(default_factory=dict)
    weights: Mapping[str, WeightView] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values only; weights keep their names."""
        plain = asdict(replace(self, q_weight=None, k_weight=None, weight=None, weights={}))
        for role in ("q_weight", "k_weight", "weight"):
            view: WeightView | None = getattr(self, role)
            plain[role] = None if view is None else view.to_json()
        plain["weights"] = {role: view.to_json() for role, view in self.weights.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Site:
        """The site as stored; weight views come back with their names and no tensor."""
        values = dict(plain)
        for role in ("q_weight", "k_weight", "weight"):
            if values.get(role) is not None:
                values[role] = WeightView.from_json(values[role])
        values["weights"] = {role: WeightView.from_json(view) for role, view in values.get("weights", {}).items()}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Reading:
    """One metric at one site and one step: a 1-D float array (length 1, heads, key/value heads, or experts)."""

    metric: str
    site: str | None
    values: Array


@dataclass(frozen=True, slots=True)
class Alarm:
    """One finding. ``step`` is when it was heard, ``onset`` the estimate of when it began."""

    step: int
    onset: int
    site: str | None
    metric: str
    value: float
    expected: str
    severity: str  # "warning" | "critical"
    mechanism: str
    evidence: tuple[str, ...]
    message: str
    head: int | None = None
    expert: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"evidence": list(self.evidence)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Alarm:
        return cls(**{**plain, "evidence": tuple(plain["evidence"])})


@dataclass(frozen=True, slots=True)
class SiteStatus:
    """A line of the coverage ledger. ``laws`` maps each law to "" where it holds, else to the reason why it does not apply."""

    site: Site
    evaluations: int
    sampled: int
    laws: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site.to_json(),
            "evaluations": self.evaluations,
            "sampled": self.sampled,
            "laws": dict(self.laws),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> SiteStatus:
        return cls(
            Site.from_json(plain["site"]), plain["evaluations"], plain["sampled"], plain["laws"], tuple(plain["notes"])
        )


@dataclass(frozen=True, slots=True)
class Coverage:
    """What is watched and what is not, with the reason.

    ``unmatched``: what looked like a site and is none, or is not understood. ``graph_breaks``: one line for each break.
    ``eager``: frames that Dynamo gave up, wholly or from a recompile limit on. ``warnings``: what failed inside foreshock.
    """

    statuses: tuple[SiteStatus, ...] = ()
    unmatched: tuple[str, ...] = ()
    graph_breaks: tuple[str, ...] = ()
    eager: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[SiteStatus]:
        return iter(self.statuses)

    def __len__(self) -> int:
        return len(self.statuses)

    def to_json(self) -> dict[str, Any]:
        return {
            "statuses": [status.to_json() for status in self.statuses],
            **{name: list(getattr(self, name)) for name in _LINES},
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Coverage:
        lines = {name: tuple(plain[name]) for name in _LINES}
        return cls(tuple(SiteStatus.from_json(status) for status in plain["statuses"]), **lines)


_LINES = ("unmatched", "graph_breaks", "eager", "warnings")
