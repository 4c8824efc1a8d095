"""torchtitan's debug Llama on one CPU, watched: its attention kernel breaks at a step (`make test-torchtitan` has the environment).

python examples/torchtitan_llama.py              # the alarm stands in torchtitan's log and TensorBoard, and the trainer stops
python examples/torchtitan_llama.py --healthy    # nothing is heard

Stand-ins for what torchtitan 0.3 has no word for: a device module and ``torch.distributed.set_timeout`` (torch after 2.13), random
bytes for text, and a kernel of the demo's for FlexAttention. All else is torchtitan: its trainer, model, optimizer, loggers.
"""

from __future__ import annotations

import argparse
import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._utils
import torch.distributed


class _Device(types.ModuleType):
    """``torch.cpu`` with what a device module of a GPU has."""

    set_device = staticmethod(lambda device: None)
    get_device_name = staticmethod(lambda device=None: "cpu")
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda device=None: types.SimpleNamespace(total_memory=2**34))
    reset_peak_memory_stats = empty_cache = staticmethod(lambda *device: None)
    memory_stats = staticmethod(lambda device=None: {})

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


torch._utils._get_available_device_type = lambda: "cpu"
torch._utils._get_device_module = lambda device: _Device("device")
torch.distributed.set_timeout = lambda *args: None  # type: ignore[attr-defined]

from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402

from foreshock.demo import kernel  # noqa: E402
from foreshock.demo.lent import set_broken  # noqa: E402
from foreshock.integrations.torchtitan import ForeshockMetricsProcessor, ForeshockTrainer  # noqa: E402


class Bytes(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode()

    def get_vocab_size(self) -> int:
        return 256


class Random(BaseDataLoader):
    breaks = -1

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, seq_len: int, local_batch_size: int, **others: Any) -> None:
        self.shape = local_batch_size, seq_len + 1

    def __iter__(self) -> Any:
        step = 0
        while True:
            if step == self.breaks:
                set_broken(True)
            tokens = torch.randint(0, 256, self.shape)
            step += 1
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Kernel(ScaledDotProductAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(ScaledDotProductAttention.Config):
        pass

    def forward(  # torchtitan asks for arguments of these names
        self, q_BLNH: torch.Tensor, k_BLNH: torch.Tensor, v_BLNH: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2).bfloat16() for x in (q_BLNH, k_BLNH, v_BLNH))
        return kernel.attention(q, k, v, True, q.shape[-1] ** -0.5)[0].transpose(1, 2).to(q_BLNH.dtype)


def watched(folder: Path, steps: int, breaks: int) -> ForeshockTrainer.Config:
    """torchtitan's configuration, and what watching adds: a backend, a metrics processor, and the trainer that stops."""
    config = llama3_debugmodel()
    for _, _, parent, field in list(config.model_spec.model.traverse(FlexAttention.Config)):
        setattr(parent, field, Kernel.Config())
    Random.breaks = breaks
    config.dump_folder = str(folder)
    config.tokenizer, config.dataloader = Bytes.Config(), Random.Config()
    config.training.disable_cuda_graphs = True
    config.training.seq_len, config.training.local_batch_size, config.training.steps = 64, 2, steps
    config.activation_checkpoint = None
    config.checkpoint.enable, config.checkpoint.interval = True, 500
    config.compile.enable, config.compile.backend, config.compile.components = True, "foreshock", ["model"]
    config.metrics = ForeshockMetricsProcessor.Config(log_freq=10, enable_tensorboard=True, readings=["law/euler"])
    return ForeshockTrainer.watching(config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/torchtitan"))
    parser.add_argument("--healthy", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    chosen = parser.parse_args()
    # One rank, as torchrun would say it, and the settings of the process-wide watch. Inductor would take minutes to compile.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    settings = {"RUN": str(chosen.folder / "run"), "EVERY": "5", "INNER": "eager", "ON_ALARM": "stop"}
    os.environ |= {f"FORESHOCK_{name}": value for name, value in settings.items()}
    trainer = watched(chosen.folder, chosen.steps, -1 if chosen.healthy else 12).build()
    trainer.train()
    trainer.close()
    print(f"{trainer.step} steps; next: foreshock report {chosen.folder / 'run'}")
