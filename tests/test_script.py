"""A program under `foreshock run` beside the same under Python alone: its ``__main__`` until the very end, and its tracebacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

from foreshock.run import Outcome, launch, speaks
from foreshock.script import HANDING_ON

CONSOLE = [str(Path(sys.executable).with_name("foreshock")), "run"]
KEPT = """
import atexit, pickle, sys, threading
from concurrent.futures import ThreadPoolExecutor

class A:
    pass

def pickles(who):
    copied = pickle.loads(pickle.dumps(A()))
    print(who, type(copied) is A, sys.modules["__main__"].A is A, sys.argv, flush=True)

def late():
    threading.main_thread().join()
    pickles("thread")

atexit.register(pickles, "at exit")
threading.Thread(target=late).start()
ThreadPoolExecutor().submit(pickles, "executor").result()
raise KeyError("mine")
"""


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORESHOCK_INNER", "eager")
    monkeypatch.chdir(tmp_path)


def of_the_script(err: str) -> list[str]:
    return [line for line in err.splitlines() if not line.startswith("foreshock: ")]


def ended(*command: str) -> tuple[int, str, list[str]]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, of_the_script(done.stderr)


def test_threads_and_what_is_called_at_exit_pickle_the_classes_of_the_script() -> None:
    """By the installed command."""
    Path("script.py").write_text(KEPT)
    alone = ended(sys.executable, "script.py", "x")
    assert [line.split()[0] for line in alone[1].splitlines()] == ["executor", "thread", "at"]
    assert ended(*CONSOLE, "script.py", "x") == alone
    assert (alone[0], alone[2][-1]) == (1, "KeyError: 'mine'")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_an_interrupt_ends_the_waiting_for_threads() -> None:
    lines = ["import atexit, threading, time", "atexit.register(print, 'at exit', flush=True)"]
    waits = (
        "threading.Thread(target=lambda: (threading.main_thread().join(), print('alone', flush=True), time.sleep(60)))"
    )
    Path("script.py").write_text("\n".join([*lines, f"{waits}.start()"]))
    ends = []
    for command in ([sys.executable], CONSOLE):
        process = subprocess.Popen([*command, "script.py"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == "alone\n"
        time.sleep(0.2)  # it prints no more, it waits
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        ends.append((process.returncode, out, [line.rstrip(": ") for line in of_the_script(err)]))
    assert ends[0] == ends[1]
    assert ends[0][:2] == (0, "at exit\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_ends_other_commands_with_130() -> None:
    program = "import os, signal, sys\nfrom foreshock import cli, reader\n"
    program += "reader.open_run = lambda path: os.kill(os.getpid(), signal.SIGINT)\ncli.main()"
    done = subprocess.run([sys.executable, "-c", program, "alarms", "."], capture_output=True, check=False)
    assert done.returncode == 130


GLOBALS = """
import sys
told = {name: value if isinstance(value, str) else type(value) for name, value in globals().items() if name != "sys"}
print(sorted(told.items(), key=str), sys.argv, sys.path[0], getattr(__spec__, "name", None))
"""


@pytest.mark.parametrize(
    "program", ["./it.py", "link.py", "it.pyc", "folder", "packed.zip", "-m folder.it", "-m folder"]
)
def test_a_program_finds_what_it_would_find_alone(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for name in ("it.py", "folder/it.py", "folder/__main__.py"):
        Path(name).write_text(GLOBALS)
    Path("link.py").symlink_to("folder/it.py")
    subprocess.run([sys.executable, "-c", "import py_compile; py_compile.compile('it.py', 'it.pyc')"], check=True)
    with zipfile.ZipFile("packed.zip", "w") as packed:
        packed.write("it.py", "__main__.py")
    code, out, _ = ended(sys.executable, *program.split(), "--own", "1")
    assert code == 0
    for name in [name for name in sys.modules if name.split(".")[0] == "folder"]:
        del sys.modules[name]
    before = sys.modules["__main__"], sys.path, sys.argv
    *module, name = program.split()
    assert launch(name, ["--own", "1"], module=bool(module)).code == 0
    assert capsys.readouterr().out == out
    assert (sys.modules["__main__"], sys.path, sys.argv) == before


ERRORS = """
import sys
import torch
from torch import nn

