"""Which figures a report shows of a run, in which order, with what words beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from foreshock.errors import ConfigError
from foreshock.monitors import metrics, second_tier
from foreshock.monitors import report_figures as figures
from foreshock.records import Alarm, Site

if TYPE_CHECKING:
    from foreshock.reader import Run

FAMILIES = ("laws", "attention", "spectra", "router", "optim", "run", *second_tier.KINDS.values(), "other")
SKIPPED = {"run/loss", "law/bias_num", "law/bias_den"}  # drawn by itself, and two halves of law/bias
# One heatmap for each line that the run has a metric of; the first that exists is taken.
KEY_METRICS = (
    ("law/key_shift",),
    ("law/value_mass",),
    ("law/euler",),
    ("law/shadow",),
    ("law/hull",),
    ("law/bias_t", "law/bias"),
    ("attention/nonfinite",),
    ("attention/entropy_norm", "attention/entropy"),
    ("attention/logit_max",),
    ("attention/sink",),
    ("attention/shadow_bias",),
    ("attention/delta2_norm", "attention/delta2_norm@10", "attention/delta2_norm@50"),
    ("attention/delta2_effective_rank", "attention/delta2_effective_rank@50", "attention/delta2_effective_rank@10"),
    ("law/router_shift",),
    ("router/entropy_norm", "router/entropy"),
    ("router/load_max_ratio", "router/max_violation"),
    ("router/dead_experts",),
    ("router/similarity",),
    ("router/conditioning",),
)


@dataclass(frozen=True, slots=True)
class Panel:
    """A figure with its heading and what a move of it means."""

    title: str
    meaning: str
    html: Markup


def loss(run: Run, alarms: Sequence[Alarm]) -> Markup | None:
    """The loss with the alarms, if the run logged it."""
    if "run/loss" not in run.metrics():
        return None
    return Markup(figures.html(figures.loss(*run.series("run/loss"), alarms), "loss", 320))


def _labels(run: Run, metric: str, sites: Mapping[str, Site]) -> list[tuple[str | None, str]]:
    """The metric's sites in the order of the model, with their labels."""
    names = [site.name for site in sites.values()]
    order = {site: position for position, site in enumerate(sites)}
    found = sorted(run.sites_of(metric), key=lambda site: order.get(site or "", -1 if site is None else len(order)))
    return [(site, _label(site, sites, names)) for site in found]


def _label(site: str | None, sites: Mapping[str, Site], names: Sequence[str]) -> str:
    if site is None:
        return "run"
    return sites[site].name if site in sites and names.count(sites[site].name) == 1 else site


def heatmaps(run: Run, sites: Mapping[str, Site]) -> Iterator[Panel]:
    """One panel for each of `KEY_METRICS` that the run has."""
    present = set(run.metrics())
    for number, choices in enumerate(KEY_METRICS):
        metric = next((name for name in choices if name in present), None)
        places = [place for place in _labels(run, metric, sites) if place[0] is not None] if metric else []
        if metric is None or not places:
            continue
        law = metric.startswith("law/")
        entry = _entry(metric)
        largest = law or metric.endswith(("nonfinite", "_bias")) or (entry is not None and entry.merge == "max")
        figure = figures.heatmap(run, metric, places, largest=largest, log=law and not metric.endswith("_t"))
        cell = "Largest magnitude" if largest else "Mean"
        html = figures.html(figure, f"heat-{number}", min(140 + 18 * len(places), 420))
        yield Panel(metric, f"{cell} over heads or experts. {entry.meaning if entry else ''}", Markup(html))


def families(run: Run, sites: Mapping[str, Site], alarms: Sequence[Alarm]) -> Iterator[tuple[str, list[Panel]]]:
    """Curves of every metric, by family; the number of points a curve keeps falls with the number of curves."""
    names = [name for name in run.metrics() if name not in SKIPPED]
    places = {name: _some(_labels(run, name, sites), alarms) for name in names}
    points = min(figures.POINTS, max(24, figures.BUDGET // max(2 * sum(map(len, places.values())), 1)))
    grouped: dict[str, list[Panel]] = {family: [] for family in FAMILIES}
    for number, name in enumerate(names):
        entry = _entry(name)
        left_out = len(run.sites_of(name)) - len(places[name])
        more = f" {left_out} more sites are not drawn." if left_out else ""
        unit = f" [{entry.unit}]" if entry and entry.unit else ""
        figure = figures.curves(run, name, places[name], points, alarms)
        panel = Panel(
            name + unit, (entry.meaning if entry else "") + more, Markup(figures.html(figure, f"curve-{number}", 290))
        )
        grouped.setdefault(metrics.family(name) if entry else "other", []).append(panel)
    yield from ((family, panels) for family, panels in grouped.items() if panels)


def _some(places: list[tuple[str | None, str]], alarms: Sequence[Alarm]) -> list[tuple[str | None, str]]:
    """All places, or `LINES` of them: those with alarms, and others spread evenly over the model."""
    if len(places) <= figures.LINES:
        return places
    named = {alarm.site for alarm in alarms}
    alarmed = [i for i, (site, _) in enumerate(places) if site in named][: figures.LINES // 2]
    rest = figures.LINES - len(alarmed)
    chosen = {*alarmed, *(round(i * (len(places) - 1) / (rest - 1)) for i in range(rest))}
    return [place for i, place in enumerate(places) if i in chosen]


def _entry(name: str) -> metrics.Metric | None:
    try:
        return metrics.metric(name)
    except ConfigError:
        return None
