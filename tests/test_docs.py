"""Every code block of README.md and of the pages: Python runs, commands and settings exist, and what is none of these says so."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from documentation import ROOT, Block, blocks, check, commands, is_python
from preludes import AFTER, CHOICES, JOBS, PRELUDES, SCRIPTS

import foreshock
from foreshock import default
from foreshock.config import load_settings
from foreshock.errors import ConfigError

FILES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
]
BLOCKS = {name: blocks((ROOT / name).read_text(encoding="utf-8")) for name in FILES}
REGISTERED = importlib.import_module("foreshock.patterns.find")._registered  # the package has a function of that name
OTHERS = {"shell", "toml", "text"}


def having(language: str) -> list[str]:
    return [name for name in FILES if any(block.language == language for block in BLOCKS[name])]


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """An empty directory, no compiler, and afterwards nothing left of what a page registered, imported or opened."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FORESHOCK_INNER", "aot_eager")
    monkeypatch.setenv("FORESHOCK_STRICT", "1")
    registered, modules, names = list(REGISTERED), set(sys.modules), {"__name__": "page"}
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield names
    for opened in (*names.values(), default._default):
        if isinstance(opened, foreshock.Watch | foreshock.Run):
            opened.close()
    REGISTERED[:] = registered
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    torch._dynamo.reset()


def execute(page: str, block: Block, names: dict[str, Any]) -> None:
    """A block with a title is saved under it and is a script of its own; any other goes on in the page's names."""
    if block.title:
        Path(block.title).write_text(block.code, encoding="utf-8")
        runpy.run_path(block.title, run_name="__main__")
    else:
        exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)


@pytest.mark.parametrize("page", having("python"))
def test_the_code_of_the_page_runs(
    page: str, space: dict[str, Any], capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if page in JOBS:
        request.getfixturevalue("one_process")
    prelude = PRELUDES.get(page, dict)
    space |= prelude()
    for block in BLOCKS[page]:
        if block.language == "python":
            names = dict(space) if page in SCRIPTS else space
            execute(page, block, names)
            space |= names
            if page in CHOICES:
                space["train"](space["model"])
                space |= prelude()
    AFTER.get(page, lambda names, printed: None)(space, capsys.readouterr().out)


@pytest.mark.parametrize("page", having("shell"))
def test_the_commands_of_the_page_exist(page: str) -> None:
    written = tuple(block.title for block in BLOCKS[page] if block.title)
    said = [command for block in BLOCKS[page] if block.language == "shell" for command in commands(block.code)]
    assert said
    for command in said:
        check(command, written)


@pytest.mark.parametrize("page", having("toml"))
def test_the_settings_of_the_page_are_taken(page: str, tmp_path: Path) -> None:
    for block in BLOCKS[page]:
        if block.language == "toml":
            name = "pyproject.toml" if "[tool.foreshock]" in re.sub("#.*", "", block.code) else "foreshock.toml"
            (tmp_path / name).write_text(block.code, encoding="utf-8")
            assert load_settings(tmp_path) != load_settings(tmp_path.parent)
            (tmp_path / name).unlink()


@pytest.mark.parametrize("page", FILES)
def test_no_block_is_skipped(page: str) -> None:
    assert [(block.line, block.language) for block in BLOCKS[page] if block.language not in OTHERS | {"python"}] == []
    assert [block.line for block in BLOCKS[page] if block.language == "text" and is_python(block.code)] == []


def test_pages_named_here_are_there() -> None:
    assert set(PRELUDES) | set(AFTER) <= set(FILES)


@pytest.mark.slow
def test_the_start_in_five_minutes_goes_as_it_says(tmp_path: Path) -> None:
    """Its commands but `pip install`, really run and compiled, print what the page shows, but for the digits."""
    page, said = BLOCKS["docs/start.md"], ""
    for block in page:
        if block.title:
            (tmp_path / block.title).write_text(block.code, encoding="utf-8")
    for command in [words for block in page if block.language == "shell" for words in commands(block.code)]:
        if command[0] == "foreshock":
            call = [str(Path(sys.executable).with_name("foreshock")), *command[1:]]
            done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            said += done.stdout + done.stderr
    said = plain(said)
    for block in page:
        if block.language == "text":
            assert plain(block.code) in said or all(plain(line) in said for line in block.code.splitlines()), block.code


def plain(text: str) -> str:
    """``text`` on one line, with a sign for each number that has a point."""
    return re.sub(r"\d+\.\d+(e-\d+)?", "#", " ".join(text.split()))


# -- the tests' own tools ----------------------------------------------------------------------------------------------------


def test_blocks_are_found() -> None:
    text = 'a\n```python title="x.py"\n1\n```\n- b\n\n  ```\n  2\n  ```\n````text\n```\n````\n'
    assert blocks(text) == [Block("python", "x.py", "1\n", 3), Block("", "", "2\n", 8), Block("text", "", "```\n", 11)]


@pytest.mark.parametrize(
    ("code", "python"),
    [
        ("import os", True),
        ("x = 1", True),
        ("watch.flush()", True),
        ("def f(x):\n    return x", True),
        ("capture -> patterns", False),
        ("loss", False),
        ("step 3: a.b is 4", False),
    ],
)
def test_python_that_calls_itself_text_is_told(code: str, python: bool) -> None:
    assert is_python(code) == python


def test_commands_are_found() -> None:
    code = "A=1 B='x y' one two # said\n\n$ cd a && make test\nthree \\\n  four\n# nothing"
    assert list(commands(code)) == [["one", "two"], ["cd", "a"], ["make", "test"], ["three", "four"]]


@pytest.mark.parametrize(
    "line",
    [
        "foreshock sites train.py -- --its --flags",
        "foreshock run --run runs/a --every 5 train.py --whatever 3",
        "torchrun --nproc-per-node 8 -m foreshock.run --run-dir runs/exp1 train.py --lr 1",
        "python examples/adopt.py --by-name",
        ".venv/bin/foreshock --help",
        "pip install '.[hf,pandas]'",
        "make lint test",
    ],
)
def test_what_exists_passes(line: str) -> None:
    for command in commands(line):
        check(command)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("foreshock sight train.py", "no command sight"),
        ("foreshock report runs/a --colour", "--colour"),
        ("foreshock export runs/a", "output"),
        ("foreshock run --every x train.py", "valid integer"),
        ("torchrun --nproc-per-node 8 -m foreshock.run --every x train.py", "valid integer"),
        ("python examples/gone.py", "no examples/gone.py"),
        ("make everything", "no everything"),
        ("pip install 'foreshock[gone]'", "no gone"),
        ("frobnicate", "does not know"),
    ],
)
def test_what_does_not_exist_is_told(line: str, said: str) -> None:
    (command,) = commands(line)
    with pytest.raises(ValueError, match=said):
        check(command)


def test_a_setting_that_does_not_exist_is_told(tmp_path: Path) -> None:
    (tmp_path / "foreshock.toml").write_text("evry = 3")
    with pytest.raises(ConfigError, match="evry"):
        load_settings(tmp_path)
