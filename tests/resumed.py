"""A small training that is killed and resumed, for tests/test_resume.py: ``python resumed.py killed OUT MOMENTS SEED``.

One process trains to the end, then forks a training for each moment, kills it there, looks into its run, and forks another
that resumes it. What it saw goes to ``OUT/seen.json``.

``python resumed.py ranks OUT RANK`` is one of two ranks that train together, then one alone, then two again, each phase from the
checkpoint of one before. Which phases there were, and what each watch said, goes to ``OUT/rankN.json``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import foreshock
from foreshock.demo import kernel
from foreshock.demo.model import Config, Transformer
from foreshock.demo.rounding import Rounding
from foreshock.reader import Run
from foreshock.tables import unpack_steps

EVERY, STEPS, SAVE, BROKEN = 2, 40, 8, 19
STEP = 0.03  # seconds, about
SMALL = Config(hidden=16, length=16, experts=4, width=8)
FAULT = kernel.Fault(out=Rounding(bits=1), layer=1, layers=2)


def watched(run: Path | None, **options: Any) -> foreshock.Watch:
    return foreshock.Watch(run, **{"every": EVERY, "inner": "eager", "strict": True, "windows": (4, 12), **options})


class Training:
    """Model, optimizer and watch; ``steps`` makes some more, of two microbatches each, the kernel broken from `BROKEN` on."""

    def __init__(self, watch: foreshock.Watch, shard: int = 0) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.watch, self.shard = watch, shard
        self.model = Transformer(SMALL)
        self.compiled = torch.compile(self.model, backend=watch.backend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def micro(self, step: int, part: int) -> torch.Tensor:
        kernel.set_fault(FAULT if step >= BROKEN else kernel.HEALTHY)
        data = torch.Generator().manual_seed(1000 * self.shard + 2 * step + part)
        loss, balance = self.compiled(torch.randint(0, 256, (2, SMALL.length + 1), generator=data))
        (loss + 0.01 * balance).backward()
        return loss.detach()

    def one(self, step: int) -> None:
        losses = [self.micro(step, part) for part in range(2)]
        if torch.distributed.is_initialized():
            for parameter in self.model.parameters():
                torch.distributed.all_reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.watch.log(loss=sum(losses) / 2, tokens=64.0 * step)

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "watch": self.watch}

    def dcp_parts(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, file: Path, step: int) -> None:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({**state, "step": step}, file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)

    def load(self, file: Path) -> int:
        state = torch.load(file, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        return state["step"]


def job(folder: Path, told: int | None = None) -> None:
    """Train to the end, from the checkpoint in ``folder`` if there is one; each step that is over is told."""
    checkpoint = folder / "checkpoint.pt"
    with watched(folder / "run") as watch:
        training = Training(watch)
        start = training.load(checkpoint) if checkpoint.exists() else 0
        for step in range(start, STEPS):
            training.one(step)
            if told is not None:
                os.write(told, f"{step}\n".encode())
            if (step + 1) % SAVE == 0:
                training.save(checkpoint, step + 1)


def forked(folder: Path, moment: float | None = None) -> list[int]:
    """The steps that a training in a process of its own told of, until its end or until it is killed: ``moment`` 7.3 is 0.3 of
    a step's usual time after it told of seven."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            job(folder, write)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        if moment is None:
            steps = [int(line) for line in pipe]
        else:
            steps = [int(pipe.readline()) for _ in range(int(moment))]
            time.sleep(moment % 1 * STEP)
            os.kill(child, signal.SIGKILL)
            steps += [int(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    if moment is None and status:
        raise RuntimeError(f"the training in {folder} ended with {status}")
    return steps


def recorded(run: Path) -> list[int]:
    """The steps of the law's series, if the run got so far that there is one; it must open either way."""
    try:
        foreshock.open_run(run).close()
    except foreshock.RunError as error:
        if "there is no such folder" in str(error) or "wait for the run's first flush" in str(error):
            return []
        raise
    with foreshock.open_run(run) as opened:
        return opened.series("law/key_shift")[0].tolist() if "law/key_shift" in opened.metrics() else []


def killed(out: Path, moments: int, seed: int) -> None:
    torch.set_num_threads(1)
    job(out / "unkilled")
    draw, seen = random.Random(seed), []
    for number in range(moments):
        folder = out / f"killed{number}"
        folder.mkdir()
        told = forked(folder, STEPS * (number + draw.random()) / moments)
        found = recorded(folder / "run")
        at = (
            torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
            if (folder / "checkpoint.pt").exists()
            else 0
        )
        seen.append({"told": told, "recorded": found, "resumed": at, "again": forked(folder)})
    (out / "seen.json").write_text(json.dumps(seen))


def ranks(out: Path, rank: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    found: dict[str, Any] = {}

    def phase(
        name: str,
        among: int,
        steps: range,
        load: Callable[[Training], None] | None = None,
        save: bool = False,
        **options: Any,
    ) -> None:
        if rank >= among:
            return
        if among > 1:
            torch.distributed.init_process_group("gloo", f"file://{out}/meet_{name}", rank=rank, world_size=among)
        with watched(out / name, **{"merge": False, **options}) as watch:
            training = Training(watch, rank)
            if load is not None:
                load(training)
            begun = watch.step
            for step in steps:
                training.one(step)
                if save and watch.step == 12:
                    dcp.save({**training.dcp_parts(), "watch": watch}, checkpoint_id=out / f"{name}_dcp")
                    training.save(out / f"{name}{rank}.pt", 12)
        found[name] = {"begun": begun, "ended": watch.step, "told": watch.coverage.warnings}
        if among > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def from_dcp(name: str, lenient: bool = False) -> Callable[[Training], None]:
        def load(training: Training) -> None:
            state = training.dcp_parts()
            dcp.load(state, checkpoint_id=out / f"{name}_dcp")
            set_state_dict(
                training.model, training.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            planner = dcp.DefaultLoadPlanner(allow_partial_load=lenient)
            dcp.load({"watch": training.watch}, checkpoint_id=out / f"{name}_dcp", planner=planner)

        return load

    phase("two", 2, range(STEPS // 2), save=True)
    phase("two_two", 2, range(12, STEPS // 2), from_dcp("two"))
    phase("two_one", 1, range(12, 16), from_dcp("two"))
    phase("one", 1, range(12), save=True)
    phase("one_two", 2, range(12, 16), from_dcp("one", lenient=True))
    phase("one_two_file", 2, range(12, 16), lambda training: training.load(out / "one0.pt"))
    merged: dict[str, Any] = {"merge": True, "every": 4}  # a sampled step is merged two steps later
    phase("merged", 2, range(STEPS // 2), save=True, **merged)
    phase("merged_two", 2, range(12, STEPS // 2), from_dcp("merged"), **merged)
    (out / f"rank{rank}.json").write_text(json.dumps(found))


def most_records_of_a_step(run: Run) -> int:
    """Read from the tables themselves: a reader shows one record where there are several."""
    chunks = run._rows("SELECT series, steps FROM chunk")
    found = Counter((series, step) for series, steps in chunks for step in unpack_steps([steps])[0].tolist())
    found.update(run._rows("SELECT field.series, tail.step FROM tail JOIN field ON field.layout = tail.layout"))
    return max(found.values())


if __name__ == "__main__":
    where = Path(sys.argv[2])
    if sys.argv[1] == "ranks":
        ranks(where, int(sys.argv[3]))
        sys.exit()
    (where / "unkilled").mkdir()
    killed(where, int(sys.argv[3]), int(sys.argv[4]))
