"""What an optimizer step does to one weight: pure functions of its rows, all on the weight's device, none waits for it.

Shapes: H heads (or experts), n numbers of one head. Definitions: `foreshock.monitors.second_tier`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.records import Stage

NEAR = 0.1  # how far |m| / sqrt(v) may be from one where gradients agree in sign
ADAM = (
    "exp_avg_rms",
    "exp_avg_sq_rms",
    "sign_agreement",
    "denominator_min",
    "denominator_max",
    "step",
)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Which stretch of a weight the ``heads`` of a site are: ``index`` over its output axes, a slice where they lie in a row."""

    stage: Stage
    heads: int
    index: Tensor | slice

    @classmethod
    def of(cls, stage: Stage, device: torch.device, *, each_channel: bool = False) -> Rows:
        """``each_channel``: every channel by itself, as the experts of a router's weight are."""
        flat = stage.index.reshape(-1)
        heads, first, last = stage.index.size if each_channel else len(stage.index), int(flat[0]), int(flat[-1])
        if np.array_equal(flat, np.arange(first, last + 1)):
            return cls(stage, heads, slice(first, last + 1))
        return cls(stage, heads, torch.as_tensor(flat, device=device))

    def __call__(self, weight: Tensor) -> Tensor:
        """``[H, n]``, a view where the layout allows it."""
        stage = self.stage
        if stage.inputs is not None:
            return stage.matrix(weight).transpose(1, 2).reshape(self.heads, -1)
        inputs = [axis for axis in range(weight.dim()) if axis not in stage.axes]
        ordered = weight.permute(*stage.axes, *inputs).reshape(*(weight.shape[axis] for axis in stage.axes), -1)
        rows = ordered.flatten(0, -2)
        rows = rows[self.index] if isinstance(self.index, slice) else rows.index_select(0, self.index)
        return rows.reshape(self.heads, -1)


def norm(x_Hn: Tensor) -> Tensor:
    """``[H]``, in float32."""
    found: Tensor = torch.linalg.vector_norm(x_Hn, dim=-1, dtype=torch.promote_types(x_Hn.dtype, torch.float32))
    return found


def change(now_Hn: Tensor, before_Hn: Tensor) -> tuple[Tensor, Tensor]:
    """Norm of what a step added to each head, and of what was there before, ``[H]`` each."""
    wide = torch.promote_types(now_Hn.dtype, torch.float32)
    return norm(now_Hn.to(wide) - before_Hn.to(wide)), norm(before_Hn)


def adam(state: Mapping[str, Any], group: Mapping[str, Any], rows: Rows) -> Tensor | None:
    """The numbers of `ADAM` for one weight, ``[6]``; None where the optimizer keeps no two moments of it, as Adam does."""
    if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys() or not {"betas", "eps"} <= group.keys():
        return None
    first, second = rows(state["exp_avg"]).float(), rows(state["exp_avg_sq"]).float()
    largest = rows(state["max_exp_avg_sq"]).float() if "max_exp_avg_sq" in state else second
    step = state["step"]
    if isinstance(step, Tensor):
        step = step.to(first.device, torch.float32) if step.device.type != "cpu" else float(step)
    one, two = (1 - beta**step for beta in group["betas"])  # the corrections of the moments' bias
    size = (first.abs() / one) / (second / two).sqrt()
    alive = second > 0
    agree = ((size - 1).abs() <= NEAR) & alive
    denominator = (largest / two).sqrt() + group["eps"]
    return torch.stack(
        [
            first.square().mean().sqrt(),
            second.square().mean().sqrt(),
            agree.sum() / alive.sum(),
            denominator.amin(),
            denominator.amax(),
            torch.as_tensor(step, dtype=torch.float32, device=first.device) if not isinstance(step, Tensor) else step,
        ]
    )
