"""Sites, alarms and ledger lines in words, for the report and the terminal."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreshock.errors import ConfigError
from foreshock.monitors.metrics import metric
from foreshock.records import Alarm, Coverage, Site, SiteStatus, WeightView

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a module path: the layer's index

_NODE = re.compile(r"\b([a-z]\w*?)_\d+:")


def where(alarm: Alarm, sites: Mapping[str, Site]) -> str:
    """The place of an alarm in words: site, and head or expert."""
    if alarm.site is None:
        return "the whole run"
    parts = [sites[alarm.site].name if alarm.site in sites else alarm.site]
    head = "key/value head" if _axis(alarm.metric) == "kv_heads" else "head"
    parts += [f"{word} {value}" for word, value in ((head, alarm.head), ("expert", alarm.expert)) if value is not None]
    return ", ".join(parts)


def _axis(name: str) -> str:
    try:
        return metric(name).axis
    except ConfigError:
        return ""  # a user's own


def shape(site: Site) -> str:
    """Heads, key/value heads and head dimension, experts and top-k, or an own kind's facts, in words."""
    if site.kind == "router":
        grouped = f" of {site.groups} groups" if site.groups is not None and site.groups > 1 else ""
        each = "each takes" if site.selection == "tokens" else "top"
        chosen = f", {each} {site.top_k}" if site.top_k is not None else ""
        return f"{site.experts} experts{grouped}{chosen}"
    if site.heads is None:
        return ", ".join(f"{fact} {value}" for fact, value in site.facts.items())
    values = f", values {site.value_dim}" if site.value_dim not in (None, site.head_dim) else ""
    return f"{site.heads} heads, {site.kv_heads} kv, dim {site.head_dim}{values}"


def details(site: Site) -> str:
    """What happens to the logits between the product and the choice or the average, in words."""
    causal = {True: "causal", False: "", None: "not known if causal" if site.kind == "attention" else ""}[site.causal]
    scale = (
        site.scale
        if site.scale is not None and site.head_dim and not math.isclose(site.scale, site.head_dim**-0.5)
        else None
    )
    words = (
        causal,
        "masked" if site.masked else "",
        f"scale {scale:.4g}" if scale is not None else "",
        f"softcap {site.softcap:g}" if site.softcap is not None else "",
        "sinks" if site.sinks else "",
        f"dropout {site.dropout:g}" if site.dropout else "",
        f"scoring {site.scoring}" if site.scoring is not None else "",
        f"by {site.selection}" if site.selection not in (None, "topk") else "",
        "biased choice" if site.biased else "",
        _among(site),
    )
    return ", ".join(filter(None, words))


def _among(site: Site) -> str:
    """Under tensor parallelism, which of the whole model's heads or experts these are."""
    parts = (
        ("heads", "head_offset", "heads_of", site.heads),
        ("experts", "experts_offset", "experts_of", site.experts),
    )
    for word, offset, whole, own in parts:
        first, of = site.facts.get(offset), site.facts.get(whole)
        if first is not None and of is not None and own is not None and own < of:
            return f"{word} {first} to {first + own - 1} of {of}"
    return ""


def weights(site: Site) -> list[str]:
    """Names of the parameters that the site's weights are read from, without repetition."""
    return list(dict.fromkeys(name for _, view in _views(site) for name in view.names))


def _views(site: Site) -> list[tuple[str, WeightView]]:
    known = [("q", site.q_weight), ("k", site.k_weight), ("", site.weight), *site.weights.items()]
    return [(role, view) for role, view in known if view is not None]


def line(status: SiteStatus) -> dict[str, Any]:
    """A line of the ledger as plain words and numbers; ``failing`` pairs a law with the reason why it does not apply."""
    site = status.site
    holding = [law for law, reason in status.laws.items() if not reason]
    return {
        "name": site.name,
        "kind": site.kind,
        "form": site.pattern,
        "shape": ", ".join(filter(None, (shape(site), details(site)))),
        "weights": ", ".join(weights(site)) or "not found",
        "evaluations": status.evaluations,
        "sampled": status.sampled,
        "holding": ", ".join(holding) or ("none" if status.laws else ""),
        "failing": [(law, reason) for law, reason in status.laws.items() if reason],
        "notes": status.notes,
    }


def beside(coverage: Coverage) -> list[tuple[str, list[str]]]:
    """What the ledger says beside its sites, by heading; a line that is there several times is told once."""
    parts = (
        ("Left out", coverage.unmatched),
        ("Graph breaks", coverage.graph_breaks),
        ("Left to eager", coverage.eager),
        ("Warnings", coverage.warnings),
    )
    return [
        (title, [_times(text, count) for text, count in Counter(map(_unnumbered, lines)).items()])
        for title, lines in parts
        if lines
    ]


def _unnumbered(text: str) -> str:
    """``text`` without the number that a graph gives its second ``softmax`` and so on."""
    return _NODE.sub(r"\1:", text)


def _times(text: str, count: int) -> str:
    return text if count == 1 else f"{text} ({count} times)"


