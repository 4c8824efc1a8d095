"""What a scan shows: heads with the worst first, routers, and what could not be read or is not finite."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from foreshock.scanning import Scan, SiteScan

STANDING = ("norm", "stable_rank", "effective_rank", "entropy")
CHANGE = STANDING[:3]  # the entropy is the logarithm of the effective rank, and in the JSON
ROUTER = ("similarity", "conditioning", "effective_rank", "row_norm_min", "row_norm_mean", "row_norm_max")


@dataclass(frozen=True, slots=True)
class Shown:
    """A table: its title, its columns, its rows with the worst first, and how many rows there are in all."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    of: int


def shown(scan: Scan, most: int | None = None) -> Iterator[Shown]:
    """The tables of ``scan``, of ``most`` heads at most each."""
    if len(scan.checkpoints) == 1:
        yield _heads(scan, most)
    for after in range(1, len(scan.checkpoints)):
        yield _changes(scan, after, most)
    if any("router/similarity" in scanned.standing[0] for scanned in scan.sites):
        yield _routers(scan)
    if any(one.other_keys for one in scan.checkpoints):
        yield _other_keys(scan)


def told(scan: Scan) -> Iterator[str]:
    """What is to be said beside the tables, a line each."""
    for one in scan.checkpoints:
        for name, count in one.not_finite.items():
            yield f"{one.path}: {name} holds {count} entries that are not finite"
    for site, reason in scan.left_out.items():
        yield f"left out: {site}: {reason}"
    for one in scan.checkpoints:
        yield f"{one.path}: {one.read_keys} tensors read, {one.read_bytes:,} bytes"


def _heads(scan: Scan, most: int | None) -> Shown:
    """By how few directions carry a head's logits."""
    found = []
    for scanned in _attentions(scan):
        values = [scanned.standing[0][f"attention/qk_{name}"] for name in STANDING]
        for head, row in enumerate(np.stack(values, 1)):
            found.append((_first(row[1]), scanned.site.id, head, row))
    found.sort(key=lambda entry: entry[:3])
    rows = [[site, str(head), *map(_number, row)] for _, site, head, row in found[:most]]
    columns = ("site", "head", *(name.replace("_", " ") for name in STANDING))
    return Shown("Wq Wk^T of each head, the lowest stable rank first", columns, rows, len(found))


def _changes(scan: Scan, after: int, most: int | None) -> Shown:
    """By how much of a head's ``Wq Wk^T`` it is."""
    found = []
    for scanned in _attentions(scan):
        change = scanned.changes[after - 1]
        if "attention/delta2_norm" not in change:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            share = change["attention/delta2_norm"] / scanned.standing[after - 1]["attention/qk_norm"]
        values = [change[f"attention/{of}_{name}"] for of in ("delta2", "delta3") for name in CHANGE]
        for head, row in enumerate(np.stack([share, *values], 1)):
            found.append((_first(-row[0]), scanned.site.id, head, row))
    found.sort(key=lambda entry: entry[:3])
    rows = [[site, str(head), *map(_number, row)] for _, site, head, row in found[:most]]
    names = (f"{of} {name.replace('_', ' ')}" for of in ("delta2", "delta3") for name in CHANGE)
    before, now = (scan.checkpoints[place].path for place in (after - 1, after))
    title = f"{before} to {now}: what moved of Wq Wk^T, the largest share first"
    return Shown(title, ("site", "head", "|delta2| / |Wq Wk^T|", *names), rows, len(found))


def _routers(scan: Scan) -> Shown:
    rows = []
    for scanned in scan.sites:
        if "router/similarity" in scanned.standing[0]:
            values = [[float(state[f"router/{name}"][0]) for state in scanned.standing] for name in ROUTER]
            rows.append((_first(-values[0][-1]), [scanned.site.id, *(" to ".join(map(_number, v)) for v in values)]))
    rows.sort(key=lambda entry: (entry[0], entry[1][0]))
    columns = ("site", *(name.replace("_", " ") for name in ROUTER))
    return Shown("Routers, the most similar experts first", columns, [row for _, row in rows], len(rows))


def _other_keys(scan: Scan) -> Shown:
    """Layers that differ in their number alone are one row."""
    rows = []
    for one in scan.checkpoints:
        alike = Counter(map(_numberless, one.other_keys, one.other_keys.values()))
        rows += [[one.path, name, key, str(count)] for (name, key), count in alike.items()]
    columns = ("checkpoint", "parameter", "key that was read", "how many")
    return Shown("Read under other names than the model's", columns, rows, len(rows))


def _numberless(name: str, key: str) -> tuple[str, str]:
    if re.findall(r"\d+", name) != re.findall(r"\d+", key):
        return name, key
    return re.sub(r"\d+", "*", name), re.sub(r"\d+", "*", key)


def _attentions(scan: Scan) -> Sequence[SiteScan]:
    return [scanned for scanned in scan.sites if "attention/qk_norm" in scanned.standing[0]]


def _first(value: float) -> float:
    """Sorts what is not a number in front."""
    return -np.inf if np.isnan(value) else float(value)


def _number(value: float) -> str:
    return f"{value:.4g}"
