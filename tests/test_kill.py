"""A training process killed without warning leaves a run that opens and holds every step flushed so far."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from foreshock import open_run

SCRIPT = """
import sys, torch
from foreshock import Watch
from test_bitwise import Block
model = Block()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
watch = Watch(sys.argv[1], every=2, inner="eager", strict=True)
compiled = torch.compile(model, backend=watch.backend)
for step in range(10**6):
    loss = compiled(torch.randn(2, 16, 16))[0]
    watch.log(loss=loss)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        watch.flush()
        print(step, flush=True)
"""


def test_a_killed_training_leaves_its_run(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}
    ) as training:
        assert training.stdout is not None
        for line in training.stdout:
            if int(line) >= 50:
                break
        training.kill()
        flushed = int((line + training.stdout.read()).split()[-1])
    assert training.returncode < 0
    assert flushed >= 50
    with open_run(tmp_path / "run") as run:
        (site,) = run.sites
        assert site.q_weight is not None
        assert site.q_weight.names == ("q.weight",)
        sampled, values = run.series("law/key_shift", site.id)
        steps, losses = run.series("run/loss")
        assert run.meta["steps"] >= flushed
    assert sampled.tolist() == list(range(0, 2 * len(sampled), 2))
    assert sampled[-1] >= flushed - 1
    assert steps.tolist() == list(range(len(steps)))
    assert steps[-1] >= flushed - 1  # the newest number may still be on its way when a step ends
    assert np.isfinite(values).all()
    assert np.isfinite(losses).all()
