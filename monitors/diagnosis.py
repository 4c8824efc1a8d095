"""From joint signatures to a mechanism: one table, read from the top.

A *symptom* is a metric and the side on which it left (``router/entropy_norm-``). A row takes the symptoms that it leads
with, at one site or over the run, and explains them together with their consequences; what an earlier row explained, a later
one does not see. Only a kernel can break a law, so a broken law explains every drift beside it and no learning rate does.
What no row explains is called unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from foreshock.monitors.finding import Finding
from foreshock.records import Site

LR_RISEN = 1.5  # a learning rate half above its lowest since the warm-up is no decay schedule's doing
TOGETHER = 20  # steps: two samples; onsets are not known more closely
SPREAD = 0.5  # share of the attention sites that must move together before a cause common to all is named

LAW_BIAS = ("law/bias+", "law/bias-", "law/bias_site+", "law/bias_site-")
LAW = ("law/key_shift+", "law/value_mass+", "law/euler+")
SHADOW = ("law/shadow+", "law/hull+")
QK = ("attention/delta2_norm+", "attention/delta2_effective_rank@50-")
ATTENTION = (*QK, "attention/logit_max+", "attention/entropy_norm-", "attention/entropy_norm+")
ROUTER = (
    "router/entropy_norm-",
    "router/similarity+",
    "router/conditioning+",
    "router/conditioning-",
    "router/logit_absmax+",
)
LOAD = ("router/load+", "router/dead_experts+")
LATE = ("optim/grad_norm+", "run/loss+")


@dataclass(frozen=True, slots=True)
class Context:
    """What a row may ask beyond the symptoms: the sites, and how far the learning rate rose above its lowest."""

    sites: Mapping[str, Site]
    lr_rise: float

    def share(self, findings: Sequence[Finding], kind: str) -> float:
        """Share of the sites of a kind among which the findings are."""
        of_kind = {site.id for site in self.sites.values() if site.kind == kind}
        return len({finding.site for finding in findings} & of_kind) / max(len(of_kind), 1)


Condition = Callable[[Sequence[Finding], Context], bool]


@dataclass(frozen=True, slots=True)
class Row:
    """``leads`` (any one) makes the row's case if ``condition`` agrees; ``explains`` are taken along as its consequences."""

    mechanism: str
    leads: tuple[str, ...]
    explains: tuple[str, ...]
    scope: str  # "site" | "run": where leads are gathered, and what an alarm stands for
    severity: str
    says: str
    advice: str
    condition: Condition = lambda findings, context: True
    patient: bool = False  # only once the symptom has lasted: something better may explain it meanwhile


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A mechanism with the findings that make its case, the leading one first."""

    row: Row
    site: str | None
    findings: tuple[Finding, ...]


def symptom(finding: Finding) -> str:
    """The metric and the side it left on; every non-finite value is one symptom."""
    if finding.metric.endswith("nonfinite") or not np.isfinite(finding.value):
        return "nonfinite"
    return finding.metric + ("+" if finding.direction > 0 else "-")


def _lr_risen(findings: Sequence[Finding], context: Context) -> bool:
    return context.lr_rise >= LR_RISEN


def _lr_reached_attention(findings: Sequence[Finding], context: Context) -> bool:
    return _lr_risen(findings, context) and any(symptom(f) in (*QK, "attention/logit_max+") for f in findings)


def _widespread(findings: Sequence[Finding], context: Context) -> bool:
    moved = [finding for finding in findings if finding.metric == "attention/delta2_norm"]
    return context.share(moved, "attention") >= SPREAD


def _load_first(findings: Sequence[Finding], context: Context) -> bool:
    """The load left before the router's own shape did, or with it; a hint of it is enough."""
    load = [f.onset for f in findings if symptom(f) in LOAD]
    others = [f.onset for f in findings if symptom(f) in ROUTER]
    return bool(load) and min(load) <= min(others, default=min(load)) + TOGETHER


def _forward_is_off(findings: Sequence[Finding], context: Context) -> bool:
    return any(symptom(finding) in SHADOW for finding in findings)


