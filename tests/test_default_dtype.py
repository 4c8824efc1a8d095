"""The dtype that PyTorch makes new tensors of is the user's: what is measured does not hang on it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from loop import Layer

from foreshock import Watch

Told = dict[tuple[str, str | None], tuple[bytes, bytes]]


@pytest.fixture
def float32_again() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def told(default: torch.dtype) -> Told:
    """Every series, bit by bit, of a float32 model that is compiled and trained under a default dtype."""
    torch._dynamo.reset()
    torch.set_default_dtype(torch.float32)  # the model is of it
    torch.manual_seed(0)
    model, generator = Layer(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.set_default_dtype(default)
    with Watch(every=1, inner="aot_eager", monitors="all", windows=(2,), strict=True) as watch:
        compiled = torch.compile(model, backend=watch.backend)
        for _ in range(4):
            compiled(torch.randn(2, 5, 8, generator=generator, dtype=torch.float32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    series = {(m, s): watch.series(m, s) for m in watch.metrics() for s in watch.collector.store.sites_of(m)}
    return {key: (steps.tobytes(), np.ascontiguousarray(values).tobytes()) for key, (steps, values) in series.items()}


def test_what_is_measured_is_the_same_whatever_the_default_dtype(one_thread: None, float32_again: None) -> None:
    expected = told(torch.float32)
    assert expected
    assert told(torch.bfloat16) == expected
    assert told(torch.float64) == expected
