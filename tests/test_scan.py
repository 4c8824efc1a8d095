"""Saved weights read as a watch reads them: the same numbers, from every format, of the needed tensors alone."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop import Layer, Loop
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.nn import functional

import foreshock
from foreshock import Watch, cli, models, scanning
from foreshock.errors import CheckpointError, ConfigError
from foreshock.monitors.weights import router_statistics
from foreshock.scan_tables import shown, told
from foreshock.scanning import Scan, scan

transformers = pytest.importorskip("transformers")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 4, 2, 8, 2
VALUES = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 64,
}
SPECTRA = [
    f"attention/{of}_{name}"
    for of in ("delta2", "delta3", "dwq", "dwk")
    for name in ("norm", "stable_rank", "entropy", "effective_rank")
]


_captured: dict[tuple[str, ...], Any] = {}


@pytest.fixture(autouse=True)
def _capture_each_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capturing takes a second; the same config and callable give the same module and sites."""

    def captured(target: str, args: Sequence[str]) -> Any:
        key = (Path(target).read_text(), *args)
        if key not in _captured:
            _captured[key] = models.captured(target, args)
        return _captured[key]

    monkeypatch.setattr(scanning, "captured", captured)


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**VALUES, architectures=["LlamaForCausalLM"]))


def mixtral() -> Any:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**VALUES, num_local_experts=4, num_experts_per_tok=2)
    )


