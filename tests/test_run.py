"""`foreshock run` as people start it: whole processes that end, print and are killed as the script alone, and what it compiles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import foreshock
from foreshock.run import Outcome, launch

NETS = """
import torch
import torch.nn.functional as F
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)
    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

class Wide(Layer):
    pass

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList([Layer(), Layer(), Wide()])
    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

def steps(net, optimizer, count=3):
    for _ in range(count):
        loss = net(torch.randint(0, 16, (2, 6))).square().mean()
        loss.backward(), optimizer.step(), optimizer.zero_grad()
    return loss.item()

def parts(net):
    return [name for name, part in net.named_modules() if part.__dict__.get("_compiled_call_impl")]

torch.manual_seed(0)
net = Net()
"""
PLAIN = "optimizer = torch.optim.AdamW(net.parameters())\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORESHOCK_INNER", "eager")
    monkeypatch.setenv("FORESHOCK_EVERY", "1")
    monkeypatch.chdir(tmp_path)


def started(*command: str, **options: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], text=True, **{**pipes, **options})


def watched(body: str, wanted: str | None = "auto") -> Outcome:
    """What becomes of a script in this process; its assertions are the test's."""
    Path("script.py").write_text(NETS + body)
    outcome = launch("script.py", [], compile_eager=wanted)
    assert outcome.code == 0
    return outcome


def test_a_script_that_compiles_nothing_is_watched_and_is_itself_in_all_else() -> None:
    package = Path("pack")
    package.mkdir()
    (package / "__init__.py").touch()
    ending = "import sys, os\nprint(steps(net, optimizer), sys.argv[1:], sys.stdin.read(), __package__, sys.path[0])\n"
    (package / "train.py").write_text(NETS + PLAIN + ending + "raise KeyError('mine')\n")
    processes = [
        started(*launcher, "pack.train", "--run", "x", "-m")
        for launcher in (["-m"], ["-m", "foreshock.run", "--run", "kept", "--compile-eager", "auto", "-m"])
    ]
    (out, err, code), (watched_out, watched_err, watched_code) = (
        (*process.communicate("typed"), process.returncode) for process in processes
    )
    assert "['--run', 'x', '-m'] typed pack" in out
    assert (watched_out, watched_code) == (out, code)
    told = [line for line in watched_err.splitlines() if line.startswith("foreshock: ")]
    assert told == [
        "foreshock: left eager by the script and compiled: 1 Net",
        "foreshock: no alarm at 3 sites in 3 steps",
        "foreshock: run kept in kept; see it with: foreshock report kept",
    ]
    assert [line for line in watched_err.splitlines() if not line.startswith("foreshock: ")] == err.splitlines()
    with foreshock.open_run("kept") as run:
        assert len(run.sites) == 3
        assert "law/euler" in run.metrics()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_as_it_ends_the_script_alone(name: str) -> None:
    handler = "import atexit, signal, sys, time\natexit.register(print, 'at exit', flush=True)\n"
    Path("script.py").write_text(handler + "print('ready', flush=True)\ntime.sleep(60)\n")
    processes = [started("script.py"), started("-m", "foreshock.run", "script.py")]
    ends = []
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)  # it prints no more, it sleeps
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=30)
        ends.append(
            (process.returncode, out, [line for line in err.splitlines() if not line.startswith("foreshock: ")])
        )
    assert ends[0] == ends[1]
    assert ends[0][0] == -getattr(signal, name)


@pytest.mark.parametrize("wanted", ["Layer", "__main__.Layer"])
def test_every_module_of_a_class_and_of_its_subclasses_is_compiled(wanted: str) -> None:
    body = "steps(net, optimizer)\nassert parts(net) == ['layers.0', 'layers.1', 'layers.2'], parts(net)\n"
    outcome = watched(PLAIN + body, wanted)
    assert outcome.summary()[:2] == [
        "left eager by the script and compiled: 2 Layer, 1 Wide",
        "no alarm at 3 sites in 3 steps",
    ]


def test_nothing_is_compiled_before_it_is_called_in_training() -> None:
    """An evaluation, a call without gradients and a class that nobody trains."""
    outcome = watched(
        PLAIN
        + """
with torch.no_grad():
    net(torch.zeros(1, 4, dtype=torch.long))
net.eval()(torch.zeros(1, 4, dtype=torch.long)), net.train()
import copy, pickle
twin = copy.deepcopy(net)
frozen = Net()
frozen(torch.zeros(1, 4, dtype=torch.long))
steps(net, optimizer)
assert parts(net) == [""], parts(net)
assert net(torch.zeros(1, 4, dtype=torch.long)).requires_grad
assert parts(twin) == parts(frozen) == []
"""
    )
    assert len(outcome.watch.sites) == 3


