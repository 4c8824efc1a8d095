"""A watch beside Lightning Fabric: ``connect(fabric, watch)``, whose loggers are there from the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from foreshock.errors import ForeshockError
from foreshock.integrations.entries import Entries, numbers
from foreshock.watch import Watch

try:
    from lightning.fabric import Fabric
except ImportError:
    try:
        from lightning_fabric import Fabric  # type: ignore[assignment]  # the same, alone
    except ImportError as error:
        raise ForeshockError(f"importing Fabric: {error}; pip install 'foreshock[lightning]'") from error


def connect(fabric: Fabric, watch: Watch, *, metrics: Sequence[str] = ()) -> Callable[[], None]:
    """Return what to call after each optimizer step: it tells Fabric's loggers, through ``log_dict`` and under the watch's step, of
    alarms and of the readings of ``metrics`` (names or patterns, ``law/*``), in numbers; behind an alarm loggers save theirs.

    Compile before ``fabric.setup``, ``fabric.setup(torch.compile(model, backend=watch.backend), optimizer)``; ``fabric.save`` takes
    the watch beside the model.
    """
    entries = Entries(watch, metrics)

    def tell() -> None:
        alarms = entries.alarms()
        for entry in filter(None, map(numbers, (*alarms, entries.latest()))):
            fabric.log_dict(entry, step=watch.step)
        if alarms:
            for logger in fabric.loggers:
                logger.save()

    return tell
