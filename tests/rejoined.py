"""Merged ranks that are killed and go on, for tests/test_rejoin.py: ``python rejoined.py OUT PLAN``; the plan is JSON.

One process trains alone to the end, and then forks the ranks of every other job: of a training which is never killed, of one
that saves at some steps and is killed at a later one, and of one for each state that it left, which resumes in a copy of its
folder: to the end, or until it is killed right behind a save of its own, from which others go on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from merged import BATCH, LENGTH, Attention, D, Experts, Flash, Stack
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import foreshock
from foreshock.demo import kernel
from foreshock.monitors import Finding
from foreshock.planner import LoadPlanner

STEPS, BROKEN = 24, 7


class Counts:
    """A detector with a state: of the steps that it hears of, each fourth is found, or each second of few, every time elsewhere."""

    def __init__(self, every: int) -> None:
        self.heard, self.period = 0, 2 if every > 2 else 4

    def update(self, step: int, readings: Any, sites: Any) -> list[Finding]:
        self.heard += 1
        if self.heard % self.period:
            return []
        site = sorted(sites)[self.heard // self.period % len(sites)]
        value = next(float(r.values[0]) for r in readings if r.metric == "attention/q_rms")
        return [Finding(step, step, site, f"{sites[site].kind}/nonfinite", value, "none", +1, 10.0, 0)]

    def state_dict(self) -> dict[str, int]:
        return {"heard": self.heard}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.heard = state["heard"]


def train(
    folder: Path,
    rank: int,
    ranks: int,
    every: int,
    *,
    flash: bool = False,
    load: str = "",
    saves: tuple[int, ...] = (),
    killed: int = 0,
) -> None:
    """One rank of a training on its share of the batch. ``load``: the state that it goes on from, and how."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    kernel.set_fault(kernel.HEALTHY)
    model = Stack(Flash(), Flash()) if flash else Stack(Attention(), Experts(), Attention())
    # With momentum it has a state: of one without, distributed checkpoints make a step at a rate of 0.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 if flash else 0.1, momentum=0.9)

    def save(name: str) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "watch": watch.state_dict()}
        torch.save(state, folder / f"{name}.{rank}.pt")

    def on_alarm(alarm: foreshock.Alarm) -> None:
        if saves and alarm.metric.startswith("law/"):
            save("alarm")

    options = {"every": every, "inner": "eager", "windows": (4, 12), "detectors": [Counts(every)], "strict": True}
    with foreshock.Watch(folder / "run", **options, on_alarm=on_alarm) as watch:
        run = torch.compile(model, backend=watch.backend)
        begin = resume(folder, rank, ranks, load, {"model": model, "optimizer": optimizer}, watch) if load else 0
        if ranks == 1 and load:
            watch.flush()
            with foreshock.open_run(folder / "run") as stored:
                steps = {
                    f"{m}|{s}": stored.series(m, s)[0].tolist() for m in stored.metrics() for s in stored.sites_of(m)
                }
            (folder / "loaded.json").write_text(json.dumps(steps))
        data = torch.Generator().manual_seed(1)
        for step in range(STEPS):
            x = torch.randn(BATCH, LENGTH, D, generator=data, dtype=torch.float64).chunk(ranks)[rank]
            if step < begin:
                continue
            if flash and step == max(BROKEN, begin) and rank == ranks - 1:
                kernel.set_fault(kernel.Fault(diagonal=1, layer=1, layers=2))
            loss = run(x).square().mean()
            loss.backward()
            for parameter in model.parameters() if ranks > 1 else ():
                distributed.all_reduce(parameter.grad)
                parameter.grad /= ranks
            optimizer.step()
            optimizer.zero_grad()
            watch.log(loss=loss, step=float(step))
            if step + 1 in saves:
                save(str(step + 1))
                parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                dcp.save({**parts, "watch": watch}, checkpoint_id=folder / f"{step + 1}")
            if step + 1 == killed:
                distributed.barrier()
                os.kill(os.getpid(), signal.SIGKILL)
    told = {"alarms": [alarm.to_json() for alarm in watch.alarms], "warnings": watch.coverage.warnings, "begin": begin}
    (folder / f"told{rank}.json").write_text(json.dumps(told))


def resume(folder: Path, rank: int, ranks: int, load: str, parts: dict[str, Any], watch: foreshock.Watch) -> int:
    """``8``: every rank from the file of its number, if there is one, and one alone from all; ``8 first``: from that of rank 0;
    ``8 dcp``: from the distributed checkpoint."""
    step, _, how = load.partition(" ")
    if how == "dcp":
        state = dict(zip(("model", "optimizer"), get_state_dict(*parts.values()), strict=True))
        dcp.load(state, checkpoint_id=folder / step)
        set_state_dict(*parts.values(), model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        dcp.load({"watch": watch}, checkpoint_id=folder / step, planner=LoadPlanner())
        return watch.step
    files = [torch.load(file, weights_only=True) for file in sorted(folder.glob(f"{step}.*.pt"))]
    first = files[rank if how != "first" and rank < len(files) else 0]
    for name, part in parts.items():
        part.load_state_dict(first[name])
    whole = {key: entry for file in files for key, entry in file["watch"].items()}
    watch.load_state_dict(whole if ranks == 1 and how != "first" else first["watch"])
    return watch.step


def forked(folder: Path, ranks: int, **options: Any) -> None:
    """The same in processes of their own, until they end or are killed."""
    meeting, children, killed = folder / "meeting", [], "killed" in options
    meeting.unlink(missing_ok=True)
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                if ranks > 1:
                    distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=ranks)
                train(folder, rank, ranks, **options)
                if ranks > 1:
                    distributed.barrier()
            except BaseException:
                if not killed:
                    import traceback

                    traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    if killed != any(ends):
        raise RuntimeError(f"the training in {folder} ended with {ends}")


def named(jobs: Sequence[Any]) -> str:
    """The folder of ``[ranks, load, ranks, load, ...]``."""
    return ", ".join(f"{load} on {ranks}" for ranks, load in zip(jobs[::2], jobs[1::2], strict=True))


def main(out: Path, plan: dict[str, Any]) -> None:
    """``every``, ``flash``, ``saves``, ``killed``, and ``resumed``: ``[ranks, load]`` of each job that goes on, with those of the
    jobs that go on behind it."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    for every, of in plan.items():
        options = {"every": int(every), "flash": of["flash"]}
        for name in ("one", "two", "killed"):
            (out / every / name).mkdir(parents=True)
        if not of["flash"] or every == next(iter(plan)):  # what is compiled here makes every fork quicker
            train(out / every / "one", 0, 1, **options)
        forked(out / every / "two", 2, **options)
        forked(out / every / "killed", 2, **options, saves=tuple(of["saves"]), killed=of["killed"])
        for jobs in of["resumed"]:
            folder = out / every / named(jobs)
            shutil.copytree(out / every / "killed", folder)
            for ranks, load, *behind in (jobs[at:] for at in range(0, len(jobs), 2)):
                last = int(behind[1].split()[0]) if behind else 0
                ends: dict[str, Any] = {"saves": (last,), "killed": last} if behind else {}
                forked(folder, ranks, **options, load=load, **ends)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
