"""The command line: what it prints, what it leaves on disk, and one line for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from commands import call

from foreshock import cli, progress
from foreshock.records import Alarm, Coverage, Reading, Site, SiteStatus
from foreshock.run import Outcome, launch
from foreshock.store import RunStore

TOY = """
import sys
import torch, neighbour
import torch.nn.functional as F

class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))
    def forward(self, x):
        q, k, v = (f(x).view(2, 6, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

model = Toy()
if "method" in sys.argv:
    model.compile(backend="inductor")
elif "decorator" in sys.argv:
    forward = torch.compile(fullgraph=True)(model)
elif "other" in sys.argv:
    model = torch.compile(model, backend="eager")
elif "eager" in sys.argv:
    pass
else:
    model = torch.compile(model)
if "train" in sys.argv:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.randn(2, 6, 8)).square().mean().backward()
        optimizer.step()
print("arguments", sys.argv[1:], __name__)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every script here is watched as always, but compiled by nothing slow."""
    monkeypatch.setenv("FORESHOCK_INNER", "aot_eager")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "neighbour.py").write_text("")
    path = tmp_path / "scripts" / "toy.py"
    path.write_text(TOY)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = RunStore(tmp_path / "one")
    store.write(1, [Reading("run/loss", None, np.array([1.0]))])
    store.alarm(Alarm(9, 7, "a", "law/euler", float("nan"), "< 1", "critical", "bad", ("one",), "it\nis off", head=2))
    store.coverage(Coverage((SiteStatus(Site("a", "layers.0", "attention", "sdpa"), 1, 1, {}),)))
    store.close()
    return tmp_path / "one"


def test_report(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "report", folder) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert call(monkeypatch, "report", folder, "-o", folder / "other.html") == 0
    assert "Not healthy since about step 7" in (folder / "other.html").read_text()


def test_alarms(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "alarms", folder) == 0
    assert capsys.readouterr().out == "step 9 (since about step 7) critical: it is off\n"
    assert call(monkeypatch, "alarms", folder, "--json") == 0
    [alarm] = json.loads(capsys.readouterr().out)
    assert (alarm["value"], alarm["head"]) == ("nan", 2)


def test_metrics(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "metrics", "--json") == 0
    costs = {metric["name"]: metric["cost"] for metric in json.loads(capsys.readouterr().out)}
    expected = {"law/euler": "gradients", "router/entropy": "cheap", "attention/lse": "rows", "run/loss": "free"}
    assert costs.items() >= expected.items()
    assert call(monkeypatch, "metrics") == 0
    table = capsys.readouterr().out
    assert "law/euler" in table
    assert "[F]" in table
    assert "rows: a few sampled rows of the attention recomputed" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "opening the run nowhere: there is no such folder"),
        (["alarms", "."], "holds no run.sqlite"),
        (["run", "nowhere.py"], "running nowhere.py: there is no such file"),
        (["sites", "nowhere.py"], "running nowhere.py: there is no such file"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("foreshock: ")
    assert message in line


def test_wrong_settings_stop_it_before_the_script(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORESHOCK_EVRY", "1")
    assert call(monkeypatch, "run", script) == 2
    printed = capsys.readouterr()
    assert "FORESHOCK_EVRY" in printed.err
    assert printed.out == ""


def test_run_leaves_the_script_its_arguments_and_keeps_a_run(script: Path, tmp_path: Path) -> None:
    """The console's way, in a process of its own."""
    command = [sys.executable, "-m", "foreshock.run", "--every", "1", "--run", str(tmp_path / "kept"), str(script)]
    done = subprocess.run([*command, "--run", "x", "train", "--", "y"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "arguments ['--run', 'x', 'train', '--', 'y'] __main__" in done.stdout
    summary = [line for line in done.stderr.splitlines() if line.startswith("foreshock: ")]
    assert len(summary) == 2
    assert "no alarm at 1 site in 3 steps" in summary[0]
    assert str(tmp_path / "kept") in summary[1]
    shown = subprocess.run(
        [sys.executable, "-c", f"import foreshock; print(foreshock.open_run({str(tmp_path / 'kept')!r}).metrics())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "law/key_shift" in shown.stdout


@pytest.mark.parametrize(
    ("ending", "code", "printed"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("import sys; sys.exit('leaving')", 1, "leaving\n"),
        ("", 0, ""),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
        ("1 +", 1, "SyntaxError"),
    ],
)
def test_the_script_ends_as_it_would_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, code: int, printed: str
) -> None:
    path = tmp_path / "ending.py"
    path.write_text(ending)
    before = torch.compile, sys.argv, sys.path
    assert launch(str(path), []).code == code
    assert printed in capsys.readouterr().err
    assert (torch.compile, sys.argv, sys.path) == before


def test_a_traceback_begins_in_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ending.py"
    path.write_text("def fail():\n    raise ValueError('mine')\nfail()\n")
    assert launch(str(path), []).code == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split('"')[1] for line in lines if line.startswith("  File")] == [str(path)] * 2
    assert lines[-1] == "ValueError: mine"


@pytest.mark.parametrize("way", ["plain", "method", "decorator"])
def test_every_way_to_compile_is_watched(script: Path, way: str) -> None:
    assert launch(str(script), [way]).watch is not None


def test_another_backend_is_left_alone_and_said(script: Path) -> None:
    outcome = launch(str(script), ["other"])
    assert outcome.watch is None
    assert "(left alone: eager); --compile-eager auto" in outcome.summary()[0]
    assert Outcome().summary()[1] == "no run was kept"


def test_sites(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "sites", "--json", script, "--", "train") == 0
    printed = capsys.readouterr()
    [status] = json.loads(printed.out)["statuses"]
    assert status["site"]["heads"] == 2
    assert "arguments ['train']" in printed.err
    assert call(monkeypatch, "sites", script, "--", "train") == 0
    assert "2 heads, 2 kv, dim 4" in capsys.readouterr().out
    assert call(monkeypatch, "sites", script, "--", "train", "eager") == 0
    assert "--compile-eager auto" in capsys.readouterr().out
    assert call(monkeypatch, "sites", "--compile-eager", "auto", script, "--", "train", "eager") == 0
    assert "2 heads, 2 kv, dim 4" in capsys.readouterr().out


MODELS = """
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
    def forward(self, x):
        q, k, v = (f(x).view(2, 6, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 6, 8)

class Stack(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def make(count="3"):
    return Stack(int(count)), (torch.randn(2, 6, 8),), {}

def lonely():
    return Stack(1)

def wrong():
    return Stack(1), (torch.randn(5),)

number = 3
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)


@pytest.mark.usefixtures("own_models")
def test_sites_of_a_callable_group_like_layers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "sites", "own_models:make", "--draw", "pictures") == 0
    printed = capsys.readouterr()
    assert "layers.{0-2}" in printed.out
    assert "q: q.weight; k: k.weight" in printed.out
    assert printed.out.splitlines()[-1] == "3 attention sites; 0 candidates left out; 0 graph breaks"
    assert [path.name for path in Path("pictures").iterdir()] == ["attention-scaled-dot-product-attention.svg"]
    assert call(monkeypatch, "sites", "--all", "own_models:make", "--", "2") == 0
    table = capsys.readouterr().out
    assert "layers.0" in table
    assert "layers.1" in table
    assert "layers.2" not in table


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("own_models:nothing", "has no attribute 'nothing'"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("own_models:number", "it is int, not callable"),
        ("own_models:lonely", "return (module, args, kwargs)"),
        ("own_models:wrong", "running the model of own_models:wrong"),
        (".", "there is no config.json"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, message: str
) -> None:
    assert call(monkeypatch, "sites", target) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("foreshock: ")]
    assert message in line


def test_sites_of_a_config_need_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model of 7 billion parameters is never there; its default key cache makes tensors while tracing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    assert call(monkeypatch, "sites", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "model.layers.{0-31}.self_attn" in printed
    assert "32 heads, 32 kv, dim 128" in printed
    assert printed.splitlines()[-1] == "32 attention sites; 0 candidates left out; 0 graph breaks"


def test_a_config_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert call(monkeypatch, "sites", tmp_path / "config.json") == 2
    assert "pip install 'foreshock[hf]'" in capsys.readouterr().err


def test_version_and_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("foreshock 0.")
    seen: list[object] = []
    driver = pytest.importorskip("foreshock.demo.driver")
    monkeypatch.setattr(
        driver, "run_demo", lambda out, quick, seed, as_json: seen.extend((out, quick, seed, as_json)) or 3
    )
    assert call(monkeypatch, "demo", "--out", tmp_path, "--quick", "--seed", 5) == 3
    assert seen == [tmp_path, True, 5, False]


@pytest.mark.parametrize("arguments", [["--help"], ["scan", "--help"], ["--version"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    """Nor does completion, which runs at every press of the key."""
    program = (
        "import sys\nfrom foreshock.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "AssertionError" not in done.stderr


def test_help_says_the_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--help") == 0
    assert "Exit codes: 0 all went well" in " ".join(capsys.readouterr().out.split())


def options(command: str) -> set[str]:
    return {option for param in typer.main.get_command(cli.app).commands[command].params for option in param.opts}


def test_every_command_that_prints_a_table_prints_json_as_well_and_is_in_the_manual() -> None:
    commands = set(typer.main.get_command(cli.app).commands)
    told_on_stderr_or_a_path = {"run", "report"}
    assert {name for name in commands if "--json" not in options(name)} == told_on_stderr_or_a_path
    manual = (Path(__file__).parents[1] / "docs/cli.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in manual.split("## Exit codes")[0].splitlines() if line.startswith("| `")]
    assert {row.split("`")[1].split()[0] for row in rows} == commands


@pytest.mark.parametrize(
    ("command", "told"), [(["report"], "drawing"), (["compare", "{}"], "judging")], ids=["report", "compare"]
)
def test_what_takes_long_says_so_on_standard_error(
    folder: Path, command: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(folder) for word in command]
    assert call(monkeypatch, *words, folder) == 0
    piped = capsys.readouterr()
    assert piped.err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert call(monkeypatch, *words, folder) == 0
    seen = capsys.readouterr()
    assert told in seen.err
    assert seen.out == piped.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    """What the script that --install-completion leaves behind asks for."""
    asked = {"bash": {"COMP_WORDS": "foreshock sc", "COMP_CWORD": "1"}, "zsh": {"_TYPER_COMPLETE_ARGS": "foreshock sc"}}
    fish = {"_TYPER_COMPLETE_ARGS": "foreshock sc", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment = {**os.environ, "_FORESHOCK_COMPLETE": f"complete_{shell}", **asked.get(shell, fish)}
    command = [str(Path(sys.executable).with_name("foreshock"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "scan" in done.stdout
    assert "sites" not in done.stdout


def test_no_bars_where_nobody_looks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("x") as told:
        told(1, 2)
    with progress.spinner("x") as now:
        now("y")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.bar("series") as told:
        told(1, 2)
    printed = capsys.readouterr()
    assert "1/2" in printed.err
    assert printed.out == ""
