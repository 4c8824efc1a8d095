"""One rank of a job in which a rank comes to grief at step `DYING`, for tests/test_dying.py: ``python dying.py OUT SCENARIO``.

From that step on each rank trains for itself, so that nothing but the watch waits for other ranks. As tests/merged.py writes: what
each knew, and how long its steps took.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from merged import RANK, STEPS, average, batches, write
from merged_models import Attention, Stack
from torch import distributed

from foreshock import Watch

DYING = 5  # by then the ranks have met, and have told each other of two steps at least
TIMEOUT = 8.0  # seconds after which a rank that does not answer is given up


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ValueError("out of memory, say")


# Which rank it is, and what comes over it: rank 0 writes for all.
FATES: dict[str, tuple[int, Callable[[], None]]] = {
    "killed": (1, kill),
    "writer killed": (0, kill),
    "stopped": (1, stop),
    "failing": (0, fail),
}


def main(out: Path, name: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model, (rank, fate) = Stack(Attention()), FATES[name]
    watch = Watch(out / "run", every=1, inner="aot_eager", windows=(2,), merge_timeout=TIMEOUT)
    took, began = [], 0.0
    try:
        with watch:
            run = torch.compile(model, backend=watch.backend)
            optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-2), batches()
            for step in range(STEPS):
                began = time.monotonic()
                if rank == RANK and step == DYING:
                    fate()
                loss = run(next(batch)).square().mean()
                watch.log(loss=loss)
                loss.backward()
                if step < DYING:
                    average(model)
                optimizer.step()
                optimizer.zero_grad()
                took.append(time.monotonic() - began)
            began = time.monotonic()
    except ValueError:
        pass
    took.append(time.monotonic() - began)  # to close the watch
    write(out, name, watch, took=took)
    os._exit(0)  # no barrier, no teardown: a rank is gone


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
