"""Activation and residual statistics against float64 arithmetic on the same tensors, merged as microbatches are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from foreshock.monitors import activations, residual
from foreshock.monitors.activations import DTYPES, RANGES
from foreshock.records import Probe

FACTS: dict[str, object] = {}
ROWS = torch.zeros(2)
PROBE = activations.activations("attention")


def measured(probe: Probe, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """Metrics of several microbatches: fp32 quantities, merged in float64 by the probe's own rule."""
    merged: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, x in probe.forward(FACTS, batch, ROWS).items():
            part = x.reshape(-1).float().double().numpy()
            known = merged.get(name)
            merge = np.maximum if name in probe.maxima else np.add
            merged[name] = part if known is None else merge(known, part)
    return dict(probe.finish(FACTS, merged))


def exact(x: Tensor) -> dict[str, list[float]]:
    """Every activation metric of all numbers in ``x``, by definition."""
    values = x.double().reshape(-1)
    size, nonzero = values.abs(), (values != 0).sum()
    finfo = [torch.finfo(getattr(torch, dtype)) for dtype in DTYPES]
    limits = {
        "underflow": [(size < i.tiny) & (size > 0) for i in finfo],
        "vanish": [(size < i.tiny * i.eps) & (size > 0) for i in finfo],
        "overflow": [size > i.max for i in finfo],
    }
    shares = {name: [float(hit.sum() / nonzero) for hit in hits] for name, hits in limits.items()}
    return {
        "rms": [float(values.square().mean().sqrt())],
        "absmax": [float(size.max())],
        "kurtosis": [float(values.pow(4).mean() / values.square().mean().square())],
        "zero": [float((values == 0).double().mean())],
        **shares,
    }


def agree(got: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor], rtol: float = 1e-5) -> None:
    wanted = [exact(x) for x in tensors.values()]
    assert got.keys() == {f"activation/{name}" for name in wanted[0]}
    for name in wanted[0]:
        expected = [value for one in wanted for value in one[name]]
        np.testing.assert_allclose(got[f"activation/{name}"], expected, rtol=rtol, err_msg=name)


