"""A watch beside Hugging Face's Accelerator: ``connect(accelerator, watch)``, once trackers are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from foreshock.errors import ForeshockError
from foreshock.integrations.entries import Entries
from foreshock.watch import Watch

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ForeshockError(f"importing the Accelerator: {error}; pip install 'foreshock[accelerate]'") from error


def connect(accelerator: Accelerator, watch: Watch, *, metrics: Sequence[str] = ()) -> Callable[[], None]:
    """Put the watch's state into ``save_state`` and ``load_state``, and return what to call after each optimizer step: it tells
    the trackers of alarms, and of the readings of ``metrics`` (names or patterns, ``law/*``), under the watch's step.

    Compile in place what ``accelerator.prepare`` returns, ``model.compile(backend=watch.backend)``: the Accelerator's own
    ``dynamo_backend`` takes names of a fixed list alone.
    """
    accelerator.register_for_checkpointing(watch)
    entries = Entries(watch, metrics)

    def tell() -> None:
        for entry in (*entries.alarms(), entries.latest()):
            if entry:
                accelerator.log(dict(entry), step=watch.step)

    return tell
