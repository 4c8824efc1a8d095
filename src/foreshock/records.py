"""The records that pass between the rooms: sites, weights, readings, alarms and the coverage ledger.

Everything here is a frozen value; nothing here imports another part of foreshock.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Facts = Mapping[str, Any]  # plain facts of a site: sizes, scale, layout; JSON values only
Tensors = Mapping[str, torch.Tensor]  # by role
ALONE = (-1, -1)  # stands for an interval that is the onset alone
Read = Callable[[torch.Tensor], torch.Tensor]  # what to read in a parameter's place: its fp32 master, or itself
Share = Callable[[torch.Tensor], tuple[int, int] | None]  # (rank, ranks) of a parameter that is whole in calls alone


def as_it_is(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter itself."""
    return parameter


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a `DTensor`, without a collective; any other tensor itself."""
    found: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def _sent(positions: Array, device: torch.device) -> torch.Tensor:
    """On ``device``; to CUDA from pinned memory, for which nothing waits."""
    host = torch.as_tensor(positions)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@dataclass(frozen=True, slots=True)
class Probe:
    """What is measured at one kind of site. Several probes of a kind stand beside each other, each under a name of its own.

    ``forward(facts, tensors, rows)`` and ``backward(facts, tensors, gradients)`` return named tensors, spelled in pure torch
    ops without control flow on values; ``rows`` is a vector of fresh uniform numbers in [0, 1). They are traced into the
    user's graph. Each named result is a quantity that adds up over microbatches, or merges by maximum if it is in
    ``maxima``. Either may be None. ``finish(facts, quantities)`` turns the merged quantities (1-D float64 arrays), of forward
    passes, of backward passes or of both, into metrics by name.
    """

    name: str
    kind: str
    forward: Callable[[Facts, Tensors, torch.Tensor], Mapping[str, torch.Tensor]] | None
    finish: Callable[[Facts, Mapping[str, Array]], Mapping[str, Array]]
    backward: Callable[[Facts, Tensors, Tensors], Mapping[str, torch.Tensor]] | None = None
    maxima: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """How one projection is read out of its parameter, whatever its number of axes.

    ``index[h, j]`` is the position of channel ``j`` of head ``h`` on the output axes ``axes`` of the parameter, flattened; the
    other axes are its inputs, flattened likewise, or those at ``inputs``. ``head_map`` says which of these heads each head of the
    reader meets. ``gains`` are the positions in one more parameter each, with a number added to it, that multiply a channel:
    ``matrix * (gain + offset)``. With ``unit`` each channel is divided by its norm first; ``factor`` multiplies all.
    """

    index: Array  # int64 [heads, channels]
    axes: tuple[int, ...]
    head_map: tuple[int, ...]
    inputs: Array | None = None
    gains: tuple[tuple[Array, float], ...] = ()
    factor: float = 1.0
    unit: bool = False

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """``[heads, inputs, channels]`` as it stands in the parameter: a copy, channel after channel."""
        heads, channels = self.index.shape
        inputs = [axis for axis in range(weight.dim()) if axis not in self.axes]
        rows = weight.permute(*self.axes, *inputs).flatten(len(self.axes)) if inputs else weight[..., None]
        rows = rows.flatten(0, len(self.axes) - 1) if self.axes else rows[None]
        rows = rows.index_select(0, _sent(self.index.reshape(-1), weight.device))
        if self.inputs is not None:
            rows = rows.index_select(1, _sent(self.inputs, weight.device))
        return rows.reshape(heads, channels, -1).transpose(1, 2)

    def gain(self, parameters: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor | None:
        """What multiplies each channel, float64 ``[heads, channels]`` on ``device``; None where nothing does."""
        found: torch.Tensor | None = None
        for parameter, (positions, offset) in zip(parameters, self.gains, strict=True):
            one = parameter.reshape(-1)[_sent(positions, parameter.device)].double().to(device) + offset
            found = one if found is None else found * one
        if self.factor == 1.0 or found is not None:
            return found if found is None else found * self.factor
        return torch.full(self.index.shape, self.factor, dtype=torch.float64, device=device)

    def only(self, columns: Sequence[int]) -> Stage:
        """With these channels alone."""
        kept = list(columns)
        gains = tuple((positions[:, kept], offset) for positions, offset in self.gains)
        return replace(self, index=self.index[:, kept], gains=gains)


@dataclass(frozen=True, slots=True, eq=False)
class WeightView:
    """How to read one head's ``[hidden, head_dim]`` factor out of one parameter or several.

    Separate, fused, interleaved and transposed projections are one `Stage`; a low-rank chain (multi-head latent attention) has a
    stage for each projection, the one nearest the kernel first. ``names`` and ``parameters`` run along the stages: each weight
    and then its gains. Heads are distinct: under grouped-query attention a key weight has as many as there are key/value heads.

    ``channels``: which channels of the head the columns of a factor are (None: all, in order). Where a part of the head comes
    from elsewhere (the rotary half of a latent key), it is left out.
    """

    names: tuple[str, ...]
    stages: tuple[Stage, ...]
    parameters: tuple[weakref.ref[torch.Tensor] | None, ...] = ()
    channels: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def index(self) -> Array:
        """``[heads, channels]``: positions on the flattened output axes of the parameter nearest the kernel."""
        return self.stages[0].index

    @property
    def head_map(self) -> tuple[int, ...]:
        """Which head of this view each head of the tensor at the kernel reads."""
        return self.stages[0].head_map

    @property
    def heads(self) -> int:
        """Number of distinct heads that can be asked of `factor`."""
        return int(self.index.shape[0])

    def read_by(self, query_heads: int) -> tuple[int, ...]:
        """Which head of this weight each of ``query_heads`` query heads meets."""
        at_kernel = len(self.head_map)
        return tuple(self.head_map[head * at_kernel // query_heads] for head in range(query_heads))

    def held(self) -> tuple[torch.Tensor, ...] | None:
        """The live parameters in the order of ``names``, or None once one of them is gone."""
        found = [reference() if reference is not None else None for reference in self.parameters]
        return tuple(x for x in found if x is not None) if found and all(x is not None for x in found) else None

    def resolve(self) -> torch.Tensor | None:
        """The live parameter nearest the kernel, or None once it or another of the view is gone."""
        held = self.held()
        return None if held is None else held[0]

    def matrices(self, read: Read = as_it_is) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Of each stage its matrix, ``[heads, inputs, channels]`` in the dtype of what ``read`` gives, and its gain, float64
        ``[heads, channels]`` or None. Detached. Raises LookupError once a parameter is gone."""
        held = self.held()
        if held is None:
            raise LookupError(f"reading the weight {', '.join(self.names)}: the parameter no longer exists")
        found, at = [], 0
        for stage in self.stages:
            weight, *gains = (local(read(x).detach()) for x in held[at : at + 1 + len(stage.gains)])
            matrix, gain = stage.matrix(weight), stage.gain(gains, weight.device)
            if stage.unit:
                gain = (1.0 if gain is None else gain) / matrix.double().norm(dim=1)
            found.append((matrix, gain))
            at += 1 + len(gains)
        return found

    def factors(self, read: Read = as_it_is) -> torch.Tensor:
        """All factors, ``[heads, hidden, head_dim]``, detached: in the dtype of what is read, a chain's in at least float32."""
        product: torch.Tensor | None = None
        for stage, (matrix, gain) in zip(self.stages, self.matrices(read), strict=True):
            factor = matrix if gain is None else matrix * gain.to(matrix.dtype)[:, None, :]
            if product is None:
                product = factor
                continue
            wide = torch.promote_types(torch.float32, torch.promote_types(factor.dtype, product.dtype))
            factor = factor if factor.shape[0] == 1 else torch.stack([factor[head] for head in stage.head_map])
            product = factor.to(wide) @ product.to(wide)
        assert product is not None
        return product

    def factor(self, head: int) -> torch.Tensor:
        """Head ``head``'s factor, ``[hidden, head_dim]``, so that ``x @ factor`` is the head's projection of ``x``."""
        return self.factors()[head]

    def only(self, channels: Sequence[int]) -> WeightView:
        """The view of those of ``channels`` (of the head) that it has."""
        own = range(self.index.shape[1]) if self.channels is None else self.channels
        columns = [column for column, channel in enumerate(own) if channel in set(channels)]
        kept = tuple(own[column] for column in columns)
        if kept == tuple(own):
            return self
        return replace(self, stages=(self.stages[0].only(columns), *self.stages[1:]), channels=kept)

    def to_json(self) -> dict[str, Any]:
        channels = None if self.channels is None else list(self.channels)
        return {"names": list(self.names), "axes": list(self.stages[0].axes), "heads": self.heads, "channels": channels}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> WeightView:
        """A view with its names and no tensor."""
        empty = np.zeros((plain["heads"], 0), dtype=np.int64)
        stage = Stage(empty, tuple(plain.get("axes", ())), tuple(range(plain["heads"])))
        channels = plain.get("channels")
        return cls(tuple(plain["names"]), (stage,), channels=None if channels is None else tuple(channels))


