"""Real text that every machine has: the source of Python's own standard library, as bytes."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SKIPPED = {"test", "tests", "idlelib", "encodings", "site-packages", "dist-packages"}
CAP = 5_000_000


@dataclass(frozen=True)
class Corpus:
    """``tokens`` uint8 [bytes]; the digest tells whether two machines trained on the same text."""

    tokens: Tensor
    sha256: str

    def batches(self, seed: int, batch: int, length: int) -> Iterator[Tensor]:
        """Random windows, int64 [batch, length], the same for the same seed, for ever."""
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(length)
        while True:
            starts = torch.randint(len(self.tokens) - length, (batch, 1), generator=generator)
            yield self.tokens[starts + offsets].long()


def standard_library(cap: int = CAP) -> Corpus:
    """The library's ``.py`` files in sorted order, without its tests and character tables, up to ``cap`` bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            text += path.read_bytes()
            if len(text) >= cap:
                break
    del text[cap:]
    return Corpus(torch.frombuffer(text, dtype=torch.uint8), hashlib.sha256(text).hexdigest())
