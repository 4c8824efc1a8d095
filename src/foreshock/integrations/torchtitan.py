"""A watch in torchtitan, by way of its configuration: a metrics processor that tells its loggers, and a trainer that stops."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from foreshock.default import default_watch
from foreshock.errors import ForeshockError
from foreshock.integrations.entries import Entries, Entry, numbers

try:
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.tools.logging import logger
    from torchtitan.trainer import Trainer
except ImportError as error:
    raise ForeshockError(f"importing torchtitan: {error}; pip install torchtitan==0.3.0, the tested version") from error


class ForeshockMetricsProcessor(MetricsProcessor):  # type: ignore[misc]  # torchtitan is not in every environment
    """torchtitan's metrics processor, which also brings what the process-wide watch says to torchtitan's loggers.

    ``--compile.backend foreshock`` compiles with that watch; foreshock.toml and FORESHOCK_* set it. An alarm is logged in the step
    in which it is heard, in numbers: ``foreshock/alarms`` counts, ``foreshock/onset`` is the step at which it began, counted from
    0, ``foreshock/MECHANISM`` is 1; and in words, as a warning of torchtitan's log. The trainer's loss becomes ``run/loss`` at each
    step that it logs.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):  # type: ignore[misc]
        readings: list[str] = field(default_factory=list)
        """Metrics of foreshock's, or patterns of them (law/*), whose last readings are logged with the trainer's own"""

    def __init__(self, config: Config, **runtime: Any) -> None:
        super().__init__(config, **runtime)
        self.watch = default_watch()
        self._entries = Entries(self.watch, config.readings)

    def should_log(self, step: int) -> bool:
        """The trainer asks once a step, on every rank."""
        for entry in self._entries.alarms():
            self._tell(entry, step)
        return bool(super().should_log(step))

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        self.watch.log(loss=global_avg_loss)
        extra = {**(extra_metrics or {}), **self._entries.latest()}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra)

    def close(self) -> None:
        self.watch.flush()
        for entry in self._entries.alarms():
            self._tell(entry, self.watch.step)
        super().close()

    def _tell(self, entry: Entry, step: int) -> None:
        logger.warning(
            f"foreshock: {entry['foreshock/mechanism']} since step {entry['foreshock/onset']}: {entry['foreshock/message']}"
        )
        self.logger.log(numbers(entry), step)


class ForeshockTrainer(Trainer):  # type: ignore[misc]
    """torchtitan's trainer, which ends when the process-wide watch asks for it (``FORESHOCK_ON_ALARM=stop``), on all ranks alike.

    It ends as training does, behind a checkpoint of its last step where checkpoints are enabled: of the model alone, unless
    ``checkpoint.last_save_model_only`` is off. One that the interval has made of that very step is left as it is.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        pass

    @classmethod
    def watching(cls, config: Trainer.Config) -> Config:
        """``config`` for this trainer; of torchtitan's own trainer, for one that a model brings along has fields of its own."""
        return cls.Config(**{part.name: getattr(config, part.name) for part in fields(config)})

    def should_continue_training(self) -> bool:
        """The loop asks before each step, behind the checkpoint of the last."""
        goes_on = bool(super().should_continue_training())
        if not (goes_on and default_watch().stop_requested):
            return goes_on
        if self.step % self.config.checkpoint.interval:
            self.checkpointer.save(self.step, last_step=True)
        return False
