"""The mechanisms that foreshock can name: what each looks like, what it says and what to do. One table, read from the top.

A *symptom* is a metric and the side on which it left (``router/entropy_norm-``). A row takes the symptoms that it leads with,
at one site or over the run, and explains them together with their consequences; what an earlier row explained, a later one does
not see. Only a kernel can break a law, so a broken law explains every drift beside it, and no learning rate does.

Sources: [A] the algebra, docs/laws.md; [P] arXiv 2606.28116; [F] arXiv 2510.04212; [W] arXiv 2309.14322; [Z] arXiv 2303.06296;
[S] arXiv 2202.08906; [B] arXiv 2408.15664; [X] arXiv 2410.11720; [M] measured, docs/log.md.
"""

from __future__ import annotations

from foreshock.monitors.detectors.drift import HINT
from foreshock.monitors.diagnosis import Context, Evidence, Row, symptom
from foreshock.monitors.laws import UNIT_ROUNDOFF

LR_RISEN = 1.5  # a learning rate half above the highest that the run was healthy with is no schedule's doing
TOGETHER = 50  # steps: five samples; onsets of noisy series are not known more closely
SPREAD = 0.5  # share of the attention sites that must move together before a cause common to all is named
ROUNDABLE = 0.5  # of the output: a one-sided rounding to a single mantissa bit is off by less
ASIDE = 0.4  # of the unit roundoff: one-sided rounding of the last bit is off by 0.72 of it, to nearest by 0.03
EXACT = 0.25  # of the bias in the gradients: a forward that is off by less is not where the bias comes from

LAW_BIAS = ("law/bias+", "law/bias-", "law/bias_site+", "law/bias_site-")
LAW = ("law/key_shift+", "law/value_mass+", "law/euler+")
SHADOW = ("law/shadow+", "law/hull+")
KERNEL_LAWS = (*LAW, *SHADOW, "law/router_shift+", "law/token_count+")
QK = ("attention/delta2_norm+", "attention/delta2_effective_rank@50-")
GROWTH = ("attention/logit_max+", "attention/delta2_norm+")
RATIO = "optim/update_ratio+"
ATTENTION = (*QK, RATIO, "attention/logit_max+", "attention/entropy_norm-", "attention/entropy_norm+")
ROUTER = (
    "router/entropy_norm-",
    "router/similarity+",
    "router/conditioning+",
    "router/conditioning-",
    "router/logit_absmax+",
)
UNEVEN = ("router/load+", "router/effective_experts-")
LOAD = (*UNEVEN, "router/dead_experts+")
JUMPS = ("attention/dwq_norm+", "attention/dwk_norm+", "router/row_norm_max+")
STOPS = ("attention/dwq_norm-", "attention/dwk_norm-")
GRADIENT = ("attention/grad_out_norm+", "optim/grad_norm+")
LATE = (*GRADIENT, "run/loss+")
DRIFTS = (*ATTENTION, *ROUTER, *LOAD, *LATE)


def _over(evidence: Evidence, context: Context) -> bool:
    """Every law that broke here did so at one sample alone, and the next one was clean; no kernel was blamed here before."""
    laws = [f for f in evidence if symptom(f) in KERNEL_LAWS and f.score >= 1]
    once = all(context.age(f).samples == 1 and context.age(f).quiet >= 1 for f in laws)
    once = once and all((f.metric, f.site) in context.readings for f in laws)  # read again, and clean
    return once and not any(f.site in context.blamed for f in laws)


def _off(evidence: Evidence, context: Context) -> bool:
    """The forward pass is off too: beyond its floor, or to one side by more than rounding to nearest ever is."""
    unit = UNIT_ROUNDOFF.get(context.dtype(evidence), 0.0)
    aside = abs(context.typical("attention/shadow_bias", evidence)) > ASIDE * unit > 0
    return aside or any(symptom(finding) in SHADOW for finding in evidence)


def _rounded(evidence: Evidence, context: Context) -> bool:
    """The forward is off, by no more than a rounding can make it."""
    return _off(evidence, context) and context.largest("law/shadow", evidence) < ROUNDABLE


def _not_exact(evidence: Evidence, context: Context) -> bool:
    """Nothing says that the forward is free of the bias that the gradients show."""
    forward, backward = (context.typical(name, evidence) for name in ("attention/shadow_bias", "law/bias_site"))
    return not abs(forward) < EXACT * abs(backward)  # also where one of them was not read


def _inner_product_alone(evidence: Evidence, context: Context) -> bool:
    """Rows of P and of dS sum to what they should, yet q and k are not those that the gradients are of, and the output shows it."""
    broken = {symptom(finding) for finding in evidence}
    others = broken & {"law/key_shift+", "law/value_mass+", *LAW_BIAS}
    return "law/euler+" in broken and _off(evidence, context) and not others


