"""What judging one sampled step costs, by the number of readings.

`python benchmarks/judging.py`: readings of a model whose sites grow in number, most of them judged; the median of the last steps of
60, when every test has its history. The slope is that of the logarithms.
"""

from __future__ import annotations

import time

import numpy as np

from foreshock.monitors import Judge
from foreshock.records import Reading, Site

LAWS = ("key_shift", "value_mass", "euler", "hull", "shadow", "key_gain", "bias_num", "bias_den")
JUDGED = ("logit_max", "entropy_norm", "delta2_norm", "delta2_effective_rank@50", "nonfinite", "grad_nonfinite", "lse")
SHOWN = ("sink", "q_rms", "k_rms", "v_rms", "out_rms")
METRICS = (*(f"law/{name}" for name in LAWS), *(f"attention/{name}" for name in (*JUDGED, *SHOWN)))
LEVEL = {"attention/nonfinite": 0.0, "attention/grad_nonfinite": 0.0, "attention/logit_max": 8.0, "law/bias_den": 1.0}
HEADS, SAMPLES, TIMED = 8, 60, 9


def milliseconds(count: int) -> float:
    """The median of the last updates of a judge that gets ``count`` readings of 8 heads each."""
    rng, judge = np.random.default_rng(0), Judge()
    ids = [f"a{number}" for number in range(count // len(METRICS))]
    sites = {
        name: Site(name, name, "attention", "benchmark", heads=HEADS, kv_heads=HEADS, dtype="bfloat16") for name in ids
    }
    taken = []
    for n in range(SAMPLES):
        noise = 1 + 0.02 * rng.standard_normal((len(METRICS), len(ids), HEADS))
        readings = [
            Reading(metric, name, LEVEL.get(metric, 0.5 if "law" not in metric else 0.001) * noise[m, i])
            for m, metric in enumerate(METRICS)
            for i, name in enumerate(ids)
        ]
        start = time.process_time()
        judge.update(10 * n, readings, sites)
        taken.append(time.process_time() - start)
    return 1e3 * float(np.median(taken[-TIMED:]))


def main() -> None:
    counts = (100, 1_000, 10_000, 100_000)
    found = [milliseconds(count) for count in counts]
    print("| readings | values | judging a step, ms | per reading, us |\n|---|---|---|---|")
    for count, cost in zip(counts, found, strict=True):
        print(f"| {count:,} | {count * HEADS:,} | {cost:.1f} | {1e3 * cost / count:.1f} |")
    slopes = np.diff(np.log10(found)) / np.diff(np.log10(counts))
    print("slope from each to the next: " + ", ".join(f"{slope:.2f}" for slope in slopes))


if __name__ == "__main__":
    main()