# fmt: off
TABLE: tuple[Row, ...] = (
    Row("non-finite values", ("nonfinite",), LATE, "site", "critical",
        "NaN or infinity appeared",
        "Go back to a checkpoint from before the onset and repeat: if it stays finite, suspect the hardware, else the inputs."),
    Row("low-precision attention kernel", LAW_BIAS, (*LAW, *SHADOW, *ATTENTION, *LATE), "site", "critical",
        "the attention kernel rounds its output or probabilities to one side, so its backward pushes every key the same way",
        "Change the kernel, or compute D = rowsum(dO * O) from an unrounded O. Learning rate and data are not the cause."),
    Row("low-precision attention kernel", LAW, (*SHADOW, *ATTENTION, *LATE), "site", "critical",
        "what the attention kernel returns is already off in the forward pass, and its gradients break an identity",
        "Compare the kernel with a reference (math SDPA) here: it rounds or drops part of its probabilities or its output.",
        _forward_is_off),
    Row("wrong attention forward", SHADOW, (*ATTENTION, *LATE), "site", "critical",
        "the attention kernel's output is not the attention of its inputs, while its gradients are consistent with each other",
        "Compare the kernel's scale, mask, head mapping and sequence ends with a reference (math SDPA) on this site's shapes."),
    Row("wrong attention backward", LAW, (*ATTENTION, *LATE), "site", "critical",
        "the attention gradients break an identity that every correct kernel obeys",
        "Compare the kernel's backward with a reference (math SDPA) here. Learning rate and data are not the cause."),
    Row("wrong router backward", ("law/router_shift+",), (*ROUTER, *LOAD, *LATE), "site", "critical",
        "the routing logits' gradient does not sum to zero over the experts, as that of every softmax does",
        "Compare the router kernel's backward with a plain softmax and top-k. Learning rate and data are not the cause."),
    Row("wrong expert choice", ("law/token_count+",), (*ROUTER, *LOAD, *LATE), "site", "critical",
        "tokens do not get their k different experts",
        "Compare the chosen indices with those of torch.topk on the same scores: some are out of range or come twice."),
    Row("learning rate too large", (*QK, "attention/logit_max+", *ROUTER, *LATE), (*ATTENTION, *ROUTER, *LOAD, *LATE),
         "run", "warning",
        "the learning rate rose and the mechanisms followed",
        "Undo the rise; go back to a checkpoint from before the onset if the loss has moved.", _lr_reached_attention),
    Row("learning rate too large", ("attention/delta2_norm+",), (*ATTENTION, *ROUTER, *LOAD, *LATE), "run", "warning",
        "query and key updates grow in most layers at once while every kernel law holds",
        "Look at the learning rate of the query and key weights and at gradient clipping.", _widespread),
    Row("router learning rate too large", ROUTER, (*ROUTER, *LOAD, *LATE), "site", "warning",
        "a learning rate rose and the router followed while attention is quiet",
        "Undo the rise for the router's weights, or add a router z-loss.", _lr_risen),
    Row("load-balance fault", (*LOAD, *ROUTER), (*ROUTER, *LOAD, *LATE), "site", "warning",
        "the experts' load became uneven before the router's own shape changed",
        "Check the sign and size of the balancing loss or of the selection-bias update.", _load_first),
    Row("router collapse", ROUTER, (*ROUTER, *LOAD, *LATE), "site", "warning",
        "the router narrows although its balancing is not what moved first",
        "Lower the router's learning rate or add a router z-loss; check what else trains the router weight."),
    Row("attention-logit growth", ("attention/logit_max+",), (*ATTENTION, *LATE), "site", "warning",
        "the attention logits grow while every kernel law holds",
        "Use QK-norm, logit clipping, or weight decay on the query and key weights, or lower their learning rate."),
    Row("dead experts", ("router/dead_experts+",), (*LOAD, *LATE), "site", "warning",
        "experts get almost no tokens",
        "Raise the balancing loss, or reset the dead experts' router rows."),
    Row("data fault", ("run/loss+",), LATE, "run", "warning",
        "the loss moved while attention, routers and kernel laws are quiet",
        "Look at the batches since the onset: a corrupted shard, repeated or shuffled text, a changed tokenizer.",
        lambda findings, context: {f.metric for f in findings} <= {"run/loss", "optim/grad_norm"}, patient=True),
)
UNKNOWN = Row("unknown", (), (), "site", "warning",
    "the series left what is expected of it, and no known signature fits",
    "Look at the series and at what changed in the run at the onset.", patient=True)
# fmt: on


def diagnose(findings: Sequence[Finding], context: Context, table: Sequence[Row] = TABLE) -> list[Diagnosis]:
    """Every mechanism that the findings make a case for; each finding leads in at most one, and hints lead in none."""
    left = sorted(findings, key=lambda f: (f.onset, f.step, f.metric, f.site or ""))
    made: list[Diagnosis] = []
    for row in table:
        places = dict.fromkeys(f.site for f in left if symptom(f) in row.leads) if row.scope == "site" else (None,)
        for place in places:
            here = [f for f in left if row.scope == "run" or f.site in (place, None)]
            leads = [
                f for f in here if symptom(f) in row.leads and f.score >= 1 and (row.scope == "run" or f.site == place)
            ]
            if not leads or not row.condition(here, context):
                continue
            lead = max(leads, key=lambda f: min(f.score, 1e9))
            others = [f for f in here if f is not lead and symptom(f) in (*row.leads, *row.explains)]
            made.append(Diagnosis(row, place, (lead, *others)))
        taken = {id(f) for diagnosis in made if diagnosis.row is row for f in diagnosis.findings}
        kernel = any(diagnosis.row is row for diagnosis in made) and row.mechanism in KERNEL
        consequences = (*ATTENTION, *ROUTER, *LOAD, *LATE) if kernel else ()
        left = [f for f in left if id(f) not in taken and symptom(f) not in consequences]
    known = {diagnosis.site for diagnosis in made}
    strangers = [] if None in known else [f for f in left if f.site not in known and f.score >= 1]
    places = dict.fromkeys(f.site for f in strangers)
    return made + [Diagnosis(UNKNOWN, place, tuple(f for f in strangers if f.site == place)) for place in places]


KERNEL = (
    "low-precision attention kernel",
    "wrong attention forward",
    "wrong attention backward",
    "wrong router backward",
    "wrong expert choice",
)
