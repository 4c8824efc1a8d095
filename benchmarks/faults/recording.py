"""Trains one case and stores what a watch saw of it, beside what only the benchmark knows: each loss, gradient norm and rate."""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from cases import named
from injections import NOTHING
from subjects import SUBJECTS
from training import Trainer

import foreshock
from foreshock.demo import kernel
from foreshock.demo.data import Corpus, standard_library

RESULT, CHECKPOINT = "result.json", "fork.pt"
TWIN = "healthy/constant"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
FORMAT = 1  # of the results; older ones are recorded anew


@dataclass(frozen=True)
class Job:
    """One run: ``steps`` is where it ends, ``at`` where the fault starts, which is also where the healthy twin is forked."""

    subject: str
    case: str
    seed: int
    at: int
    steps: int
    every: int = 10

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.subject / self.case / f"seed{self.seed}-every{self.every}"

    @property
    def scratch(self) -> bool:
        return named(self.case).scratch and self.every == 10

    @property
    def cost(self) -> int:
        """Steps to train."""
        return self.steps if self.scratch else self.steps - self.at

    def twin(self, steps: int) -> Job:
        """The healthy run of the same seed."""
        return Job(self.subject, TWIN, self.seed, self.at, steps)


def finished(job: Job, out: Path) -> bool:
    """Whether the job was recorded to its end, by the same recipe; a longer run stands for a shorter one."""
    wanted = recipe(job)
    try:
        stored = json.loads(ADDRESS.sub("", (job.folder(out) / RESULT).read_text()))["recipe"]
        steps = int(stored["steps"])
    except (OSError, ValueError, KeyError):
        return False
    return steps >= job.steps and wanted == wanted | stored | {"steps": job.steps}


def recipe(job: Job) -> dict[str, Any]:
    """What a stored result must agree with to stand for the job, as far as it says."""
    injection = named(job.case).injection
    told = {field.name: _told(getattr(injection, field.name)) for field in fields(injection)}
    model = repr(SUBJECTS[job.subject].config)
    about = {"format": FORMAT, "model": model, "torch": torch.__version__, "text": _corpus().sha256}
    return {**asdict(job), **about, "injection": told}


def _told(value: Any) -> str:
    """A value in words that are the same in every process: a function by its name and what it closes over."""
    if isinstance(value, tuple):
        return ", ".join(map(_told, value))
    if not isinstance(value, FunctionType):
        return ADDRESS.sub("", repr(value))
    held = [_told(cell.cell_contents) for cell in value.__closure__ or ()]
    return f"{value.__qualname__}({', '.join(held)})"


def record(job: Job, out: Path, backend: str = "inductor") -> None:
    """Train the job's case and leave its folder complete; whatever stood there before goes."""
    torch.set_num_threads(1)  # one thread makes a run repeat itself bit for bit
    logging.getLogger("foreshock").setLevel(logging.ERROR + 100)
    folder = job.folder(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    corpus = _corpus()
    case = named(job.case)
    torch.compiler.reset()
    start = time.perf_counter()
    rows = []
    with foreshock.Watch(folder, every=job.every, inner=backend, strict=True) as watch:
        trainer = Trainer(SUBJECTS[job.subject], job.seed, corpus, watch.backend)
        if not job.scratch:
            saved = torch.load(_checkpoint(job, out), weights_only=False)
            trainer.load_state_dict(saved["trainer"])
            watch.load_state_dict(saved["watch"])
        injection, first = (case.injection, 0) if case.scratch else (case.injection, job.at)
        if case.name == TWIN:
            injection = NOTHING
        try:
            while trainer.step < job.steps:
                if trainer.step == job.at and case.name == TWIN and job.scratch:
                    torch.save({"trainer": trainer.state_dict(), "watch": watch.state_dict()}, folder / CHECKPOINT)
                step = trainer.advance(injection, trainer.step - first)
                watch.log(loss=step.loss)
                rows.append(step)
        finally:
            kernel.set_fault(kernel.HEALTHY)
    result = {
        "recipe": recipe(job),
        "first": job.steps - len(rows),
        "losses": torch.stack([row.loss for row in rows]).tolist(),
        "grad_norms": torch.stack([row.grad_norm for row in rows]).tolist(),
        "learning_rates": [row.learning_rate for row in rows],
        "text": {"bytes": len(corpus.tokens), "sha256": corpus.sha256},
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "cpu": platform.machine()},
        "seconds": time.perf_counter() - start,
    }
    part = folder / f"{RESULT}.part"
    part.write_text(json.dumps(result))
    part.replace(folder / RESULT)


def _checkpoint(job: Job, out: Path) -> Path:
    """Of the healthy twin, which must have been recorded."""
    return job.twin(0).folder(out) / CHECKPOINT


_read: list[Corpus] = []


def _corpus() -> Corpus:
    if not _read:
        _read.append(standard_library())
    return _read[0]
