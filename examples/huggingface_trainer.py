"""The Hugging Face Trainer watched by a callback: a small Llama on Python's own sources, whose attention kernel breaks at a step.

python examples/huggingface_trainer.py              # the alarm stands in the Trainer's log, and the Trainer saves and stops
python examples/huggingface_trainer.py --healthy    # nothing is heard
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers

import foreshock
from foreshock.demo.lent import set_broken, transformers_kernel, windows
from foreshock.integrations.huggingface import ForeshockCallback

LENGTH = 64


class Breaks(transformers.TrainerCallback):
    """From ``step`` on the kernel rounds its output away from zero."""

    def __init__(self, step: int | None) -> None:
        self.step = step
        set_broken(False)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            set_broken(True)


def make(folder: Path, steps: int, breaks: int | None = None, **more: Any) -> transformers.Trainer:
    """A Trainer up to step ``steps``, with ``more`` arguments."""
    transformers.AttentionInterface.register("own_kernel", transformers_kernel)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        attn_implementation="own_kernel",
    )
    arguments = {
        "output_dir": str(folder / "checkpoints"),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_steps": 20,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return transformers.Trainer(
        model=transformers.LlamaForCausalLM(config),
        args=transformers.TrainingArguments(**arguments | more),
        train_dataset=[{"input_ids": window, "labels": window} for window in windows(LENGTH)],
        callbacks=[Breaks(breaks)],
    )


def train(trainer: transformers.Trainer, run: Path, resume: bool = False, **options: Any) -> foreshock.Watch:
    """Train under a watch; ``options`` are the callback's."""
    # Inductor, the default, would take a minute or two to compile.
    with foreshock.Watch(run, every=5, inner="eager", on_alarm="stop") as watch:
        trainer.add_callback(ForeshockCallback(trainer, watch, metrics=["law/euler"], save_on_alarm=True, **options))
        trainer.train(resume_from_checkpoint=resume)
    return watch


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/huggingface"))
    parser.add_argument("--healthy", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    chosen = parser.parse_args()
    trainer = make(chosen.folder, chosen.steps, None if chosen.healthy else chosen.steps // 2)
    watch = train(trainer, chosen.folder / "run")
    for entry in trainer.state.log_history:
        if "foreshock/message" in entry:
            print(f"in the Trainer's log, step {entry['step']}: {entry['foreshock/message']}")
    print(f"{watch.step} steps, {len(watch.alarms)} alarms; next: foreshock report {chosen.folder / 'run'}")