def test_the_module_that_is_called_is_compiled_and_not_what_holds_it() -> None:
    """As in a module that computes losses by a method, or one that holds two models."""
    outcome = watched(
        """
class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = Net(), Net()
    def loss(self, x):
        return self.one(x).square().mean() + self.other(x).square().mean()
both = Both()
optimizer = torch.optim.AdamW(both.parameters())
for _ in range(2):
    both.loss(torch.zeros(1, 4, dtype=torch.long)).backward(), optimizer.step()
assert parts(both) == ["one", "other"], parts(both)
both.forward = both.loss
both(torch.zeros(1, 4, dtype=torch.long))
assert parts(both) == ["one", "other"], parts(both)
"""
    )
    assert outcome.summary()[0] == "left eager by the script and compiled: 2 Net"


@pytest.mark.parametrize(
    ("compiles", "sites"),
    [
        ("net = torch.compile(net)", 3),
        ("net.compile()", 3),
        ("net = torch.compile(net, backend='eager')", 0),
        ("net = torch.compile(lambda x: own(x))", 3),
        ("for layer in net.layers[:2]: layer.compile()", 3),
    ],
    ids=["wrapped", "in place", "by another backend", "in a function", "in parts"],
)
@pytest.mark.parametrize("first", [True, False], ids=["before the optimizer", "after it"])
def test_what_the_script_compiles_stays_as_it_compiles_it(compiles: str, sites: int, first: bool) -> None:
    lines = ["own = net", *([compiles, PLAIN.replace("net", "own")] if first else [PLAIN, compiles])]
    outcome = watched("\n".join([*lines, "steps(net, optimizer)"]))
    part = "layer in" in compiles
    assert dict(outcome.eager.compiled) == ({"Wide": 1} if part else {})
    assert len(outcome.watch.sites if outcome.watch is not None else ()) == sites
    if outcome.watch is not None:
        assert outcome.watch.coverage.graph_breaks == ()


def test_without_a_site_the_summary_says_what_to_do() -> None:
    linear = "net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))\n" + PLAIN
    train = "net(torch.ones(2, 4)).sum().backward(), optimizer.step()\n"
    told = watched(linear + "net.compile()\n" + train, None).summary()[0]
    assert told.startswith("nothing was watched: no attention and no router ran in what was compiled; foreshock sites")
    assert "--compile-eager auto" in told
    told = watched(linear + train, None).summary()[0]
    assert told.endswith("--compile-eager auto compiles what it trains")
    told = watched(linear + train, "Lair").summary()[0]
    assert told == "--compile-eager Lair compiled nothing of what is trained and called as a module: Sequential"
    told = watched("net(torch.zeros(1, 4, dtype=torch.long))").summary()[0]
    assert told == "--compile-eager auto compiled nothing: no optimizer of torch held a module's parameters"


def test_what_a_thread_trains_after_the_last_line_is_watched() -> None:
    late = "import threading\ndef late():\n    threading.main_thread().join()\n    steps(net, optimizer, 4)\n"
    Path("script.py").write_text(
        NETS + PLAIN + "net.compile()\nsteps(net, optimizer, 1)\n" + late + "threading.Thread(target=late).start()\n"
    )
    process = started("-m", "foreshock.run", "--run", "kept", "script.py")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "foreshock: no alarm at 3 sites in 5 steps" in err.splitlines()
    with foreshock.open_run("kept") as run:
        assert list(run.series("law/euler", run.sites[0].id)[0]) == [0, 1, 2, 3, 4]


RANK = """
import os
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
distributed.init_process_group("gloo")
net = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(net.parameters())
torch.manual_seed(distributed.get_rank())
steps(net, optimizer, 4)
assert parts(net) == [""], parts(net)
distributed.destroy_process_group()
print("rank", os.environ["RANK"], "done")
"""


def test_torchrun_starts_it_on_every_rank_as_one_run() -> None:
    Path("script.py").write_text(NETS + RANK)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "foreshock.run"]
    options = ["--run-dir", "kept", "--compile-eager", "auto"]
    process = started(*launcher, *options, "script.py", env=os.environ | {"OMP_NUM_THREADS": "1"})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert sorted(out.splitlines()) == ["rank 0 done", "rank 1 done"]
    told = [line for line in err.splitlines() if line.startswith("foreshock: ")]
    assert told[0] == "foreshock: left eager by the script and compiled: 1 DistributedDataParallel"
    assert told[1] == "foreshock: no alarm at 3 sites in 4 steps"
    assert len(told) == 3
    with foreshock.open_run("kept") as run:
        assert list(run.series("law/euler", run.sites[0].id)[0]) == [0, 1, 2, 3]
