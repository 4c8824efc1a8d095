"""Saved weights read as a watch reads them: the same numbers, from every format, of the needed tensors alone."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop import Layer, Loop
from saving import (
    FORMATS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VALUES,
    Save,
    capture_each_model_once,
    llama,
    mixtral,
    moved,
    pretrained,
    sharded,
    values,
)
from torch import Tensor, nn

import foreshock
from foreshock import Watch, cli
from foreshock.monitors.weights import router_statistics
from foreshock.scan_tables import shown
from foreshock.scanning import scan

transformers = pytest.importorskip("transformers")

SPECTRA = [
    f"attention/{of}_{name}"
    for of in ("delta2", "delta3", "dwq", "dwk")
    for name in ("norm", "stable_rank", "entropy", "effective_rank")
]
_once = pytest.fixture(autouse=True)(capture_each_model_once)


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
