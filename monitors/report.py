"""One self-contained HTML page about a run: is it healthy, since when not, where, what to do, and how well it was watched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreshock.errors import RunError
from foreshock.monitors.ledger import beside, summary, table, where
from foreshock.monitors.policy import LAW_GROSS, LAWS
from foreshock.monitors.report_data import BIAS, JUDGED, anchor, groups, panel, payload
from foreshock.monitors.report_limits import bands
from foreshock.monitors.report_page import page
from foreshock.monitors.verdict import SURE, dates, in_order, ranks, row_of, safe, verdict
from foreshock.records import Alarm, Site

if TYPE_CHECKING:
    from foreshock.reader import Run

SECTIONS = ("verdict", "alarms", "loss", "laws", "judged", "everything", "coverage", "cost")
SHOWN = 12  # alarms before the rest is folded away
LAW_PANELS = (*LAWS, *BIAS, "law/token_count")
TRAINING = ("run/loss", "optim/lr")
OWN_PLACE = {*LAW_PANELS, *TRAINING, *JUDGED}  # what has a figure further up than its family's


def write_report(run: Run, path: str | Path) -> Path:
    """Write the report of ``run`` to ``path`` and return it. Raises RunError if the run or the file cannot be used."""
    text = render(run)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"writing the report {path}: {error.strerror}; pass another file with -o") from error
    return path


def render(run: Run, version: str = "") -> str:
    """The page as text. ``version``: it is served live, and asks its server for a newer one than this."""
    sites = {site.id: site for site in run.sites}
    alarms, meta, coverage, steps = in_order(run.alarms), run.meta, run.coverage, run.steps
    data = payload(run, sites, alarms, bands(run))
    drawn = {metric["name"] for metric in data["metrics"]}
    last = int(steps[-1]) if len(steps) else 0
    cost = meta.pop("cost", {})
    rows, footnotes = table(coverage)
    laws = [panel(name) for name in LAW_PANELS if name in drawn]
    judged = [panel(name) for name in JUDGED if name in drawn]
    tables = [("cost", "Measured cost", _rows(cost)), ("settings", "Settings", _rows(meta))]
    facts = {
        "alarms": [
            _card(number, alarm, sites, told["site"], drawn, last)
            for number, (alarm, told) in enumerate(zip(alarms, data["alarms"], strict=True), 1)
        ],
        "loss": [panel(name) for name in TRAINING if name in drawn],
        "laws": laws,
        "judged": judged,
        "groups": list(groups(sorted(drawn - OWN_PLACE))),
        "tables": [entry for entry in tables if entry[2]],
    }
    there = {**facts, "verdict": True, "everything": facts["groups"], "coverage": True, "cost": cost}
    return page(
        data,
        version,
        **facts,
        name=run.name,
        path=run.path,
        made=installed("foreshock"),
        verdict=verdict(alarms, sites, steps),
        facts=_facts(run, sites, len(steps)),
        sections=[name for name in SECTIONS if there[name]],
        shown=SHOWN,
        law_rows=_law_rows(data),
        rows=rows,
        footnotes=footnotes,
        summary=summary(coverage),
        beside=beside(coverage),
    )


def _card(number: int, alarm: Alarm, sites: Mapping[str, Site], at: int, drawn: set[str], last: int) -> dict[str, Any]:
    """What the page says of one alarm. Its message holds evidence and advice too, which have places of their own here."""
    row = row_of(alarm)
    advice = " ".join(filter(None, (row.advice if row else "", safe(alarm))))
    return {
        "alarm": alarm,
        "id": f"alarm-{number}",
        "level": "critical" if alarm.severity == "critical" else "warning",
        "where": where(alarm, sites) + ranks(alarm),
        "what": f"{row.says[:1].upper()}{row.says[1:]}." if row and row.says in alarm.message else alarm.message,
        "since": dates(alarm, last),
        "advice": advice,
        "sure": SURE.get(alarm.confidence, "Not said."),
        "site": at,
        "evidence": [_evidence(text, drawn) for text in alarm.evidence or (_numbers(alarm),)],
        "panel": panel(alarm.metric, at) if alarm.metric in drawn else None,
    }


def _numbers(alarm: Alarm) -> str:
    return f"{alarm.metric} is {alarm.value:.3g}, expected {alarm.expected}"


def _evidence(text: str, drawn: set[str]) -> dict[str, str]:
    """A line of evidence begins with its metric, if it is of one."""
    metric, _, rest = text.partition(" ")
    if metric in drawn:
        return {"metric": metric, "anchor": anchor(metric), "text": f" {rest}"}
    return {"metric": "", "anchor": "", "text": text}


def _law_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each law with a floor at the site where it stands worst."""
    rows = []
    for number, metric in enumerate(data["metrics"]):
        found = [series for series in data["series"] if series["m"] == number and "beyond" in series]
        if not found:
            continue
        worst = max(found, key=lambda series: series["beyond"]["worst"])
        told = worst["beyond"]
        part = f", {metric['heads']} {told['head']}" if worst["width"] > 1 else ""
        count, share = sum(series["beyond"]["count"] for series in found), told["worst"]
        rows.append(
            {
                "law": metric["name"],
                "anchor": metric["anchor"],
                "share": share,
                "worst": f"{share:.2g} {'times' if share > 1 else 'of'} its floor",
                "where": data["sites"][worst["s"]] + part,
                "step": told["step"],
                "count": count,
                "samples": sum(series["n"] for series in found),
                "last": max(series["beyond"]["last"] for series in found),
                "level": "good" if not count else "critical" if share > LAW_GROSS else "warning",
                "stands": "holds" if not count else "broken" if share > LAW_GROSS else "above its floor",
            }
        )
    return sorted(rows, key=lambda row: -row["share"])


def _facts(run: Run, sites: Mapping[str, Site], steps: int) -> str:
    names = {"attention": "attention site", "router": "router"}
    counts = Counter(site.kind for site in sites.values())
    counted = [f"{count} {names.get(kind, f'{kind} site')}{'s' * (count > 1)}" for kind, count in counts.items()]
    recorded = f"{steps} step{'s' * (steps != 1)} recorded"
    metrics = len(run.metrics())
    return " · ".join([recorded, *counted, f"{metrics} metric{'s' * (metrics != 1)}"])


def _rows(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as flat rows ``a.b``, numbers short."""
    if isinstance(values, Mapping):
        return [row for key, value in values.items() for row in _rows(value, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, f"{values:.4g}" if isinstance(values, float) else str(values))]
