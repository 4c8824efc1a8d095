"""The rounding-bias law on a small trained model: one-sided rounding is found, unbiased rounding is not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from foreshock.errors import ConfigError
from foreshock.monitors import BiasLaw, floor
from foreshock.monitors.detectors import LawTest
from foreshock.monitors.laws import MARGIN, UNIT_ROUNDOFF, pooled_ratio
from foreshock.records import Reading, Site

_spec = importlib.util.spec_from_file_location("small_lm", Path(__file__).with_name("small_lm.py"))
small_lm = importlib.util.module_from_spec(_spec)
sys.modules["small_lm"] = small_lm
_spec.loader.exec_module(small_lm)

STEPS = 30


@pytest.fixture(scope="module")
def trained():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text, generator = small_lm.corpus(), torch.Generator().manual_seed(1)
    model = small_lm.SmallLM()
    small_lm.train(model, 300, text, generator)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def measure(rounding):
        """Readings, derived readings and law findings of 30 more steps under one rounding."""
        model.load_state_dict(start)
        torch.manual_seed(2)
        sites = {
            f"a{i}": Site(f"a{i}", f"layer {i}", "attention", "test", heads=4, kv_heads=4, dtype="bfloat16")
            for i in (0, 1)
        }
        law, test = BiasLaw(window=STEPS), LawTest()
        derived, findings = [], []

        def after(step):
            nonlocal derived
            readings = []
            for site, block in zip(sites, model.blocks, strict=True):
                num, den = block.bias_sums()
                values = {"law/bias_num": num, "law/bias_den": den, "law/key_shift": block.key_shift()}
                readings += [Reading(name, site, value.double().numpy()) for name, value in values.items()]
            derived = law.update(step, readings, sites)
            findings.extend(test.update(step, readings + derived, sites))

        for block in model.blocks:
            block.rounding = rounding
        small_lm.train(model, STEPS, text, torch.Generator().manual_seed(3), after)
        return {(r.metric, r.site): r.values for r in derived}, findings

    yield measure
    torch.set_num_threads(threads)


# The sizes are those of a one-sided last bit: 0.72 of the unit roundoff 2^-(bits + 1).
@pytest.mark.parametrize(
    ("rounding", "sign", "bits"),
    [
        ((7, "away", 7, "nearest"), +1, 7),
        ((7, "truncate", 7, "nearest"), -1, 7),
        ((3, "away", 7, "nearest"), +1, 3),
        ((3, "truncate", 7, "nearest"), -1, 3),
        ((1, "away", 7, "nearest"), +1, 1),
        ((1, "truncate", 7, "nearest"), -1, 1),
    ],
)
def test_one_sided_rounding_is_found_with_its_sign_and_size(trained, rounding, sign, bits) -> None:
    derived, findings = trained(rounding)
    for site in ("a0", "a1"):
        (t,) = derived["law/bias_site_t", site]
        (c,) = derived["law/bias_site", site]
        assert t * sign > 10
        assert c * sign == pytest.approx(0.72 * 2 ** -(bits + 1), rel=0.35)
        assert (derived["law/bias_t", site] * sign > 6).all()
    assert {f.site for f in findings if f.metric.startswith("law/bias")} == {"a0", "a1"}


@pytest.mark.parametrize(
    "rounding",
    [(bits, mode, 7, "nearest") for bits in (7, 3, 1) for mode in ("nearest", "stochastic")]
    + [(23, "nearest", 23, "nearest")],
)
def test_unbiased_rounding_is_silent(trained, rounding) -> None:
    derived, findings = trained(rounding)
    for site in ("a0", "a1"):
        assert abs(derived["law/bias_site_t", site][0]) < 4
        assert (np.abs(derived["law/bias_t", site]) < 5).all()
    if rounding[0] >= 7:  # coarser than bfloat16 is no bias, but breaks the shift law of a bfloat16 kernel
        assert findings == []


def test_a_gross_bias_is_named_at_the_first_step(trained) -> None:
    _, findings = trained((1, "away", 7, "nearest"))
    assert {f.metric for f in findings if f.step == 0} >= {"law/key_shift", "law/bias_site"}


@pytest.mark.parametrize("law", MARGIN)
def test_floors_grow_with_the_roundoff(law: str) -> None:
    assert floor(law, "float32") < floor(law, "float16") < floor(law, "bfloat16")
    assert floor(law, "bfloat16") < 0.08  # three mantissa bits give 0.08 and more
    assert all(floor(law, dtype) > 0 for dtype in UNIT_ROUNDOFF)


def test_an_unknown_law_or_dtype_is_an_error_with_names() -> None:
    with pytest.raises(ConfigError, match="key_shift"):
        floor("token_count", "bfloat16")
    with pytest.raises(ConfigError, match="float16"):
        floor("bias", "int8")


def test_one_overwhelming_sample_is_no_certainty() -> None:
    rng = np.random.default_rng(0)
    den = np.full((20, 1), 1.0)
    num = 0.1 * rng.standard_normal((20, 1))
    den[3], num[3] = 1e6, 3e5
    ratio, t = pooled_ratio(num, den)
    assert ratio[0] == pytest.approx(0.3, rel=1e-3)
    assert abs(t[0]) < 15  # the spread of the residuals alone would say 1e6


def test_bias_needs_eight_samples_skips_non_finite_ones_and_resumes() -> None:
    def readings(step: int) -> list[Reading]:
        num = np.array([1.0, 2.0]) + step % 3
        return [
            Reading("law/bias_num", "a", num if step != 4 else num * np.nan),
            Reading("law/bias_den", "a", np.full(2, 10.0)),
        ]

    law, resumed = BiasLaw(), BiasLaw()
    spoke = [step for step in range(12) if law.update(step, readings(step), {})]
    assert spoke == [8, 9, 10, 11]
    resumed.load_state_dict(law.state_dict())
    for left, right in zip(law.update(12, readings(12), {}), resumed.update(12, readings(12), {}), strict=True):
        assert left.metric == right.metric
        np.testing.assert_array_equal(left.values, right.values)
