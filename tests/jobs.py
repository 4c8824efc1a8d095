"""Small jobs of several ranks for the tests, and how what they wrote is compared (see tests/merged.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]
# Rows are drawn anew in each call, so what is estimated from them is another estimate.
ESTIMATES = ("entropy", "logit_max", "lse", "sink", "shadow")


class Job:
    """A job of some ranks, run once."""

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
        found: dict[str, Any] = json.loads((self.out / f"{name}.{rank}.json").read_text())
        return found


def same(one: Arrays, other: Arrays) -> None:
    """Every series at the same steps with the same numbers: to 1e-6, of the laws (rounding) or of the largest; counts exact."""
    assert set(one) == set(other)
    for key, values in one.items():
        name, _, what = key.rpartition("|")
        metric = name.partition("|")[0]
        if what == "steps":
            assert np.array_equal(values, other[key]), key
        elif metric == "optim/update_ratio":  # of all heads of a site together; of shards it is the mean
            assert np.allclose(values, other[key], rtol=1e-2, atol=0), key
        elif metric.startswith("law/bias") or any(part in metric for part in ESTIMATES):
            assert values.shape == other[key].shape, key
        else:
            size = np.nanmax(np.abs(values), initial=0.0)
            atol = 1e-6 if metric.startswith("law/") else 1e-6 * size
            assert np.allclose(values, other[key], rtol=1e-6, atol=atol, equal_nan=True), key
            if "load" in metric or metric.endswith("nonfinite"):
                assert np.array_equal(values, other[key]), key


def check(alone: Job, job: Job, name: str, ranks: int, as_in: str = "", but: tuple[str, ...] = ()) -> None:
    """Whether all ranks tell the series that one process tells, of the scenario ``as_in`` where it is another."""
    left_out = ("parameter|", *but, *(f"attention/{metric}" for metric in but))
    whole = {key: values for key, values in alone.series(as_in or name).items() if not key.startswith(left_out)}
    for rank in range(ranks):
        mine = {key: values for key, values in job.series(name, rank).items() if not key.startswith(left_out)}
        same(whole, mine)
        assert job.told(name, rank)["warnings"] == []
        assert job.told(name, rank)["sites"].keys() == job.told(name)["sites"].keys()


def trains_alike(watched: Arrays, plain: Arrays) -> bool:
    """Whether two trainings ended with the same parameters, bit for bit."""
    keys = [key for key in watched if key.startswith("parameter|")]
    return bool(keys) and all(np.array_equal(watched[key], plain[key]) for key in keys)
