"""A loop of Accelerate, watched: a small Llama on Python's own sources, whose attention kernel breaks at a step.

python examples/accelerate_loop.py              # the alarm stands in Accelerate's TensorBoard, and the loop stops
python examples/accelerate_loop.py --healthy    # nothing is heard
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader

import foreshock
from foreshock.demo.lent import set_broken, transformers_kernel, windows
from foreshock.integrations.accelerate import connect

LENGTH = 64


def small_llama() -> transformers.LlamaForCausalLM:
    """Its attention is a kernel of one's own."""
    transformers.AttentionInterface.register("own_kernel", transformers_kernel)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            attn_implementation="own_kernel",
        )
    )


def train(folder: Path, steps: int, breaks: int | None = None) -> foreshock.Watch:
    """Train up to step ``steps``, two microbatches each, and save; from step ``breaks`` on the kernel is broken."""
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder, gradient_accumulation_steps=2)
    accelerator.init_trackers("log")
    torch.manual_seed(0)
    model = small_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(windows(LENGTH), batch_size=8, shuffle=True, drop_last=True)
    )
    # Inductor, the default, would take a minute or two to compile.
    with foreshock.Watch(folder / "run", every=5, inner="eager", on_alarm="stop") as watch:
        model.compile(backend=watch.backend)
        tell = connect(accelerator, watch, metrics=["law/euler"])
        for tokens in loader:
            set_broken(breaks is not None and watch.step >= breaks)
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                watch.log(loss=loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                tell()
            if watch.stop_requested or watch.step == steps:
                break
        watch.flush()
        tell()
        accelerator.save_state(str(folder / "saved"))
    accelerator.end_training()
    return watch


def logged(folder: Path) -> list[tuple[int, str]]:
    """Step and message of each alarm in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "log")).Reload()
    tag = "foreshock/message/text_summary"
    events = board.Tensors(tag) if tag in board.Tags()["tensors"] else []
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--healthy", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    chosen = parser.parse_args()
    watch = train(chosen.folder, chosen.steps, None if chosen.healthy else chosen.steps // 2)
    for step, message in logged(chosen.folder):
        print(f"in the TensorBoard of Accelerate, step {step}: {message}")
    print(f"{watch.step} steps, {len(watch.alarms)} alarms; next: foreshock report {chosen.folder / 'run'}")
