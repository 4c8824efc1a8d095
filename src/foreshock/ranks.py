"""Which rank of a job this process is."""

from __future__ import annotations

import os

from torch import distributed


def this_rank() -> tuple[int, int]:
    """``(rank, ranks)``: of torch.distributed where it is initialized, else of torchrun's variables, else ``(0, 1)``."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), ranks) if ranks > 1 else (0, 1)
