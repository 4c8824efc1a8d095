"""Write docs/metrics.md, docs/mechanisms.md and the table of families in README.md from the code's own tables: ``make docs``.

A test holds them against these, so that none says what the code does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from foreshock.config import SECOND_TIER
from foreshock.monitors.diagnosis import Row
from foreshock.monitors.mechanisms import TABLE, UNKNOWN
from foreshock.monitors.metrics import AXES, COSTS, MERGES, METRICS, SOURCES, Metric, family

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- from the registry, by `make docs` -->", "<!-- end of what `make docs` writes -->"
FAMILIES = tuple(dict.fromkeys(family(metric.name) for metric in METRICS))
TITLES = {"laws": "**laws** ([docs/laws.md](docs/laws.md))", "spectra": "spectra of W_q W_k^T"}
BASELINES = {"laws": "no", **dict.fromkeys(SECOND_TIER, "recorded, not judged")}  # of any other family its own past
WHERE = {
    "free": "other readings, settings",
    "cheap": "forward pass",
    "gradients": "backward pass",
    "rows": "sampled rows",
    "weights": "parameters",
}
TOGETHER = (("q", "k", "v", "out"), ("delta2", "delta3", "dwq", "dwk"), ("min", "max", "mean"), ("p1", "p10"))

INTRODUCTION = """\
# Metrics

Everything that foreshock records, as `foreshock metrics` prints it. `make docs` writes this page from the registry,
`foreshock.monitors.METRICS`; [monitors of your own](monitors.md) may add to it. A name with a suffix, `attention/delta2_norm@50`,
is the same metric over a longer window. Of which series alarms come, says `monitors/policy.py`.

"""
ABSENT = """\
## Not available

A metric that does not apply at a site is not recorded there: no rows where causality, mask or scale are not known, no margin
where all experts are taken or experts choose tokens, no selection bias where none was found, no law that the ledger excludes.
Where it applies and has no value at some step, the value is NaN:

- means and maxima over sampled rows, at a head of which no sampled row sees a key; `entropy_norm`, where none sees two; standard
  errors, where a microbatch has a single row. At a step whose sampled rows are all padding nothing is recorded of them;
- what follows from a sum that NaN or infinity entered: of that head alone, or of the router. `nonfinite` counts such entries and is
  always a number; rows whose logits are no numbers are left out of entropy, sink and lse; the load needs only the choice;
- what follows from the load, at a step at which no token was assigned; `entropy_norm` of a single expert; the margin, where no
  token had another expert to choose;
- residuals of laws whose denominator is a sum of squares below 1e-30: no gradient, or one that has underflowed;
- ranks and entropies of a zero matrix, directions of a zero row, similarity of a single expert.

Squares are added up in float32: an rms or a norm of entries beyond 1.8e19 is infinite (finite gradients count as 1e15 at most),
one of entries below 1e-23 is 0.
"""

MECHANISMS = """\
# Mechanisms: what an alarm may say

`make docs` writes this page from the table by which alarms are named, `monitors/mechanisms.py`. It is read from the top: a row that
makes its case takes its symptoms along, and what follows from them, so that one cause is one alarm. What to do about each,
and how to check it first: [my alarm says X: what now](what_now.md).

A symptom is a metric and the side on which it left: `router/entropy_norm-` fell. One of those under *seen by* must be out. An alarm
says how sure it is: **proved** where an identity is broken or a value is not finite, **likely** where two different symptoms agree,
**possible** where one speaks alone.

*Raised*: at once; *confirmed*, in two samples or at most heads of the site together, for a fault of the hardware comes once and in
one place; or once it has *lasted* for more than five samples, for something better may explain it meanwhile.

Sources: [A] the algebra, [laws.md](laws.md); [P] arXiv 2606.28116; [F] arXiv 2510.04212; [W] arXiv 2309.14322; [Z] arXiv
2303.06296; [S] arXiv 2202.08906; [B] arXiv 2408.15664; [X] arXiv 2410.11720; [M] measured, [log.md](log.md).