def moved(model: Any, size: float = 1e-3) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def pretrained(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def sharded(model: Any, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="10KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def pickled(model: Any, path: Path) -> Path:
    path.mkdir()
    state = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    trained = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "step": 3, "args": {"lr": 1e-3}}
    torch.save({"model": state, **trained}, path / "model.pt")
    model.config.save_pretrained(path)
    return path / "model.pt"


def distributed(model: Any, path: Path) -> Path:
    state = {"model": model.state_dict(), "ema": torch.zeros(5), "step": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process, which is what is asked for
        dcp.save(state, checkpoint_id=path, no_dist=True)
    model.config.save_pretrained(path)
    return path


FORMATS = [pretrained, sharded, pickled, distributed]
Save = Callable[[Any, Path], Path]


def values(found: Scan) -> dict[tuple[str, str, int], np.ndarray[Any, Any]]:
    return {
        (scanned.site.id, metric, place): numbers
        for scanned in found.sites
        for states in (scanned.standing, scanned.changes)
        for place, state in enumerate(states)
        for metric, numbers in state.items()
    }


def test_the_numbers_are_those_that_the_watch_stores(tmp_path: Path) -> None:
    """Spectra over ten steps and routers, of the weights as they were saved between the steps."""
    states: list[dict[str, Tensor]] = []
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())

    def keep(training: Loop, step: int) -> None:
        """What stands before ``step`` is what the step before it left."""
        states.append({name: value.clone() for name, value in model.state_dict().items()})

    with Watch(every=1, inner="eager", windows=(10,), detectors=[]).bind(model) as watch:
        Loop(watch.backend, model).run(keep, steps=24)
    compared = 0
    for site in watch.sites:
        metrics = SPECTRA if site.kind == "attention" else list(router_statistics(np.eye(3)))
        for metric in metrics:
            steps, stored = watch.series(metric, site.id)
            for step, expected in zip(steps.tolist(), stored, strict=True):
                if step in (10, 19, 20):
                    found = scanned(tmp_path, model, states, step)
                    own = found[site.id, metric, 0 if site.kind == "attention" else 1]
                    np.testing.assert_allclose(own, np.atleast_1d(expected), rtol=1e-5, err_msg=f"{site.id} {metric}")
                    compared += 1
    assert compared == 3 * 16 + 3 * 2 * 6  # attentions take turns: one at steps 10 and 20, one at 19


_scans: dict[int, Any] = {}


def scanned(
    folder: Path, model: nn.Module, states: list[dict[str, Tensor]], step: int
) -> dict[tuple[str, str, int], Any]:
    """A scan of the weights that ``step`` left and those of ten steps before."""
    if step not in _scans:
        for at in (step - 10, step):
            torch.save(states[at + 1], folder / f"step-{at}.pt")
        paths = [folder / f"step-{at}.pt" for at in (step - 10, step)]
        _scans[step] = values(scan(paths, (model, (torch.randn(2, 5, 8),))))
    return _scans[step]


@pytest.mark.parametrize("save", FORMATS)
def test_every_format_says_the_same(tmp_path: Path, save: Save) -> None:
    before, after = save(llama(), tmp_path / "a"), save(moved(llama()), tmp_path / "b")
    found = scan([before, after])
    expected = scan([pretrained(llama(), tmp_path / "c"), pretrained(moved(llama()), tmp_path / "d")])
    assert values(found).keys() == values(expected).keys()
    for key, own in values(found).items():
        np.testing.assert_array_equal(own, values(expected)[key])
    assert found.left_out == {}
    for one in found.checkpoints:  # and no more was read than is needed
        assert one.read_keys == 2 * LAYERS
        assert one.read_bytes == 4 * LAYERS * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM


def wide() -> Any:
    """The same attentions, beside 16 MB that nothing here needs."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**VALUES | {"vocab_size": 1 << 16}, architectures=["LlamaForCausalLM"])
    return transformers.LlamaForCausalLM(config)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not say what a process reads")
@pytest.mark.parametrize("save", FORMATS)
def test_little_more_than_the_needed_bytes_is_read_from_the_disk(tmp_path: Path, save: Save) -> None:
    """What read calls bring, and the pages of mapped files that were touched: by the kernel's own count."""
    path = save(wide(), tmp_path / "a")
    files = [file for file in (tmp_path / "a").iterdir() if file.suffix in (".safetensors", ".pt", ".distcp")]
    assert sum(file.stat().st_size for file in files) > 16e6
    counts: list[tuple[int, int]] = []
    for _ in range(2):  # the first imports what reads
        before = called()
        scan(path, progress=lambda done, of: counts.append((called(), mapped(tmp_path))) if done == of else None)
    read, touched = counts[1][0] - before, counts[1][1]
    assert 4 * LAYERS * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM <= read + touched < 1e6


def called() -> int:
    """Bytes that this process has had from calls that read."""
    return int(re.findall(r"^rchar: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[0])


def mapped(folder: Path) -> int:
    """Bytes of the pages in memory of the files that are mapped from below ``folder``."""
    entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    ours = [entry for entry in entries if f" {folder}/" in entry.partition("\n")[0]]
    return sum(1024 * int(re.findall(r"^Rss: +(\d+) kB", entry, re.MULTILINE)[0]) for entry in ours)


def test_files_of_other_tensors_are_not_even_opened(tmp_path: Path) -> None:
    path = sharded(llama(), tmp_path / "a")
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for key, file in index.items() if "q_proj" in key or "k_proj" in key}
    gone = set(index.values()) - needed
    assert gone
    for file in gone:
        (path / file).unlink()
    assert len(scan(path).sites) == LAYERS


def test_the_spectrum_as_it_stands_is_that_of_the_product(tmp_path: Path) -> None:
    model = moved(llama(), 0.1)
    found = scan(pretrained(model, tmp_path / "a"))
    for layer, scanned in enumerate(found.sites):
        attention = model.model.layers[layer].self_attn
        for head in range(HEADS):
            q = attention.q_proj.weight[head * HEAD_DIM :][:HEAD_DIM].double()
            group = head * KV_HEADS // HEADS
            k = attention.k_proj.weight[group * HEAD_DIM :][:HEAD_DIM].double()
            s = torch.linalg.svdvals(q.T @ k).detach()[:HEAD_DIM]
            p = s.square() / s.square().sum()
            entropy = -(p * p.log()).sum()
            expected = {
                "norm": s.square().sum().sqrt(),
                "stable_rank": s.square().sum() / s.square().max(),
                "entropy": entropy,
                "effective_rank": entropy.exp(),
            }
            for name, value in expected.items():
                own = scanned.standing[0][f"attention/qk_{name}"][head]
                assert own == pytest.approx(float(value), rel=1e-9), name


def test_weights_are_found_where_transformers_saves_them_under_other_names(tmp_path: Path) -> None:
    model = mixtral()
    path = pretrained(model, tmp_path / "a")
    named = json.loads(_header(path / "model.safetensors"))
    assert not any(name in named for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight"))
    found = scan(path)
    routers = [scanned for scanned in found.sites if scanned.site.kind == "router"]
    assert (len(found.sites), len(routers), found.left_out) == (2 * LAYERS, LAYERS, {})
    for layer, scanned in enumerate(routers):
        expected = router_statistics(model.model.layers[layer].mlp.gate.weight.detach().double().numpy())
        assert {metric: float(x[0]) for metric, x in scanned.standing[0].items()} == pytest.approx(expected)


def _header(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def test_bfloat16_is_read_as_it_is(tmp_path: Path) -> None:
    found = scan(
        [pretrained(llama().bfloat16(), tmp_path / "a"), pretrained(moved(llama()).bfloat16(), tmp_path / "b")]
    )
    assert found.checkpoints[0].read_bytes == 2 * LAYERS * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM
    exact = scan([pretrained(llama(), tmp_path / "c"), pretrained(moved(llama()), tmp_path / "d")])
    for one, other in zip(found.sites, exact.sites, strict=True):
        for metric in ("attention/qk_norm", "attention/qk_stable_rank"):
            np.testing.assert_allclose(one.standing[0][metric], other.standing[0][metric], rtol=0.02)


# -- names -------------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, state: dict[str, Any], name: str = "x.pt") -> Path:
    llama().config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / name)
    return tmp_path / name


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


# -- the command -------------------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["foreshock", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return int(leaving.value.code or 0)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = pretrained(mixtral(), tmp_path / "step-10"), pretrained(moved(mixtral()), tmp_path / "step-20")
    assert call(monkeypatch, "scan", before, after) == 0
    printed = capsys.readouterr().out
    assert "what moved of Wq Wk^T, the largest share first" in printed
    assert "Routers, the most similar experts first" in printed
    assert call(monkeypatch, "scan", before) == 0
    assert "the lowest stable rank first" in capsys.readouterr().out
    assert call(monkeypatch, "scan", before, after, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in plain["checkpoints"]] == [10, 20]
    found = scan([before, after])
    expected = found.sites[0].changes[0]["attention/delta2_norm"].tolist()
    assert plain["sites"][0]["changes"][0]["attention/delta2_norm"] == expected
    assert call(monkeypatch, "scan", tmp_path / "nowhere") == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_the_worst_heads_come_first_and_the_rest_is_named(tmp_path: Path) -> None:
    model = moved(llama(), 1e-4)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[2 * HEAD_DIM : 3 * HEAD_DIM] *= 1.5
    found = foreshock.scan([pretrained(llama(), tmp_path / "a"), pretrained(model, tmp_path / "b")])
    [table] = shown(found, 3)
    assert table.rows[0][:2] == ["attention:model.layers.1.self_attn", "2"]
    assert float(table.rows[0][2]) == pytest.approx(0.5, rel=0.05)
    assert (len(table.rows), table.of) == (3, LAYERS * HEADS)


def test_a_head_that_is_not_finite_ends_with_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0] = torch.inf
    assert call(monkeypatch, "scan", pretrained(model, tmp_path / "a")) == 1
    assert "holds 32 entries that are not finite" in capsys.readouterr().out