class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
    def forward(self, x):
        raise ValueError(self.linear(x).shape)

net = Failing()
if "alone" in sys.argv:
    net.compile(backend="eager")
optimizer = torch.optim.SGD(net.parameters(), 0.1)
errors = []
for call in (
    lambda: torch.compile(nn.Linear(2, 2), nonsense=1),
    lambda: torch.compile(nn.Linear(2, 2), mode="nonsense"),
    lambda: torch.compile(nn.Linear(2, 2), options={"nonsense": 1}),
    lambda: net(torch.ones(1, 2)),
):
    try:
        try:
            call()
        except Exception as error:
            raise KeyError("handled") from error
    except Exception as error:
        errors.append(error)
try:
    net(torch.ones(1, 2))
except ValueError:
    raise ExceptionGroup("all of them", errors)
"""


def test_errors_look_as_they_do_without_foreshock() -> None:
    """Causes, contexts and groups too; alone, a script compiles by a line what --compile-eager compiles for it."""
    Path("script.py").write_text(ERRORS)
    code, _, alone = ended(sys.executable, "script.py", "alone")
    watched = subprocess.run(
        [*CONSOLE, "--compile-eager", "auto", "script.py"], capture_output=True, text=True, check=False
    )
    assert "Failing" in watched.stderr.partition("all of them")[2]
    assert watched.returncode == code == 1
    assert of_the_script(watched.stderr) == alone
    assert sum("in forward" in line for line in alone) == 2
    assert any("Unrecognized mode=nonsense" in line for line in alone)


def test_an_error_of_foreshock_shows_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    Path("script.py").write_text("import foreshock\nforeshock.Watch(every=0)\n")
    assert launch("script.py", []).code == 1
    err = capsys.readouterr().err
    assert err.splitlines()[1].endswith('script.py", line 2, in <module>')
    assert "in replace" in err
    assert "ConfigError" in err.splitlines()[-1]


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from codes(inner)


def test_every_function_that_only_hands_on_is_there() -> None:
    files = Path(launch.__code__.co_filename).parent.glob("*.py")
    found = {code.co_qualname for file in files for code in codes(compile(file.read_text(), str(file), "exec"))}
    assert found >= HANDING_ON


SPAWNED = """
import multiprocessing, sys

def work():
    pass

if __name__ == "__main__":
    method, *loads = sys.argv[1:]
    if loads:
        from torch.utils.data import DataLoader
        assert len(list(DataLoader(range(2), num_workers=1, multiprocessing_context=method))) == 2
    else:
        started = [multiprocessing.get_context(method).Process(target=work) for _ in range(2)]
        assert [process.start() or process.join() or process.exitcode for process in started] == [0, 0]
"""


@pytest.mark.parametrize(
    ("args", "eager", "told"),
    [(["spawn"], None, True), (["spawn"], "auto", True), (["fork"], None, False), (["spawn", "loader"], None, False)],
)
def test_processes_that_it_does_not_reach_are_named(args: list[str], eager: str | None, told: bool) -> None:
    Path("script.py").write_text(SPAWNED)
    outcome = launch("script.py", args, compile_eager=eager)
    assert outcome.code == 0
    summary = " ".join(outcome.summary())
    assert ("into 2 processes that the script spawned" in summary) is told
    assert ("torchrun ... -m foreshock.run" in summary) is told
    assert ("--compile-eager auto compiles what it trains" in summary) is not told


def test_a_fork_of_the_script_has_nothing_to_say() -> None:
    assert speaks(Outcome())
    assert not speaks(Outcome(process=os.getpid() + 1))
