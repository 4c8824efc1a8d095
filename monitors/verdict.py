"""What a run's alarms come to: is it sick, since when, where, what is it, what is to be done, how sure. In words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foreshock.monitors.budget import STEPS_PER_FALSE_ALARM
from foreshock.monitors.diagnosis import LIKELY, POSSIBLE, PROVED, Row
from foreshock.monitors.ledger import where
from foreshock.monitors.mechanisms import TABLE, UNKNOWN
from foreshock.records import Alarm, Array, Site

EARLY = 100  # recorded steps below which a quiet run is called early
BUDGET = f"The drift tests of a whole run together raise one false alarm in {STEPS_PER_FALSE_ALARM:,} healthy steps."
SURE = {
    PROVED: "Proved: an identity of every correct kernel is broken, or a value is not finite. No learning rate breaks an identity.",
    LIKELY: f"Likely: different symptoms agree. {BUDGET}",
    POSSIBLE: f"Possible: one symptom speaks alone, so look at its curve before you act. {BUDGET}",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """``level``: "good", "unknown" (nothing to judge), "warning" or "critical". ``answers``: question and answer, in the order in
    which they are asked; ``lead``: the alarm that they are about."""

    level: str
    title: str
    answers: tuple[tuple[str, str], ...]
    lead: Alarm | None = None


def verdict(alarms: Sequence[Alarm], sites: Mapping[str, Site], steps: Array) -> Verdict:
    """Over all ``alarms`` of a run that recorded ``steps``, rising."""
    last = int(steps[-1]) if len(steps) else 0
    if alarms:
        return _sick(alarms, sites, last)
    if not len(steps) or not sites:
        what = "no step was recorded" if not len(steps) else "no site was found"
        told = "The coverage, at the end of the report, says why."
        return Verdict("unknown", f"Nothing to judge: {what}", (("What to do", told),))
    span = f"{steps[0]} to {last}" if len(steps) > 1 else str(last)
    answers = [("Alarms", f"None at {len(sites)} watched site{'s' * (len(sites) > 1)}."), ("What to do", "Nothing.")]
    if len(steps) < EARLY:
        told = f"Only {len(steps)} steps were recorded: laws are judged from the first, drift once its baseline is learned."
        answers.append(("How sure", told))
    return Verdict("good", f"Healthy in steps {span}", tuple(answers))


def _sick(alarms: Sequence[Alarm], sites: Mapping[str, Site], last: int) -> Verdict:
    lead = in_order(alarms)[0]
    row = row_of(lead)
    answers = [
        ("What", f"{_capital(lead.mechanism)}: {row.says}." if row else lead.message),
        ("Where", where(lead, sites) + ranks(lead)),
        ("Since when", dates(lead, last)),
        ("What to do", " ".join(filter(None, (row.advice if row else "", safe(lead))))),
        ("How sure", SURE.get(lead.confidence, "Not said.")),
    ]
    others = len(alarms) - 1
    if others:
        answers.append(("And", f"{others} more alarm{'s' * (others > 1)}, below in the order in which they began."))
    level = "critical" if any(alarm.severity == "critical" for alarm in alarms) else "warning"
    return Verdict(level, f"Not healthy {lead.since}", tuple(answers), lead)


def in_order(alarms: Sequence[Alarm]) -> list[Alarm]:
    """The cause first: what has a name before what has none, and then by onset, for consequences come later."""
    return sorted(alarms, key=lambda alarm: (alarm.mechanism == UNKNOWN.mechanism, alarm.onset, alarm.step))


def row_of(alarm: Alarm) -> Row | None:
    """The row of the table that the alarm was raised by; None for one of another table. Rows share names."""
    named = [row for row in (*TABLE, UNKNOWN) if row.mechanism == alarm.mechanism]
    return next((row for row in named if row.says in alarm.message), named[0] if named else None)


def dates(alarm: Alarm, last: int) -> str:
    """When it began, was heard, and where the run is now, in steps."""
    low, high = alarm.onset_interval
    between = f", between {low} and {high}" if low < high else ""
    later = alarm.step - alarm.onset
    heard = f"heard at step {alarm.step}" + (f", {later} steps later" if later > 0 else "")
    return f"About step {alarm.onset}{between}; {heard}. The run is at step {last}."


def ranks(alarm: Alarm) -> str:
    """On which ranks it is worst, as the end of a sentence."""
    return f" (rank{'s' * (len(alarm.ranks) > 1)} {', '.join(map(str, alarm.ranks))})" if alarm.ranks else ""


def safe(alarm: Alarm) -> str:
    """Which checkpoints are from before the onset."""
    first = alarm.onset_interval[0]
    return f"Checkpoints up to step {first} are from before it." if first > 0 else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
