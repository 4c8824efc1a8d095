"""How `torch.distributed.checkpoint` loads a watch where there are fewer ranks than saved it, more, or where there was none."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from foreshock.agreement import this_rank
from foreshock.resume import PENDING


class LoadPlanner(DefaultLoadPlanner):
    """Loads ``{"watch": watch}`` with what ranks had not merged that are no more, which a watch cannot name: it does not know how
    many there were. What the checkpoint has not is left as it is, as with ``DefaultLoadPlanner(allow_partial_load=True)``."""

    def __init__(self) -> None:
        super().__init__(allow_partial_load=True)

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        rank, ranks = this_rank()
        for name, entry in state_dict.items():
            if f"{PENDING}{rank}" in (entry if isinstance(entry, dict) else ()):
                there = (key.removeprefix(f"{name}.{PENDING}") for key in metadata.state_dict_metadata)
                for at in (int(place) for place in there if place.isdigit()):
                    if at > rank and at % ranks == rank:
                        entry[f"{PENDING}{at}"] = ({},)
        super().set_up_planner(state_dict, metadata, is_coordinator)
