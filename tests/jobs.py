"""Small jobs of several ranks for the tests, and how what they wrote is compared (see tests/merged.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.monitors.laws import floor
from foreshock.monitors.metrics import metric

Values = np.ndarray[Any, Any]
Arrays = dict[str, Values]
KEPT = 2.0**-22  # series are kept in float32
RATIO = "optim/update_ratio"
# What rounding leaves of identities: other in each product of another shape. Of ranks the worst is told, see `same_as_parts`.
RESIDUALS = ("law/key_shift", "law/value_mass", "law/euler", "law/router_shift")
# Of the rounding of the attention's output: as deterministic as its operands, which tensor parallelism computes otherwise.
BIASES = ("law/bias_num", "law/bias", "law/bias_t", "law/bias_site", "law/bias_site_t")
IN_PARTS = ("tp", "swap", "sequence")
# Counts, and what is made of them; and whatever is a maximum.
COUNTED = (
    *(f"router/{name}" for name in ("load", "load_max_ratio", "max_violation", "load_cv", "load_entropy")),
    *(f"router/{name}" for name in ("dead_experts", "effective_experts", "margin_p1", "margin_p10", "nonfinite")),
    *(f"attention/{name}" for name in ("nonfinite", "near_overflow", "grad_nonfinite", "grad_delta_sign")),
    *("router/grad_nonfinite", "law/token_count", "law/bias_samples", "optim/lr"),
)


class Job:
    """A job of some ranks, run once by torchrun."""

    def __init__(self, out: Path, ranks: int, *names: str, script: str = "merged.py") -> None:
        self.out = out
        out.mkdir(exist_ok=True)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*torchrun, str(Path(__file__).with_name(script)), str(out), *names]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        self.said = done.stderr

    def series(self, name: str, rank: int = 0) -> Arrays:
        with np.load(self.out / f"{name}.{rank}.npz") as found:
            return dict(found)

    def told(self, name: str, rank: int = 0) -> dict[str, Any]:
        return told(self.out, name, rank)


def told(out: Path, name: str, rank: int) -> dict[str, Any]:
    """What a rank wrote of itself."""
    found: dict[str, Any] = json.loads((out / f"{name}.{rank}.json").read_text())
    return found


def same(one: Arrays, other: Arrays, name: str = "") -> None:
    """Every series at the same steps, with the same numbers: counts and maxima exactly, all else to 1e-6 of the step's largest.

    Both were computed in float64, and measured in float32. Rows are drawn anew in each call, so that what is estimated from them is
    the same only where each rank has all of the batch, for some of the heads (`IN_PARTS`).
    """
    assert set(one) == set(other)
    in_parts = name in IN_PARTS
    for key, values in one.items():
        series, _, what = key.rpartition("|")
        found, of = series.partition("|")[0], other[key]
        if what == "steps":
            assert np.array_equal(values, of), key
        assert values.shape == of.shape, key
        rule = metric("run/loss" if found.startswith("run/") else found)  # as which all numbers of the user are merged
        if what == "steps" or (rule.cost == "rows" and not in_parts):
            continue
        if found in RESIDUALS:
            assert (np.fmax(values, of) < floor(found.removeprefix("law/"), "float32")).all(), key
        elif found in BIASES and in_parts:
            continue
        elif found in BIASES:  # sums that cancel: held against the largest of all steps
            near(values.reshape(1, -1), of.reshape(1, -1), 1e-6, key)
        elif found in COUNTED or rule.merge == "max":
            assert np.array_equal(values, of, equal_nan=True), key
        else:  # the ratio of a site is of all its heads; of parts it is their mean, exactly so in `same_as_parts`
            near(values, of, 5e-2 if found == RATIO and in_parts else 1e-6, key)


def near(one: Values, other: Values, relative: float, key: str) -> None:
    """``[steps, parts]``, or of a single part ``[steps]``, to a share of the largest part at each step."""
    one, other = (x.reshape(len(x), -1) for x in (one, other))
    assert np.array_equal(np.isnan(one), np.isnan(other)), key
    size = np.nan_to_num(np.abs(one)).max(-1, keepdims=True)
    assert (np.nan_to_num(np.abs(one - other)) <= relative * size).all(), (key, np.nanmax(np.abs(one - other) / size))


def check(alone: Job, job: Job, name: str, ranks: int, as_in: str = "", but: tuple[str, ...] = ()) -> None:
    """Whether all ranks tell the series that one process tells, of the scenario ``as_in`` where it is another."""
    left_out = ("trained|", *but, *(f"attention/{metric}" for metric in but))
    whole = {key: values for key, values in alone.series(as_in or name).items() if not key.startswith(left_out)}
    assert whole
    for rank in range(ranks):
        mine = {key: values for key, values in job.series(name, rank).items() if not key.startswith(left_out)}
        same(whole, mine, name)
        assert job.told(name, rank)["warnings"] == job.told(name, rank)["alarms"] == []
        assert job.told(name, rank)["sites"].keys() == job.told(name)["sites"].keys()


def same_as_parts(job: Job, name: str, ranks: int) -> None:
    """Whether the merged series are what the same training's ranks, watched each for itself, make by the rule of each quantity.

    Maxima and what stands side by side exactly, all else to the float32 in which series are kept. A ratio of sums lies
    between those of the ranks.
    """
    merged, parts = job.series(name), [job.series(f"{name}, apart", rank) for rank in range(ranks)]
    assert all(trains_alike(job.series(name, rank), part) for rank, part in enumerate(parts))
    for key, values in merged.items():
        if not key.endswith("|values") or key.startswith(("run/", "optim/grad_norm")):
            continue
        found, of = key.partition("|")[0], np.stack([part[key] for part in parts if key in part])
        axis = metric(found).axis
        law = found.startswith("law/") and found not in (*BIASES, "law/bias_den", "law/bias_samples")
        if name in IN_PARTS and axis in ("heads", "kv_heads"):
            near(values, np.concatenate([x.reshape(len(x), -1) for x in of], axis=-1), KEPT if law else 0, key)
        elif name in IN_PARTS:
            rule = {"sum": np.sum, "max": np.max}.get(metric(found).merge, np.mean)
            if found not in BIASES:
                near(values, rule(of, axis=0), KEPT if rule is np.mean else 0, key)
        elif law and not found.endswith("_gain"):
            near(values, of.max(0), KEPT, key)
        elif metric(found).merge == "max":
            losses = ranks if found.startswith("attention/grad") else 1  # the loss is the mean of theirs
            assert np.array_equal(values, of.max(0) / losses, equal_nan=True), key
        elif found in ("law/bias_num", "law/bias_den"):
            near(values, of.sum(0) / ranks**2, KEPT, key)
        elif found.endswith("_se"):
            near(values, np.sqrt(np.square(of).mean(0) / ranks), KEPT, key)
        elif metric(found).cost == "rows" and not found.startswith("attention/shadow_"):
            near(values, of.mean(0), KEPT, key)
        elif metric(found).cost == "rows":
            assert ((of.min(0) <= values) & (values <= of.max(0))).all(), key


def trains_alike(watched: Arrays, plain: Arrays) -> bool:
    """Whether two trainings had the same losses and ended with the same parameters, bit for bit."""
    keys = [key for key in plain if key.startswith("trained|")]
    return len(keys) > 1 and all(watched[key].tobytes() == plain[key].tobytes() for key in keys)


def identical(one: Arrays, other: Arrays) -> bool:
    """Every series, bit for bit."""
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)