def drawn(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Tensor:
    """Random numbers over many orders of magnitude, some of them zero: within float16 where that is asked for."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*sizes, generator=g) * 10 ** (spread * torch.randn(*sizes, generator=g))
    return torch.where(torch.rand(*sizes, generator=g) < 0.1, 0.0, x).clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [1, 4])
def test_every_statistic_is_that_of_its_definition(dtype: torch.dtype, heads: int) -> None:
    shapes = {"q": (2, heads, 7, 8), "k": (2, 1, 9, 8), "v": (2, 1, 9, 5), "out": (2, heads, 7, 5)}
    tensors = {role: drawn(*shape, seed=i, dtype=dtype) for i, (role, shape) in enumerate(shapes.items())}
    got = measured(PROBE, [tensors])
    agree(got, tensors)
    assert got["activation/overflow"].reshape(4, 4)[:, 2].min() > 0  # float8_e4m3fn: the draw reaches its limits
    assert got["activation/vanish"].reshape(4, 4)[:, 2].min() > 0


@pytest.mark.parametrize("role", ["q", "input"])
def test_one_element(role: str) -> None:
    tensors = {role: torch.tensor([[[[-3.0e-5]]]])}
    got = measured(PROBE, [tensors])
    agree(got, tensors)
    np.testing.assert_allclose(got["activation/kurtosis"], [1.0], rtol=1e-6)
    np.testing.assert_array_equal(got["activation/underflow"], [1, 0, 1, 1])


def test_limits_are_those_of_the_formats() -> None:
    """At a limit a number is inside; half a step beyond it is outside."""
    assert [(r.normal, r.subnormal, r.largest) for r in RANGES] == [
        (2.0**-14, 2.0**-24, 65504.0),
        (2.0**-126, 2.0**-133, float(torch.finfo(torch.bfloat16).max)),
        (2.0**-6, 2.0**-9, 448.0),
        (2.0**-14, 2.0**-16, 57344.0),
    ]
    for place, reach in enumerate(RANGES):
        limits = torch.tensor([reach.normal, -reach.subnormal, reach.largest])
        got = measured(PROBE, [{"q": limits}])
        assert got["activation/vanish"][place] == 0
        assert got["activation/overflow"][place] == 0
        np.testing.assert_allclose(got["activation/underflow"][place], 1 / 3)
        beyond = torch.tensor([reach.normal, -reach.subnormal, reach.largest]) * torch.tensor([0.75, 0.75, 1.0])
        got = measured(PROBE, [{"q": torch.cat([beyond, torch.tensor([float("inf")])])}])
        np.testing.assert_allclose(
            [got[f"activation/{name}"][place] for name in ("underflow", "vanish", "overflow")], [2 / 4, 1 / 4, 1 / 4]
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cast_to_the_dtype_loses_what_the_shares_say(dtype: str) -> None:
    """What overflows is no longer the nearest number; what does not vanish stays nonzero."""
    x = drawn(4000)
    got = measured(PROBE, [{"q": x}])
    place, reach = DTYPES.index(dtype), RANGES[DTYPES.index(dtype)]
    cast = x.clamp(-reach.largest, reach.largest).to(getattr(torch, dtype)).double()
    nonzero = x != 0
    lost = (cast == 0) & nonzero
    assert float(lost.sum() / nonzero.sum()) <= got["activation/vanish"][place]
    held = nonzero & (x.abs() >= reach.normal) & (x.abs() <= reach.largest)
    step = 2 * torch.finfo(getattr(torch, dtype)).eps
    assert ((cast - x).abs()[held] <= step * x.abs()[held]).all()


def test_zeros_nan_and_infinity() -> None:
    zeros = measured(PROBE, [{"q": torch.zeros(2, 1, 3, 4)}])
    assert zeros["activation/zero"] == [1]
    assert zeros["activation/rms"] == zeros["activation/absmax"] == [0]
    for name in ("kurtosis", "underflow", "vanish", "overflow"):
        assert np.isnan(zeros[f"activation/{name}"]).all(), name
    x = torch.tensor([1.0, float("nan"), 0.0, 1e-3])
    spoiled = measured(PROBE, [{"q": x, "k": torch.ones(3)}])
    assert np.isnan([spoiled[f"activation/{n}"][0] for n in ("rms", "absmax", "kurtosis")]).all()
    assert spoiled["activation/rms"][1] == 1
    np.testing.assert_allclose(spoiled["activation/zero"], [0.25, 0])
    np.testing.assert_allclose(spoiled["activation/vanish"][2], 1 / 3)
    infinite = measured(PROBE, [{"q": torch.tensor([1.0, float("-inf")])}])
    assert infinite["activation/absmax"] == infinite["activation/rms"] == [np.inf]
    np.testing.assert_array_equal(infinite["activation/overflow"], [0.5] * 4)


@pytest.mark.parametrize("probe", [PROBE, residual.RESIDUAL], ids=["activations", "residual"])
def test_microbatches_of_unequal_size_are_one_batch(probe: Probe) -> None:
    role = "q" if probe is PROBE else "residual"
    parts = [drawn(n, 6, 16, seed=n) for n in (1, 4, 2)]
    whole = measured(probe, [{role: torch.cat(parts)}])
    apart = measured(probe, [{role: part} for part in parts])
    assert apart.keys() == whole.keys()
    for name in whole:
        np.testing.assert_allclose(apart[name], whole[name], rtol=1e-6, err_msg=name)


def stream(*sizes: int, dtype: torch.dtype, massive: Mapping[int, float]) -> Tensor:
    x_BSD = torch.randn(*sizes, generator=torch.Generator().manual_seed(1))
    for channel, value in massive.items():
        x_BSD[0, 0, channel] = value
    return x_BSD.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_massive_channels_are_named(dtype: torch.dtype) -> None:
    x_BSD = stream(2, 5, 32, dtype=dtype, massive={7: 900.0, 30: -2000.0, 3: 60.0})
    got = measured(residual.RESIDUAL, [{"residual": x_BSD}])
    x_TD = x_BSD.double().flatten(0, 1).abs()
    typical = np.median(x_TD.mean(0).numpy())
    np.testing.assert_allclose(got["residual/rms"], [x_TD.square().mean().sqrt()], rtol=1e-6)
    np.testing.assert_array_equal(got["residual/absmax"], [float(x_TD.max())])
    np.testing.assert_array_equal(got["residual/top_channels"][:3], [30, 7, 3])
    largest = x_TD.amax(0).sort(descending=True).values[:5]
    np.testing.assert_allclose(got["residual/top_ratio"], largest.numpy() / typical, rtol=1e-6)
    np.testing.assert_array_equal(got["residual/massive_channels"], [2])


def test_streams_without_a_typical_size() -> None:
    zeros = measured(residual.RESIDUAL, [{"residual": torch.zeros(2, 3, 8)}])
    assert zeros["residual/rms"] == zeros["residual/absmax"] == [0]
    assert np.isnan(zeros["residual/top_ratio"]).all()
    assert np.isnan(zeros["residual/massive_channels"]).all()
    spoiled = measured(residual.RESIDUAL, [{"residual": torch.full((1, 2, 3), torch.nan)}])
    assert np.isnan(spoiled["residual/absmax"]).all()
    assert np.isnan(spoiled["residual/massive_channels"]).all()
    one = measured(residual.RESIDUAL, [{"residual": torch.tensor([[[-2.0]]])}])
    assert one["residual/top_ratio"] == [1]
    assert one["residual/top_channels"] == [0]


def test_no_stream_no_numbers() -> None:
    assert measured(residual.RESIDUAL, [{"q": torch.ones(1, 1, 1, 1)}]) == {}
    assert measured(PROBE, [{"logits": torch.ones(2, 3)}]) == {}
