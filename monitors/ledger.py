"""Sites, alarms and ledger lines in words, for the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foreshock.records import Alarm, Site, SiteStatus


def where(alarm: Alarm, sites: Mapping[str, Site]) -> str:
    """The place of an alarm in words: site, and head or expert."""
    if alarm.site is None:
        return "the whole run"
    parts = [sites[alarm.site].name if alarm.site in sites else alarm.site]
    parts += [
        f"{word} {value}" for word, value in (("head", alarm.head), ("expert", alarm.expert)) if value is not None
    ]
    return ", ".join(parts)


def shape(site: Site) -> str:
    """Heads, key/value heads and head dimension, or experts and top-k, in words."""
    if site.kind == "router":
        return f"{site.experts} experts, top {site.top_k}"
    return f"{site.heads} heads, {site.kv_heads} kv, dim {site.head_dim}" if site.heads is not None else ""


def weights(site: Site) -> list[str]:
    """Names of the parameters that the site's weights are read from, without repetition."""
    views = [view for view in (site.q_weight, site.k_weight, site.weight) if view is not None]
    return list(dict.fromkeys(name for view in views for name in view.names))


def line(status: SiteStatus) -> dict[str, Any]:
    """A line of the ledger as plain words and numbers; ``failing`` pairs a law with the reason why it does not apply."""
    site = status.site
    holding = [law for law, reason in status.laws.items() if not reason]
    return {
        "name": site.name,
        "kind": site.kind,
        "shape": shape(site),
        "weights": ", ".join(weights(site)) or "not found",
        "evaluations": status.evaluations,
        "sampled": status.sampled,
        "holding": ", ".join(holding) or ("none" if status.laws else ""),
        "failing": [(law, reason) for law, reason in status.laws.items() if reason],
        "notes": status.notes,
    }