def summary(coverage: Coverage) -> str:
    """The ledger in one line."""
    kinds = Counter(status.site.kind for status in coverage)
    found = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
    parts = [f"{found} site{_s(len(coverage))}" if found else "no site"]
    parts.append(f"{len(coverage.unmatched)} candidate{_s(len(coverage.unmatched))} left out")
    parts.append(f"{len(coverage.graph_breaks)} graph break{_s(len(coverage.graph_breaks))}")
    parts += [f"{len(coverage.eager)} left to eager"] * bool(coverage.eager)
    parts += [f"{len(coverage.warnings)} warning{_s(len(coverage.warnings))}"] * bool(coverage.warnings)
    return "; ".join(parts)


def _s(count: int) -> str:
    return "" if count == 1 else "s"


@dataclass(frozen=True, slots=True)
class Row:
    """Sites that are alike but for the number of their layer. ``footnotes`` are positions, from 1, in the table's list."""

    name: str
    model: str
    sites: int
    kind: str
    form: str
    shape: str
    details: str
    weights: str
    evaluations: int
    sampled: int
    laws: str
    footnotes: tuple[int, ...]


def table(coverage: Iterable[SiteStatus], *, every: bool = False) -> tuple[list[Row], list[str]]:
    """Rows, one for each group of like sites (``every``: for each site), and the footnotes they refer to."""
    footnotes: dict[str, int] = {}
    groups: dict[tuple[Any, ...], list[SiteStatus]] = {}
    for number, status in enumerate(coverage):
        groups.setdefault((number,) if every else _likeness(status), []).append(status)
    rows = []
    for group in groups.values():
        for alike in _by_one_number(group):
            references = [footnotes.setdefault(text, len(footnotes) + 1) for text in _remarks(alike[0])]
            rows.append(_row(alike, tuple(references)))
    return rows, list(footnotes)


def _likeness(status: SiteStatus) -> tuple[Any, ...]:
    site = status.site
    words = (site.model, site.kind, site.pattern, shape(site), details(site), tuple(_remarks(status)), _holding(status))
    return (*words, _NUMBER.sub("#", site.name), _NUMBER.sub("#", _weights(site)), status.evaluations)


def _by_one_number(group: list[SiteStatus]) -> list[list[SiteStatus]]:
    """``group`` in parts that differ in one number of their path, or in every combination of several."""
    numbers = [_NUMBER.findall(status.site.name) for status in group]
    varying = [axis for axis, values in enumerate(zip(*numbers, strict=True)) if len(set(values)) > 1]
    combinations = list(itertools.product(*(sorted({row[axis] for row in numbers}) for axis in varying)))
    if len(varying) < 2 or len(combinations) == len(group):
        return [group]
    parts: dict[str, list[SiteStatus]] = {}
    for row, status in zip(numbers, group, strict=True):
        parts.setdefault(row[varying[0]], []).append(status)
    return [alike for part in parts.values() for alike in _by_one_number(part)]


def _row(group: Sequence[SiteStatus], footnotes: tuple[int, ...]) -> Row:
    first, site = group[0], group[0].site
    numbers = zip(*(_NUMBER.findall(status.site.name) for status in group), strict=True)
    ranges = iter([_range(sorted({int(value) for value in values})) for values in numbers])
    name = _NUMBER.sub(lambda _: next(ranges), site.name)
    return Row(
        name, site.model, len(group), site.kind, site.pattern, shape(site), details(site), _weights(site), first.evaluations,
        min(status.sampled for status in group), _holding(first), footnotes,
    )  # fmt: skip


def _range(values: list[int]) -> str:
    """``3``, ``{0-31}``, ``{0,2..30}`` or ``{0,1,5}``."""
    if len(values) == 1:
        return str(values[0])
    steps = {after - before for before, after in itertools.pairwise(values)}
    if steps == {1}:
        return f"{{{values[0]}-{values[-1]}}}"
    if len(steps) == 1 and len(values) > 3:
        return f"{{{values[0]},{values[1]}..{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}"


def _weights(site: Site) -> str:
    """Roles and parameter names, as seen from the site's module."""
    named = [
        (role.removesuffix("_weight"), " * ".join(name.removeprefix(f"{site.name}.") for name in view.names))
        for role, view in _views(site)
    ]
    if len({names for _, names in named}) == 1:
        roles = ", ".join(role for role, _ in named if role)
        named = [(roles, named[0][1])]
    return "; ".join(f"{role}: {names}" if role else names for role, names in named) or "not found"


def _holding(status: SiteStatus) -> str:
    return ", ".join(law.removeprefix("law/") for law, reason in status.laws.items() if not reason)


def _remarks(status: SiteStatus) -> list[str]:
    """Why laws are not checked, one sentence a reason, and the notes."""
    reasons: dict[str, list[str]] = {}
    for law, reason in status.laws.items():
        if reason:
            reasons.setdefault(reason, []).append(law.removeprefix("law/"))
    return [f"{', '.join(laws)} not checked: {reason}" for reason, laws in reasons.items()] + [
        _unnumbered(note) for note in status.notes
    ]