def _legal_elsewhere(evidence: Evidence, context: Context) -> bool:
    """Most heads return an average of values, the gradients are its own, and it is not the average asked for."""
    shadows = [f for f in evidence if symptom(f) == "law/shadow+"]
    return any(f.extent > 0.5 for f in shadows) and not any(symptom(f) == "law/hull+" for f in evidence)


def _lr_risen(evidence: Evidence, context: Context) -> bool:
    """The learning rate is half again above the highest that the run was healthy with, and something moved after it."""
    since = context.lr_since
    followed = since is not None and any(f.onset_interval[1] >= since for f in evidence if f.score >= HINT)
    return context.lr_rise >= LR_RISEN and followed


def _lr_reached_attention(evidence: Evidence, context: Context) -> bool:
    """The learning rate is half again above the highest that the run was healthy with, and attention moved after it."""
    return _lr_risen(evidence, context) and any(symptom(f) in (*QK, "attention/logit_max+") for f in evidence)


def _widespread(evidence: Evidence, context: Context) -> bool:
    """It moved at half of the attention sites or more, and weights change by a larger share of themselves."""
    moved = [finding for finding in evidence if finding.metric == "attention/delta2_norm"]
    return context.share(moved, "attention") >= SPREAD and any(symptom(finding) == RATIO for finding in evidence)


def _logits_grow(evidence: Evidence, context: Context) -> bool:
    """Weights or logits grow while a step changes the weights by no larger share of themselves."""
    return not any(symptom(finding) == RATIO for finding in evidence)


def _lr_not_risen(evidence: Evidence, context: Context) -> bool:
    """No learning rate is above the highest that the run was healthy with."""
    return context.lr_rise < LR_RISEN


def _load_first(evidence: Evidence, context: Context) -> bool:
    """The load left before the router's own shape did, or with it; a hint of it is enough."""
    load = [f.onset for f in evidence if symptom(f) in UNEVEN]
    others = [f.onset for f in evidence if symptom(f) in ROUTER]
    return bool(load) and min(load) <= min(others, default=min(load)) + TOGETHER


def _loss_alone(evidence: Evidence, context: Context) -> bool:
    """Nothing is out but the loss and the gradient."""
    return all(symptom(f) in LATE for f in evidence if f.score >= 1)


def _gradient_alone(evidence: Evidence, context: Context) -> bool:
    """Nothing is out but the gradient, at half of the attention sites or more."""
    out = [f for f in evidence if f.score >= 1]
    return all(symptom(f) in GRADIENT for f in out) and context.share(out, "attention") >= SPREAD


