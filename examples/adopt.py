"""Three ways to watch a Hugging Face model; the model and the loop know nothing of it.

python examples/adopt.py                      # a Watch with options
FORESHOCK_RUN=runs/named python examples/adopt.py --by-name
foreshock run --run runs/launched examples/adopt.py --plain    # not even the torch.compile line changes

With --broken, to each of them, the attention is a kernel of one's own that breaks half-way: the alarm is in the terminal.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AttentionInterface, OlmoeConfig, OlmoeForCausalLM

import foreshock
from foreshock.demo.lent import set_broken, transformers_kernel


def train(model: torch.nn.Module, steps: int, breaks: int | None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        set_broken(breaks is not None and step >= breaks)
        tokens = torch.randint(0, 128, (4, 32))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by-name", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    length = options.steps, options.steps // 2 if options.broken else None
    torch.manual_seed(0)
    AttentionInterface.register("own_kernel", transformers_kernel)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            eos_token_id=0,
            attn_implementation="own_kernel" if options.broken else "sdpa",
        )
    )
    if options.plain:
        train(torch.compile(model), *length)
    elif options.by_name:
        train(torch.compile(model, backend="foreshock"), *length)
    else:
        with foreshock.Watch("runs/adopt", every=5) as watch:
            train(torch.compile(model, backend=watch.backend), *length)
            for status in watch.coverage:
                print(f"{status.site.id}: {status.evaluations} evaluations, {status.sampled} sampled")
        print(f"alarms: {len(watch.alarms)}; next: foreshock report runs/adopt")


if __name__ == "__main__":
    main()