"""
WHEN = {"now": "at once", "confirmed": "confirmed", "lasting": "after it has lasted"}


def mechanisms_page() -> str:
    """The text of docs/mechanisms.md."""
    return MECHANISMS + "\n".join(_mechanism(row) for row in (*TABLE, UNKNOWN))


def _mechanism(row: Row) -> str:
    condition = (row.condition.__doc__ or "").strip()
    lines = [
        f"## {row.mechanism[0].upper()}{row.mechanism[1:]}\n",
        f"{row.says[0].upper()}{row.says[1:]}. **What to do:** {row.advice}\n",
        f"- seen by: {', '.join(f'`{name}`' for name in row.leads) or 'any series that no other row explains'}",
        *([f"- and: {' '.join(condition.split())}"] if condition else []),
        *([f"- unless: {', '.join(f'`{name}`' for name in row.unless)}"] if row.unless else []),
        f"- raised: {WHEN[row.when]}; {row.severity}; for {'each site' if row.scope == 'site' else 'the run'}",
        *([f"- source: {row.source}"] if row.source else []),
    ]
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """The text of docs/metrics.md."""
    sections = [INTRODUCTION + _legend()]
    for name in FAMILIES:
        entries = [metric for metric in METRICS if family(metric.name) == name]
        rows = [(f"`{m.name}`", m.formula, m.unit, m.axis, m.merge, m.cost, m.source, m.meaning) for m in entries]
        heads = ("metric", "formula", "unit", "over", "merges", "cost", "source", "what a move of it means")
        sections.append(f"## {name[0].upper()}{name[1:]}\n\n{_table(heads, rows)}")
    return "\n".join([*sections, ABSENT])


def readme_table() -> str:
    """What stands between the markers in README.md."""
    rows = []
    for name in FAMILIES:
        title, baseline = TITLES.get(name, name), BASELINES.get(name, "its own past")
        for cost in COSTS:
            entries = [m for m in METRICS if family(m.name) == name and m.cost == cost]
            if entries:
                rows.append((title, WHERE[cost], ", ".join(f"`{short}`" for short in _short(entries)), baseline))
                title = ""
    return _table(("family", "read from", "metrics", "needs a baseline"), rows)


def with_table(readme: str) -> str:
    """``readme`` with the table between its markers as it should be."""
    before, _, rest = readme.partition(f"{BEGIN}\n")
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"writing README.md: the markers {BEGIN} and {END} are not there")
    return f"{before}{BEGIN}\n{readme_table()}{END}{after}"


def _legend() -> str:
    parts = []
    for title, words in (("Over", AXES), ("Merges", MERGES), ("Cost", COSTS), ("Sources", SOURCES)):
        parts.append(f"**{title}.** " + "; ".join(f"`{word}`: {said}" for word, said in words.items()) + ".\n")
    return "\n".join(parts)


def _short(entries: Sequence[Metric]) -> list[str]:
    """Names without their kind, in the order of the registry; those that differ in one word alone become one."""
    prefix = "" if family(entries[0].name) == "laws" else entries[0].name.partition("/")[0] + "/"
    names = [entry.name.removeprefix(prefix) for entry in entries]
    for words in TOGETHER:
        for name in list(names):
            parts = name.split("_")
            if words[0] not in parts or name not in names:
                continue
            at = parts.index(words[0])
            alike = ["_".join([*parts[:at], word, *parts[at + 1 :]]) for word in words]
            if all(one in names for one in alike):
                names[names.index(name)] = "_".join([*parts[:at], "{" + ",".join(words) + "}", *parts[at + 1 :]])
                names = [one for one in names if one not in alike]
    return names


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    # A `<` before a letter begins a tag, and what is no tag is dropped.
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in line) + " |\n" for line in lines
    )


def main() -> None:
    (ROOT / "docs/metrics.md").write_text(metrics_page(), encoding="utf-8")
    (ROOT / "docs/mechanisms.md").write_text(mechanisms_page(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
