"""A watch in PyTorch Lightning: ``Trainer(callbacks=[ForeshockCallback(watch)])``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from foreshock.default import default_watch
from foreshock.eager import AUTO, Eager
from foreshock.errors import ForeshockError
from foreshock.integrations.entries import Entries, Entry, numbers
from foreshock.watch import Watch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]  # the same, alone
    except ImportError as error:
        raise ForeshockError(f"importing Lightning: {error}; pip install 'foreshock[lightning]'") from error


class ForeshockCallback(Callback):
    """Compiles what is trained with the watch's backend and brings what the watch says to the Trainer's loggers and checkpoints.

    Args:
        watch: None takes the process-wide one, with the settings of foreshock.toml and FORESHOCK_*. Its ``on_alarm="stop"`` stops
            the Trainer, on all ranks at one step.
        metrics: metrics, or patterns of them (``law/*``), whose last readings are logged every ``log_every_n_steps``.
        compile: "auto" compiles the outermost modules that the training step calls; a class (``Block``), each module of it; None,
            nothing: they are compiled with ``watch.backend`` already. Validation stays eager.

    Loggers are told of an alarm at once, in numbers, for few of them take words: ``foreshock/alarms`` counts, ``foreshock/onset``
    is the step at which it began, ``foreshock/MECHANISM`` is 1. The watch's state is part of each checkpoint and taken up from it.
    """

    def __init__(self, watch: Watch | None = None, *, metrics: Sequence[str] = (), compile: str | None = AUTO) -> None:
        self.watch = default_watch() if watch is None else watch
        self._wanted = compile
        self._entries = Entries(self.watch, metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.bind(pl_module)
        if self._wanted is not None:
            eager = Eager(self._wanted, lambda call: torch.compile(call, backend=self.watch.backend))
            # A strategy that wraps the module calls it to come to its training step, which is no graph.
            eager.meet_parts(pl_module, itself=trainer.strategy.model is pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self.watch.log(loss=loss)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a part of the Trainer
        self._tell(trainer, readings=trainer.global_step % every == 0)
        trainer.should_stop = trainer.should_stop or self.watch.stop_requested

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.flush()
        self._tell(trainer, readings=True)

    def state_dict(self) -> dict[str, Any]:
        return self.watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watch.load_state_dict(state_dict)

    def _tell(self, trainer: Trainer, readings: bool) -> None:
        entries: list[Entry] = [*self._entries.alarms(), *([self._entries.latest()] if readings else [])]
        for entry in filter(None, map(numbers, entries)):
            for logger in trainer.loggers:
                logger.log_metrics(entry, step=trainer.global_step)
