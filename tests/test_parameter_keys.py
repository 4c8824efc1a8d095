"""Which key of a checkpoint is which parameter, however the two are nested; and what cannot be told is not guessed."""

from __future__ import annotations

import pytest

from foreshock.parameter_keys import Keys

NAMES = ["model.layers.0.q.weight", "model.layers.1.q.weight", "lm_head.weight"]


def asked(
    keys: list[str], names: list[str] = NAMES, prefix: str = "", words: tuple[str, ...] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    return Keys(keys, prefix=prefix, words=words).find(dict.fromkeys(names, ()))


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
    keys = ["layers.0.q.weight", "layers.1.q.weight"]
    found, reasons = asked(keys, NAMES[:2])
    assert found == {name: name.removeprefix("model.") for name in NAMES[:2]}
    assert reasons == {}
    for below in ("state_dict.", "state_dict.module."):
        assert asked([below + key for key in keys], NAMES[:2])[0] == {f"model.{key}": below + key for key in keys}
    names = [f"transformer.{key}" for key in keys]  # what a model calls its base, it says itself
    assert asked(keys, names)[0] == {}
    assert asked(keys, names, words=("transformer",))[0] == dict(zip(names, keys, strict=True))


@pytest.mark.parametrize("below", ["vision_tower.", "ema.", "student.model.", "model.language_model."])
def test_what_ends_alike_is_not_taken_for_it(below: str) -> None:
    """Another tower, an average: the parameter itself was saved under a new name, or not at all."""
    keys = [f"{below}{name}" for name in NAMES]
    for others in ([], ["model.layers.0.wq.weight"]):
        found, reasons = asked([*keys, *others])
        assert found == {}
        assert list(reasons) == NAMES
        assert f"of what ends alike ({keys[0]}) nothing is taken" in reasons[NAMES[0]]
    assert asked(keys, prefix=below)[0] == dict(zip(NAMES, keys, strict=True))


@pytest.mark.parametrize("key", ["q.weight", "0.q.weight", "layers.0.q.weight"])
def test_the_end_of_a_name_is_not_taken_for_it(key: str) -> None:
    found, reasons = asked([key], ["model.decoder.layers.0.q.weight"])
    assert found == {}
    assert f"({key}) nothing is taken" in reasons["model.decoder.layers.0.q.weight"]


def test_a_change_of_prefix_is_of_all_parameters_or_of_none() -> None:
    keys = [f"model.{name}" for name in NAMES]
    found, reasons = asked(keys[:2])
    assert found == {}
    assert list(reasons) == NAMES
    found, reasons = asked([NAMES[0], *keys])  # as they are, one is there; below model all are
    assert found == dict(zip(NAMES, keys, strict=True))
    found, reasons = asked([NAMES[0], *keys[:2]])
    assert found == {NAMES[0]: NAMES[0]}
    assert list(reasons) == NAMES[1:]


def test_the_whole_name_comes_before_any_other() -> None:
    for other in ("ema.layers.0.q.weight", "model.layers.0.q.weight", "module.layers.0.q.weight"):
        found, _ = asked(["layers.0.q.weight", other], ["layers.0.q.weight"])
        assert found == {"layers.0.q.weight": "layers.0.q.weight"}


def test_two_that_fit_are_told_and_the_prefix_decides() -> None:
    keys = ["app.layers.0.q.weight", "state.layers.0.q.weight"]
    found, reasons = asked(keys, ["layers.0.q.weight"])
    assert found == {}
    assert reasons == {
        "layers.0.q.weight": f"layers.0.q.weight could be any of {', '.join(keys)}; say which with --prefix"
    }
    for prefix in ("state", "state."):
        assert asked(keys, ["layers.0.q.weight"], prefix)[0] == {"layers.0.q.weight": keys[1]}
    assert asked(["state_of.q.weight"], ["q.weight"], "state")[0] == {}


def test_one_key_is_one_parameter() -> None:
    names = ["layers.0.q.weight", "layers.0.module.q.weight"]
    found, reasons = asked(["layers._orig_mod.0.q.weight"], names)
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
