"""A watch in the Trainer of Hugging Face transformers: ``trainer.add_callback(ForeshockCallback(trainer, watch))``."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foreshock.default import default_watch
from foreshock.eager import AUTO, Eager
from foreshock.errors import ConfigError, ForeshockError
from foreshock.integrations.entries import Entries
from foreshock.watch import Watch

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ForeshockError(f"importing the Trainer: {error}; pip install 'foreshock[hf]'") from error

log = logging.getLogger("foreshock")


class ForeshockCallback(TrainerCallback):
    """Compiles the model with the watch's backend and brings what the watch says into the Trainer's own log and checkpoints.

    Args:
        trainer: the Trainer that is given the callback.
        watch: None takes the process-wide one, with the settings of foreshock.toml and FORESHOCK_*. Its ``on_alarm="stop"`` stops
            the Trainer, on all ranks at one step.
        metrics: metrics, or patterns of them (``law/*``), whose last readings are logged every ``logging_steps``.
        save_on_alarm: make a checkpoint of the step at which an alarm was heard.
        compile: "auto" compiles the model as the Trainer has wrapped it; a class (``LlamaDecoderLayer``), each module of it; None,
            nothing: it is compiled with ``watch.backend`` already. Evaluation stays eager.

    An alarm is an entry of its own in ``state.log_history``. The watch's state is saved in each checkpoint, one file a rank, and
    taken up from the checkpoint that the Trainer resumes from. Raises ConfigError when training begins with ``torch_compile``
    set as well, by which the Trainer would compile without the watch.
    """

    def __init__(
        self,
        trainer: Trainer,
        watch: Watch | None = None,
        *,
        metrics: Sequence[str] = (),
        save_on_alarm: bool = False,
        compile: str | None = AUTO,
    ) -> None:
        self.watch = default_watch() if watch is None else watch
        self._trainer, self._save_on_alarm, self._wanted = trainer, save_on_alarm, compile
        self._entries = Entries(self.watch, metrics)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.torch_compile and self._wanted is not None:
            raise ConfigError("compiling the Trainer's model: the callback does it; leave torch_compile out")
        if isinstance(self._trainer.model, torch.nn.Module):
            self.watch.bind(self._trainer.model)
        if self._wanted is not None:
            Eager(self._wanted, lambda call: torch.compile(call, backend=self.watch.backend)).meet_parts(
                self._trainer.model_wrapped
            )
        if state.global_step > 0 and self.watch.step == 0:
            self._resume(args, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if control.should_training_stop:  # before the Trainer logs for the last time
            self.watch.flush()
        alarms, due = self._entries.alarms(), control.should_log
        latest = self._entries.latest() if due else {}
        for entry in filter(None, (*alarms, latest)):
            self._trainer.log(dict(entry))  # type: ignore[arg-type]  # words reach the history, and loggers that take them
        control.should_log = due  # logging takes it back, and the Trainer's own losses are still to come
        control.should_save = control.should_save or (self._save_on_alarm and bool(alarms))
        control.should_training_stop = control.should_training_stop or self.watch.stop_requested
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            self.watch.log(loss=logs["loss"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = _checkpoint(args, state) / _name(args)
        try:
            torch.save(self.watch.state_dict(), path)
        except Exception as error:
            self.watch.fail(f"saving the watch's state to {path}", error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watch.flush()

    def resume(self, checkpoint: str | Path) -> None:
        """Take up the watch's state from ``checkpoint``: needed where it is neither in ``output_dir`` nor in
        ``args.resume_from_checkpoint``."""
        path = Path(checkpoint) / _name(self._trainer.args)
        try:
            self.watch.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:
            self.watch.fail(f"loading the watch's state from {path}; it begins anew", error)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """The Trainer does not say which checkpoint it resumes from, but its state is the one in there."""
        said = args.resume_from_checkpoint
        for folder in (*([Path(said)] if isinstance(said, str) else []), _checkpoint(args, state)):
            stored = folder / "trainer_state.json"
            if stored.is_file() and _is_history(stored, state):
                return self.resume(folder)
        log.warning(
            "the Trainer's checkpoint was not found, the watch begins anew; give it to ForeshockCallback.resume"
        )
        return None


def _is_history(stored: Path, state: TrainerState) -> bool:
    history = json.loads(stored.read_text(encoding="utf-8"))["log_history"]
    return json.dumps(history) == json.dumps(state.log_history)  # as text: NaN is not equal to itself


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _name(args: TrainingArguments) -> str:
    return f"foreshock-{args.process_index}.pt"
