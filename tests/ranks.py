"""One rank of a small distributed job, for tests/test_acting.py: ``python ranks.py OUT``, with torchrun's variables set.

Each scenario is a training of its own with a watch of its own; which steps each rank came to, and what it was told, goes to
``OUT/rankN.json``. Ranks keep in step as data-parallel ones do, by an exchange of gradients in every step.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional

from foreshock import AlarmRaised, Watch, _torch
from foreshock.monitors import Finding

STEPS = 14
HEARD = 5  # the first step at which rank 1 finds something
NEVER = 10**6
# name -> on_alarm, every, whether rank 0 has a site, how often rank 1 fails to reach the store after it found something
SCENARIOS = {
    "stop": ("stop", 1, True, 0),
    "stop, sampled": ("stop", 3, True, 0),
    "raise": ("raise", 1, True, 0),
    "raise, without a site": ("raise", 2, False, 0),
    "stop, without a store": ("stop", 1, True, NEVER),
    "stop, on a second attempt": ("stop", 1, True, 1),
    "stop, after all of these": ("warn, stop", 1, False, 0),
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Finds:
    """Finds something on rank 1 alone."""

    def update(self, step, readings, sites):
        if distributed.get_rank() == 0 or step < HEARD:
            return []
        return [Finding(step, step, next(iter(sites)), "attention/nonfinite", float("nan"), "none", +1, 10.0, 0)]


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def train(watch: Watch, sited: bool) -> dict[str, object]:
    torch._dynamo.reset()
    model = Layer()
    run = torch.compile(model, backend=watch.backend) if sited else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    raised = None
    try:
        for _ in range(STEPS):
            run(torch.randn(2, 5, 8)).square().mean().backward()
            for parameter in model.parameters():
                distributed.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            if watch.stop_requested:
                break
    except AlarmRaised as error:
        raised = error.alarm.site
    return {"step": watch.step, "stop": watch.stop_requested, "raised": raised, "sites": len(watch.sites)}


class Unreachable:
    """A store that has no answer for a while, once something is written."""

    def __init__(self, store, failures: int) -> None:
        self.store, self.failures = store, failures

    def compare_set(self, *args):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("nobody answers")
        return self.store.compare_set(*args)

    def __getattr__(self, name):
        return getattr(self.store, name)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, connect = distributed.get_rank(), _torch.job_store
    found = {}
    for name, (on_alarm, every, sited, failures) in SCENARIOS.items():
        torch.manual_seed(rank)
        heard = Heard()
        logging.getLogger("foreshock").addHandler(heard)
        flaky = Unreachable(connect(), failures)
        _torch.job_store = connect if rank == 0 else lambda flaky=flaky: flaky
        called: list[int] = []
        row = [on_alarm, lambda alarm, called=called: called.append(alarm.step)]
        watch = Watch(every=every, inner="eager", on_alarm=row, detectors=[Finds()], merge=False)
        found[name] = train(watch, sited or rank == 1)
        watch.close()
        found[name] |= {"called": called, "said": heard.lines, "warnings": watch.coverage.warnings}
        logging.getLogger("foreshock").removeHandler(heard)
        distributed.barrier()
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
