"""How many series of a healthy run leave the band of healthy runs with other seeds: `foreshock compare` on the demo's model.

python benchmarks/compare_seeds.py --seeds 4 --steps 250
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import torch

import foreshock
from foreshock.demo.data import standard_library
from foreshock.demo.train import FAULTS, train
from foreshock.monitors.compare import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus, folder = standard_library(), Path(tempfile.mkdtemp())
    seeds = range(1, options.seeds + 1)
    for seed in seeds:
        torch.compiler.reset()
        with foreshock.Watch(folder / str(seed), every=5, inner="aot_eager", on_alarm="warn") as watch:

            def on_step(step: int, loss: float, watch: foreshock.Watch = watch) -> None:
                watch.log(loss=loss)

            sound = FAULTS["none"]
            train(watch.backend, steps=options.steps, seed=seed, fault=sound, at=0, corpus=corpus, on_step=on_step)
    runs = {seed: foreshock.open_run(folder / str(seed)) for seed in seeds}
    for count in (1, options.seeds - 1):
        for seed in seeds:
            for others in itertools.combinations([other for other in seeds if other != seed], count):
                found = compare(runs[seed], [runs[other] for other in others])
                told = f"{len(found.departures)} of {found.series} series outside"
                print(f"seed {seed} beside {', '.join(map(str, others))}: {told}")


if __name__ == "__main__":
    main()