def met(weights: Mapping[str, WeightView]) -> dict[str, WeightView]:
    """``weights`` with the query's and the key's factors cut to the channels that both have, so that they meet in a product."""
    q, k = weights.get("q_weight"), weights.get("k_weight")
    found = dict(weights)
    if q is not None and k is not None:
        if k.channels is not None:
            found["q_weight"] = q.only(k.channels)
        if q.channels is not None:
            found["k_weight"] = k.only(q.channels)
    return found


@dataclass(frozen=True, slots=True)
class Site:
    """One watched functional boundary: an attention or a router, with the weights that feed it.

    ``model`` is the class of the module whose function was captured: the whole model, or a part of it behind a graph break.
    ``masked``: keys are hidden by more than causality. ``sinks``: learned logits take a share of each row. ``groups``: a router
    first chooses among groups of experts. ``biased``: a bias moves the choice and not the weights. ``selection``: how experts
    are chosen ("topk", "argmax", "sort", "threshold", "tokens": experts choose tokens). ``facts`` and ``weights`` hold what a
    kind of site of the user's own has beyond these.
    """

    id: str
    name: str
    kind: str
    pattern: str
    model: str = ""
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
    """One finding. ``step`` is when it was heard, ``onset`` the estimate of when it began.

    ``confidence`` in the mechanism: "proved" by an identity, "likely" where two symptoms agree, "possible" where one speaks alone.
    ``onset_interval``: it began after the first of these steps and not after the second; without one, at the onset alone.
    ``ranks``: in a distributed job, where a law was broken worst, or whose readings alone stand apart; empty where no rank does.
    """

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
    onset_interval: tuple[int, int] = ALONE
    confidence: str = ""
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.onset_interval == ALONE:
            object.__setattr__(self, "onset_interval", (self.onset, self.onset))

    @property
    def since(self) -> str:
        """The onset in words, with its interval where that says more."""
        return dated(self.onset, self.onset_interval)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {name: list(getattr(self, name)) for name in _ROWS}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Alarm:
        """The alarm as stored; one that was stored before onsets had intervals has the onset alone."""
        return cls(**{**plain, **{name: tuple(plain[name]) for name in _ROWS if name in plain}})


def dated(onset: int, interval: tuple[int, int]) -> str:
    """An onset in words, with its interval where that says more: "since about step 400 (390 to 410)"."""
    low, high = interval
    return f"since about step {onset}" + (f" ({low} to {high})" if low < high else "")


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
        rest = plain["evaluations"], plain["sampled"], plain["laws"], tuple(plain["notes"])
        return cls(Site.from_json(plain["site"]), *rest)


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

    def without(self, note: str) -> Coverage:
        """The same ledger, without that note at its sites."""
        kept = (replace(s, notes=tuple(told for told in s.notes if told != note)) for s in self.statuses)
        return replace(self, statuses=tuple(kept))

    def to_json(self) -> dict[str, Any]:
        lines = {name: list(getattr(self, name)) for name in _LINES}
        return {"statuses": [status.to_json() for status in self.statuses], **lines}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Coverage:
        lines = {name: tuple(plain[name]) for name in _LINES}
        return cls(tuple(SiteStatus.from_json(status) for status in plain["statuses"]), **lines)


_ROWS, _LINES = ("evidence", "onset_interval", "ranks"), ("unmatched", "graph_breaks", "eager", "warnings")
