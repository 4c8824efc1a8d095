"""Which key of a checkpoint is which parameter, however the two are nested; and what cannot be told is not guessed."""

from __future__ import annotations

import pytest

from foreshock.parameter_keys import Keys

NAMES = ["model.layers.0.q.weight", "model.layers.1.q.weight", "lm_head.weight"]


def asked(keys: list[str], names: list[str] = NAMES, prefix: str = "") -> tuple[dict[str, str], dict[str, str]]:
    return Keys(keys, prefix=prefix).find(dict.fromkeys(names, ()))


@pytest.mark.parametrize(
    "written",
    [
        lambda name: name,
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("layers.0", "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module"),
        lambda name: f"state.model.module._orig_mod.{name}",
        lambda name: f"model.{name}",
    ],
    ids=["as it is", "DDP", "compiled", "checkpointed and sharded", "below a word of a trainer", "below the same word"],
)
def test_the_same_parameters_nested_otherwise(written) -> None:
    keys = [*map(written, NAMES), "optimizer.state.0.exp_avg", "step"]
    found, reasons = asked(keys)
    assert found == {name: written(name) for name in NAMES}
    assert reasons == {}


def test_a_model_that_has_a_word_in_front() -> None:
    found, reasons = asked(["layers.0.q.weight", "layers.1.q.weight"])
    assert found == {name: name.removeprefix("model.") for name in NAMES[:2]}
    assert list(reasons) == ["lm_head.weight"]


def test_the_whole_name_comes_before_its_end() -> None:
    found, _ = asked(["layers.0.q.weight", "ema.layers.0.q.weight"], ["layers.0.q.weight"])
    assert found == {"layers.0.q.weight": "layers.0.q.weight"}


def test_two_that_fit_are_told_and_the_prefix_decides() -> None:
    keys = ["a.layers.0.q.weight", "b.layers.0.q.weight"]
    found, reasons = asked(keys, ["layers.0.q.weight"])
    assert found == {}
    assert reasons == {
        "layers.0.q.weight": f"layers.0.q.weight could be any of {', '.join(keys)}; say which with --prefix"
    }
    assert asked(keys, ["layers.0.q.weight"], "b")[0] == {"layers.0.q.weight": "b.layers.0.q.weight"}
    assert asked(keys, ["layers.0.q.weight"], "b.")[0] == {"layers.0.q.weight": "b.layers.0.q.weight"}


def test_one_key_is_one_parameter() -> None:
    """The encoder alone was saved: its layers are not the decoder's."""
    found, reasons = asked(["layers.0.q.weight"], ["encoder.layers.0.q.weight", "decoder.layers.0.q.weight"])
    assert found == {}
    assert all("could be any of" in reason for reason in reasons.values())
    assert len(reasons) == 2


def test_a_single_word_is_no_name() -> None:
    assert asked(["weight"], ["layers.0.q.weight"])[0] == {}
    assert asked(["layers.0.q.weight"], ["weight"])[0] == {}
    assert asked(["weight"], ["weight"])[0] == {"weight": "weight"}


def test_shared_parameters_under_any_of_their_names() -> None:
    found, _ = Keys(["b.weight"]).find({"a.weight": ("b.weight", "c.weight")})
    assert found == {"a.weight": "b.weight"}


def test_names_that_a_library_changes_when_it_saves() -> None:
    def renamed(key: str) -> tuple[str, bool]:
        return key.replace("block.gate", "mlp.gate").replace("wqk", "qk"), "wqk" in key

    keys = Keys(["layers.0.block.gate.weight", "layers.0.wqk.weight"], renamed)
    found, reasons = keys.find({"layers.0.mlp.gate.weight": (), "layers.0.qk.weight": ()})
    assert found == {"layers.0.mlp.gate.weight": "layers.0.block.gate.weight"}
    assert "layers.0.qk.weight is stored otherwise (layers.0.wqk.weight)" in reasons["layers.0.qk.weight"]


def test_what_is_missing_is_told_with_what_is_spelled_alike() -> None:
    _, reasons = asked(["layers.0.query.weight"], ["layers.0.queries.weight"])
    [told] = reasons.values()
    assert told == "layers.0.queries.weight is not in the checkpoint (did you mean layers.0.query.weight?)"
    assert "below x" in asked([], ["a.b"], "x")[1]["a.b"]
