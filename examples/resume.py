"""Stop a watched run and go on with it, by `torch.save` or by `torch.distributed.checkpoint`. Seconds on a CPU, no network.

python examples/resume.py runs/resumed             # torch.save
python examples/resume.py runs/resumed --dcp

Trains for 30 steps with a checkpoint after 20, then starts again from that checkpoint, as after a crash: the last ten steps
are recorded a second time, and the run ends with one record of each. docs/resume.md says what is saved and what is not.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import foreshock
from foreshock.planner import LoadPlanner


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y(x).unflatten(-1, (4, 8)).transpose(1, 2) for y in (self.q, self.k, self.v))
        return x + self.o(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, watch: foreshock.Watch) -> None:
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "watch": watch.state_dict()},
        folder / "checkpoint.pt",
    )


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, watch: foreshock.Watch) -> None:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    watch.load_state_dict(state["watch"])


def save_dcp(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, watch: foreshock.Watch) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "watch": watch}, checkpoint_id=folder / "checkpoint")


def load_dcp(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, watch: foreshock.Watch) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    # By itself and with partial loading: a rank that was not there when the checkpoint was saved has no state in it.
    dcp.load({"watch": watch}, checkpoint_id=folder / "checkpoint", planner=LoadPlanner())


def train(folder: Path, steps: int, use_dcp: bool = False, resume: bool = False) -> foreshock.Watch:
    """Train up to step ``steps``, with a checkpoint after 20; returns the closed watch."""
    torch._dynamo.reset()  # as in a new process
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with foreshock.Watch(folder / "run", every=2, inner="eager") as watch:
        compiled = torch.compile(model, backend=watch.backend)
        if resume:
            (load_dcp if use_dcp else load)(folder, model, optimizer, watch)
        for step in range(watch.step, steps):
            x = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(step))
            loss = compiled(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.log(loss=loss)
            if watch.step == 20 and not resume:
                (save_dcp if use_dcp else save)(folder, model, optimizer, watch)
    return watch


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dcp", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    for resumed in (False, True):
        watch = train(options.folder, 30, options.dcp, resumed)
        steps, losses = watch.series("run/loss")
        print(f"{'resumed' if resumed else 'first'}: step {watch.step}, {len(steps)} losses, the last {losses[-1]:.6f}")
