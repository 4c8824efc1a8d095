"""A process that writes a run step by step, as a training job does, until it is told to stop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from foreshock.records import Alarm, Coverage, Reading, Site, SiteStatus
from foreshock.store import RunStore

FAULT = 40  # the step at which a law breaks and an alarm is raised
NAME = "[bold]layers[/].0.attention"  # what a terminal might take for markup


def write(store: RunStore, step: int) -> None:
    """One step: the loss, two heads of one law, and once an alarm."""
    euler = np.array([1e-3, 0.4 if step >= FAULT else 1e-3])
    store.write(step, [Reading("run/loss", None, np.array([3.0])), Reading("law/euler", "a", euler)])
    if step == FAULT:
        evidence = ("law/euler is 0.4",)
        words = ("at most 0.06", "critical", "wrong attention backward", evidence, "the kernel is wrong")
        store.alarm(Alarm(FAULT, FAULT, "a", "law/euler", 0.4, *words, head=1, confidence="proved"))
    site = Site("a", NAME, "attention", "sdpa", heads=2, kv_heads=2, dtype="bfloat16")
    store.coverage(Coverage((SiteStatus(site, step + 1, step + 1, {"law/euler": ""}),)))
    store.flush()


def main(folder: str) -> None:
    """Write a step for each line of the input, and say so."""
    store = RunStore(folder)
    for step, _ in enumerate(sys.stdin):
        write(store, step)
        print(step, flush=True)
    store.close()


class Writer:
    """``to(step)`` returns once the process has written the steps up to it."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, __file__, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.step = -1

    def to(self, step: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        while self.step < step:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            self.step = int(self.process.stdout.readline())

    def end(self) -> None:
        """Let it close the run."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(30) == 0


@contextmanager
def writer(folder: Path) -> Iterator[Writer]:
    found = Writer(folder)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


if __name__ == "__main__":
    main(sys.argv[1])