# fmt: off
TABLE: tuple[Row, ...] = (
    Row("learning rate too large", (*QK, "attention/logit_max+", *ROUTER, *LATE), DRIFTS, "run", "warning", "[W]",
        "the learning rate rose beyond what the run was healthy with, and the mechanisms followed",
        "Undo the rise; go back to a checkpoint from before the onset if the loss has moved.", _lr_reached_attention,
        independent=True, least=HINT),
    Row("non-finite values", ("nonfinite",), LATE, "site", "critical", "[A]",
        "NaN or infinity appeared",
        "Go back to a checkpoint from before the onset and repeat: if it stays finite, suspect the hardware, else the inputs."),
    Row("silent data corruption", KERNEL_LAWS, (*LAW_BIAS, *DRIFTS), "site", "critical", "[A], [X]",
        "a law of the kernel broke at one sample and holds again: no kernel does that, a fault of the hardware does",
        "Note the machine; test its accelerator and memory. Go back to a checkpoint from before the onset if the loss has moved.",
        _over),
    Row("altered queries or keys in the kernel", ("law/euler+", *SHADOW), DRIFTS, "site", "critical", "[A]",
        "the kernel's logits are of other queries or keys than its gradients, as when keys are quantised inside",
        "Compare the kernel's logits with q @ k.T here; switch off quantised keys or caches, or pass their gradient through.",
        _inner_product_alone, when="confirmed", reach="run"),
    Row("low-precision attention kernel", LAW_BIAS, (*LAW, *SHADOW, *DRIFTS), "site", "critical", "[F], [A]",
        "the attention kernel rounds its output or probabilities to one side, so its backward pushes every key the same way",
        "Change the kernel, or compute D = rowsum(dO * O) from an unrounded O. Learning rate and data are not the cause.",
        _not_exact, when="confirmed", reach="run"),
    Row("low-precision attention kernel", LAW, (*SHADOW, *DRIFTS), "site", "critical", "[F], [A]",
        "what the attention kernel returns is already off in the forward pass, and its gradients break an identity",
        "Compare the kernel with a reference (math SDPA) here: it rounds or drops part of its probabilities or its output.",
        _rounded, when="confirmed", reach="run"),
    Row("wrong softmax scale or mask", SHADOW, DRIFTS, "site", "critical", "[A]",
        "the kernel returns a proper attention with proper gradients, only not that of its scale and mask",
        "Compare the kernel's scale, mask, window and positions with a reference (math SDPA) on this site's shapes.",
        _legal_elsewhere, when="confirmed", reach="run", unless=LAW),
    Row("wrong attention forward", SHADOW, (*LAW, *DRIFTS), "site", "critical", "[A]",
        "the attention kernel's output is not the attention of its inputs",
        "Compare the kernel's scale, mask, head mapping and sequence ends with a reference (math SDPA) on this site's shapes.",
        when="confirmed", reach="run"),
    Row("wrong attention backward", (*LAW, *LAW_BIAS), DRIFTS, "site", "critical", "[A], [F]",
        "the attention gradients break an identity that every correct kernel obeys, while its output is right",
        "Compare the kernel's backward with a reference (math SDPA) here. Learning rate and data are not the cause.",
        when="confirmed", reach="run"),
    Row("wrong router backward", ("law/router_shift+",), DRIFTS, "site", "critical", "[A]",
        "the routing logits' gradient does not sum to zero over the experts, as that of every softmax does",
        "Compare the router kernel's backward with a plain softmax and top-k. Learning rate and data are not the cause.",
        when="confirmed", reach="run"),
    Row("wrong expert choice", ("law/token_count+",), DRIFTS, "site", "critical", "[A]",
        "tokens do not get their k different experts",
        "Compare the chosen indices with those of torch.topk on the same scores: some are out of range or come twice.",
        when="confirmed", reach="run"),
    Row("corrupted weight", JUMPS, DRIFTS, "site", "critical", "[M]",
        "a single entry of a head's weights, or an expert's, jumped while all others went on as before",
        "Compare the weight and its optimizer state with the last checkpoint before the onset; load it again, test the memory.",
        _lr_not_risen),
    Row("weights that no longer move", STOPS, DRIFTS, "site", "warning", "[M]",
        "weights that were trained stand still to the last bit while the optimizer steps",
        "Look for requires_grad, for parameters that the optimizer lost, for weights overwritten after the step, and for updates "
        "below the weight's precision."),
    Row("learning rate too large", ("attention/delta2_norm+",), DRIFTS, "run", "warning", "[P], [W]",
        "query and key updates grow in most layers at once, against the weights too, while every kernel law holds",
        "Look at the learning rate of the query and key weights and at gradient clipping.", _widespread),
    Row("router learning rate too large", ROUTER, (*ROUTER, *LOAD, *LATE, *JUMPS), "site", "warning", "[P], [S]",
        "a learning rate rose and the router followed while attention is quiet",
        "Undo the rise for the router's weights, or add a router z-loss.", _lr_risen, independent=True, least=HINT),
    Row("load-balance fault", (*UNEVEN, *ROUTER), (*ROUTER, *LOAD, *LATE), "site", "warning", "[B]",
        "the experts' load became uneven before the router's own shape changed",
        "Check the sign and size of the balancing loss or of the selection-bias update.", _load_first),
    Row("router collapse", ROUTER, (*ROUTER, *LOAD, *LATE), "site", "warning", "[P]",
        "the router narrows although its balancing is not what moved first",
        "Lower the router's learning rate or add a router z-loss; check what else trains the router weight.",
        when="lasting"),
    Row("attention-logit growth", GROWTH, (*ATTENTION, *LATE), "site", "warning", "[W], [Z]",
        "the query and key weights or their logits grow, by updates of the usual relative size, while every kernel law holds",
        "Use QK-norm, logit clipping, or weight decay on the query and key weights, or lower their learning rate.",
        _logits_grow),
    Row("dead experts", ("router/dead_experts+",), (*LOAD, *LATE), "site", "warning", "[B]",
        "experts get almost no tokens",
        "Raise the balancing loss, or reset the dead experts' router rows."),
    Row("gradient scale changed", ("attention/grad_out_norm+",), GRADIENT, "run", "warning", "[M]",
        "gradients grew manyfold everywhere at once while loss, weights and mechanisms go on as before",
        "Check the loss scale and where it is divided out, the division by accumulation steps, and whether clipping hides it.",
        _gradient_alone, when="lasting"),
    Row("data fault", ("run/loss+",), LATE, "run", "warning", "[M]",
        "the loss moved while attention, routers and kernel laws are quiet",
        "Look at the batches since the onset: a corrupted shard, repeated or shuffled text, a changed tokenizer.",
        _loss_alone, when="lasting"),
)
UNKNOWN = Row("unknown", (), (), "site", "warning", "",
    "the series left what is expected of it, and no known signature fits",
    "Look at the series and at what changed in the run at the onset.", when="lasting")
# fmt: on

KERNEL = frozenset(row.mechanism for row in TABLE if row.leads[0].startswith("law/"))
