"""One self-contained HTML page about a run: is it healthy, since when not, where, what to do, and how well it was watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from foreshock.errors import RunError
from foreshock.monitors.ledger import beside, line, summary, where
from foreshock.monitors.mechanisms import TABLE, UNKNOWN
from foreshock.monitors.report_page import PAGE, STYLE
from foreshock.monitors.report_panels import families, heatmaps, loss
from foreshock.records import Alarm, Site

if TYPE_CHECKING:
    from foreshock.reader import Run

EARLY = 100  # recorded steps below which a quiet run is called early
SHOWN = 12  # alarms before the rest is folded away
ADVICE = {row.mechanism: row.advice for row in (*TABLE, UNKNOWN)}


def write_report(run: Run, path: str | Path) -> Path:
    """Write the report of ``run`` to ``path`` and return it. Raises RunError if the run or the file cannot be used."""
    alarms, sites = run.alarms, {site.id: site for site in run.sites}
    meta, coverage = run.meta, run.coverage
    cost = meta.pop("cost", {})
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE)
    text = page.render(
        name=run.name,
        path=run.path,
        style=Markup(STYLE),
        plotly=Markup(get_plotlyjs()),
        verdict=_verdict(run, alarms, sites),
        tiles=_tiles(run, alarms, sites),
        alarms=[_card(alarm, sites) for alarm in alarms],
        shown=SHOWN,
        loss=loss(run, alarms),
        heatmaps=list(heatmaps(run, sites)),
        families=list(families(run, sites, alarms)),
        statuses=[line(status) for status in coverage],
        coverage_lines=[("In short", [summary(coverage)]), *beside(coverage)],
        tables=[(title, _rows(part)) for title, part in (("Measured cost", cost), ("Settings", meta)) if part],
    )
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip(), encoding="utf-8")
    except OSError as error:
        raise RunError(f"writing the report {path}: {error.strerror}; pass another file with -o") from error
    return path


def _verdict(run: Run, alarms: Sequence[Alarm], sites: Mapping[str, Site]) -> dict[str, Any]:
    steps = run.steps
    if alarms:
        first = min(alarms, key=lambda alarm: (alarm.onset, alarm.step))
        critical = any(alarm.severity == "critical" for alarm in alarms)
        count = f"{len(alarms)} alarm{'s' if len(alarms) > 1 else ''}"
        lines = [
            f"The first: {first.mechanism} at {where(first, sites)}, heard at step {first.step}.",
            ADVICE.get(first.mechanism, ""),
        ]
        return {
            "level": "critical" if critical else "warning",
            "title": f"Not healthy since about step {first.onset}: {count}",
            "lines": [line for line in lines if line],
        }
    if not len(steps) or not sites:
        what = "no step was recorded" if not len(steps) else "no site was found"
        return {"level": "warning", "title": f"Nothing to judge: {what}", "lines": ["The coverage below says why."]}
    span = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
    lines = [f"No alarm at {len(sites)} watched site{'s' * (len(sites) > 1)}. Nothing to do."]
    if len(steps) < EARLY:
        lines.append(
            f"Only {len(steps)} steps were recorded: laws are judged from the first, drift once its baseline is learned."
        )
    return {"level": "good", "title": f"Healthy in steps {span}", "lines": lines}


def _card(alarm: Alarm, sites: Mapping[str, Site]) -> dict[str, Any]:
    """An alarm with its place; evidence and advice only where its message does not hold them already."""
    advice = ADVICE.get(alarm.mechanism, "")
    return {
        "alarm": alarm,
        "where": where(alarm, sites),
        "evidence": [text for text in alarm.evidence if text not in alarm.message],
        "advice": "" if advice in alarm.message else advice,
    }


def _tiles(run: Run, alarms: Sequence[Alarm], sites: Mapping[str, Site]) -> list[tuple[str, str]]:
    steps = run.steps
    kinds = [site.kind for site in sites.values()]
    return [
        ("last step", str(steps[-1]) if len(steps) else "none"),
        ("recorded steps", str(len(steps))),
        ("attention sites", str(kinds.count("attention"))),
        ("routers", str(kinds.count("router"))),
        *((f"{kind} sites", str(kinds.count(kind))) for kind in sorted({*kinds} - {"attention", "router"})),
        ("metrics", str(len(run.metrics()))),
        ("alarms", str(len(alarms))),
    ]


def _rows(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as flat rows ``a.b``, numbers short."""
    if isinstance(values, Mapping):
        return [row for key, value in values.items() for row in _rows(value, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, f"{values:.4g}" if isinstance(values, float) else str(values))]
