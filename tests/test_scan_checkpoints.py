"""Keys that are not the model's names, and checkpoints that are of another model, damaged or no checkpoint at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saving import (
    FORMATS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    Save,
    capture_each_model_once,
    distributed,
    llama,
    moved,
    pretrained,
    saved,
    sharded,
    values,
)
from torch import Tensor, nn
from torch.nn import functional

from foreshock.errors import CheckpointError, ConfigError
from foreshock.scan_tables import shown, told
from foreshock.scanning import scan

transformers = pytest.importorskip("transformers")
_once = pytest.fixture(autouse=True)(capture_each_model_once)


def test_a_base_model_without_the_prefix(tmp_path: Path) -> None:
    path = saved(tmp_path, llama().model.state_dict())
    assert len(scan(path).sites) == LAYERS


def test_a_base_model_whose_name_only_the_model_knows(tmp_path: Path) -> None:
    """GPT-2 calls its base "transformer"; what the hub has of it was saved without that word."""
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": HIDDEN, "n_positions": 64, "vocab_size": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, architectures=["GPT2LMHeadModel"]))
    path = pretrained(model, tmp_path / "a")
    torch.save(model.transformer.state_dict(), path / "base.pt")
    whole, base = scan(path / "model.safetensors"), scan(path / "base.pt")
    assert values(whole).keys() == values(base).keys()
    assert whole.checkpoints[0].other_keys == {}
    assert base.checkpoints[0].other_keys["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"


def test_two_models_in_one_checkpoint_are_told_apart_by_the_prefix(tmp_path: Path) -> None:
    state = {"student": llama().state_dict(), "teacher": moved(llama()).state_dict()}
    path = saved(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"of what ends alike \(student\..*teacher\..*nothing is taken.*--prefix"):
        scan(path)
    one, other = (values(scan(path, prefix=prefix)) for prefix in ("student.", "teacher"))
    assert one.keys() == other.keys()
    assert not np.array_equal(*(found[next(iter(one))] for found in (one, other)))


def test_a_tower_that_ends_alike_is_not_the_model(tmp_path: Path) -> None:
    state = {key.replace("q_proj", "query"): value for key, value in llama().state_dict().items()}
    state |= {f"vision_tower.{key}": value for key, value in llama().state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"q_proj.weight is not in the checkpoint; of what ends alike \(vision_tower"
    ):
        scan(saved(tmp_path, state))


@pytest.mark.parametrize("below", ["", "model.", "module._orig_mod."])
def test_keys_that_are_not_the_models_names_are_shown(tmp_path: Path, below: str) -> None:
    found = scan(saved(tmp_path, {f"{below}{key}": value for key, value in llama().state_dict().items()}))
    names = [f"model.layers.{layer}.self_attn.{which}_proj.weight" for layer in range(LAYERS) for which in "qk"]
    expected = {name: f"{below}{name}" for name in names if below}
    assert found.to_json()["checkpoints"][0]["other_keys"] == expected
    tables = [table for table in shown(found) if "other names" in table.title]
    end = "model.layers.*.self_attn.{}_proj.weight".format
    rows = [[str(tmp_path / "x.pt"), end(which), below + end(which), str(LAYERS)] for which in "qk"]
    assert [table.rows for table in tables] == [rows] * bool(below)


def test_what_is_missing_is_left_out_with_the_reason(tmp_path: Path) -> None:
    state = llama().state_dict()
    state["model.layers.1.self_attn.q_projection.weight"] = state.pop("model.layers.1.self_attn.q_proj.weight")
    found = scan(saved(tmp_path, state))
    assert [scanned.site.id for scanned in found.sites] == ["attention:model.layers.0.self_attn"]
    [(site, reason)] = found.left_out.items()
    assert site == "attention:model.layers.1.self_attn"
    assert "model.layers.1.self_attn.q_proj.weight is not in the checkpoint (did you mean" in reason
    with pytest.raises(CheckpointError, match=r"nothing can be read: .*q_proj.weight is not in the checkpoint"):
        scan(saved(tmp_path, {"a": torch.zeros(2), "b": {"c": torch.zeros(2)}}))


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    state = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in llama().state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"of another model: .*q_proj.weight is \[64, 32\], the model's .*\[32, 32\]"
    ):
        scan(saved(tmp_path, state))


class Own(nn.Module):
    """An attention of two layers that share their weights, and a router beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 24, bias=False)
        self.second = nn.Linear(8, 24, bias=False)
        self.second.weight = self.first.weight
        self.gate = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in layer(x).chunk(3, -1))
            x = x + functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        return x + torch.zeros_like(self.gate(x)).scatter(-1, chosen, weights).sum(-1, keepdim=True)


