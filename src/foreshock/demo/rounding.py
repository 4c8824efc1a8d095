"""What an accelerator's arithmetic does to a tensor of numbers, right and wrong. Everything works on fp32 bit patterns."""

from dataclasses import dataclass

import torch
from torch import Tensor


def nearest_even(x: Tensor) -> Tensor:
    """What bf16 hardware does."""
    return x.bfloat16().float()


@dataclass(frozen=True)
class Rounding:
    """Rounding that keeps ``bits`` mantissa bits, always towards zero or always ``away`` from it: a bias, not noise."""

    bits: int
    away: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        unit = 1 << (23 - self.bits)
        pattern = x.contiguous().view(torch.int32)
        return ((pattern + (unit - 1) * self.away) & -unit).view(torch.float32)


@dataclass(frozen=True)
class Stochastic:
    """Rounding to ``bits`` mantissa bits, up as often as the rest says: noise, and no bias. Draws from torch's generator."""

    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        unit = 1 << (23 - self.bits)
        pattern = x.contiguous().view(torch.int32)
        return ((pattern + torch.randint_like(pattern, unit)) & -unit).view(torch.float32)


@dataclass(frozen=True)
class Flip:
    """One bit of one number flipped, the silent data corruption of a broken unit.

    ``bit`` of the fp32 pattern (23 to 30 are the exponent's); the number is the largest of those in which it is clear, so
    that it grows.
    """

    bit: int

    def __call__(self, x: Tensor) -> Tensor:
        pattern = x.contiguous().clone().view(torch.int32)
        clear = (pattern >> self.bit & 1) == 0
        where = torch.where(clear, x.abs(), -1.0).flatten().argmax()
        pattern.view(-1)[where] ^= 1 << self.bit
        return pattern.view(torch.float32)
