"""torchtitan's debug Llama on one CPU, with what torchtitan 0.3 has no word for put in its place; run by test_torchtitan.py.

    python titan.py FOLDER STEPS [BREAKS]

Stand-ins: a device module and ``torch.distributed.set_timeout`` (torch after 2.13), random bytes for text, and a kernel of the
demo's, which breaks in the step BREAKS, for FlexAttention. All else is torchtitan: its trainer, model, optimizer, loggers.
"""

from __future__ import annotations

import os
import sys
import types
from dataclasses import dataclass
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
from foreshock.demo.rounding import Rounding  # noqa: E402
from foreshock.integrations.torchtitan import ForeshockMetricsProcessor  # noqa: E402


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
                kernel.set_fault(kernel.Fault(out=Rounding(bits=1)))
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


def main(folder: str, steps: int, breaks: int = -1) -> None:
    config = llama3_debugmodel()
    for _, _, parent, field in list(config.model_spec.model.traverse(FlexAttention.Config)):
        setattr(parent, field, Kernel.Config())
    Random.breaks = breaks
    config.dump_folder = folder
    config.tokenizer, config.dataloader = Bytes.Config(), Random.Config()
    config.training.disable_cuda_graphs = True
    config.training.seq_len, config.training.local_batch_size, config.training.steps = 64, 2, steps
    config.activation_checkpoint = None
    config.compile.enable, config.compile.backend, config.compile.components = True, "foreshock", ["model"]
    config.metrics = ForeshockMetricsProcessor.Config(log_freq=10, enable_tensorboard=True, readings=["law/euler"])
    trainer = config.build()
    trainer.train()
    trainer.close()


if __name__ == "__main__":
    local = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(local)
    main(sys.argv[1], *map(int, sys.argv[2:]))