def test_shared_weights_under_the_name_that_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Own()
    state = model.state_dict()
    del state["first.weight"]
    path = saved(tmp_path, state)
    found = scan(path, (model, (torch.randn(2, 5, 8),)))
    assert {scanned.site.kind for scanned in found.sites} == {"attention", "router"}
    assert found.left_out == {}


# -- what is broken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", FORMATS)
def test_weights_that_are_not_finite_are_reported_head_by_head(tmp_path: Path, save: Save) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[HEAD_DIM, :3] = torch.nan  # of head 1
    found = scan([save(llama(), tmp_path / "a"), save(model, tmp_path / "b")])
    assert [len(one.not_finite) for one in found.checkpoints] == [0, 1]
    assert found.checkpoints[1].not_finite == {"model.layers.1.self_attn.q_proj.weight": 3}
    table = next(shown(found, 3))
    assert table.rows[0][:3] == ["attention:model.layers.1.self_attn", "1", "nan"]
    assert [row[2] for row in table.rows[1:]] != ["nan", "nan"]
    own = found.sites[1].changes[0]["attention/delta2_norm"]
    assert np.isnan(own).tolist() == [False, True, False, False]
    assert any("holds 3 entries that are not finite" in line for line in told(found))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00" * 5000)


@pytest.mark.parametrize("damage", [cut, garbage])
@pytest.mark.parametrize("save", FORMATS)
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path, save: Save, damage: Callable[[Path], None]) -> None:
    path = save(moved(llama(), 0.1), tmp_path / "a")
    for file in [path] if path.is_file() else path.iterdir():
        if file.suffix in (".safetensors", ".distcp", ".pt"):
            damage(file)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        scan(path)


def test_a_lost_shard_and_a_broken_index(tmp_path: Path) -> None:
    path = sharded(llama(), tmp_path / "a")
    index = path / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=f"reading .*{file}: no whole checkpoint"):
        scan(path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index.json: no whole checkpoint \(KeyError: 'weight_map'\)"):
        scan(path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


def test_nothing_that_a_file_holds_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pickle

    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        scan(saved(tmp_path, {"model": llama().state_dict(), "more": Evil()}))
    folder = distributed(llama(), tmp_path / "dcp")
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"it asks for builtins.print"):
        scan(folder)
    assert "it ran" not in capsys.readouterr().out


def test_files_from_before_zip_are_read_too(tmp_path: Path) -> None:
    path = saved(tmp_path, llama().state_dict())
    torch.save(llama().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert values(scan(tmp_path / "old.pt")).keys() == values(scan(path)).keys()


def test_without_safetensors_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pretrained(llama(), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: .*not installed; pip install 'foreshock\[safetensors\]'"
    ):
        scan(path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in [("nowhere", "no such file"), ("empty", "holds none of")]:
        with pytest.raises(CheckpointError, match=message):
            scan(tmp_path / path, "config.json")
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several files \(a.pt, b.pt\); name one"):
        scan(tmp_path, "config.json")
    with pytest.raises(ConfigError, match="got none"):
        scan([])
    with pytest.raises(ConfigError, match=r"no config.json beside it; give its model with --model"):
        scan(tmp_path / "a.pt")


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    state = {key: value.to(torch.float8_e4m3fn) for key, value in llama().state_dict().items()}
    with pytest.raises(CheckpointError, match="stored as float8_e4m3fn, quantized"):
        scan(saved(tmp_path, state))
