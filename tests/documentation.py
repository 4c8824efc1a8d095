"""The code blocks of a Markdown text, and what the shell lines among them must name: what tests/test_docs.py runs and asks."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from foreshock.cli import app

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<code>.*?)^ *(?P=fence)`*$", re.MULTILINE | re.DOTALL
)
TORCHRUN = {"--standalone": 0, "--nproc-per-node": 1, "--nnodes": 1}  # options, and how many words follow
ELSEWHERE = ("train.py", "script.py", "torchtitan.train", "package.train")  # the reader's own


@dataclass(frozen=True)
class Block:
    """A fenced block: ``line`` is that of its first line of code; ``title`` the file that it is to be saved as, if any."""

    language: str
    title: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of ``text``, in their order."""
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        language = {"bash": "shell", "sh": "shell"}.get(language, language)
        title = re.search(r'title="([^"]+)"', rest)
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        found.append(Block(language, title[1] if title else "", code, text.count("\n", 0, match.start("code")) + 1))
    return found


def is_python(code: str) -> bool:
    """Whether ``code`` is Python that does something: it defines, imports, assigns or calls."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return False
    doing = (
        ast.Import,
        ast.ImportFrom,
        ast.Assign,
        ast.AnnAssign,
        ast.AugAssign,
        ast.Call,
        ast.FunctionDef,
        ast.ClassDef,
    )
    return any(isinstance(node, doing) for node in ast.walk(tree))


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments, prompts and variables that are set before it."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for command in " ".join(map(shlex.quote, words)).split(" '&&' "):
            rest = shlex.split(command)
            while rest and re.fullmatch(r"[A-Z_]+=.*", rest[0]):
                rest = rest[1:]
            if rest:
                yield rest


def check(words: list[str], written: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` if a command is none that this project has, or names an option, file, target or extra that is not there.

    ``written`` are files that the page itself has the reader write.
    """
    program, *rest = words
    program = program.rpartition("/")[2]
    if program == "foreshock":
        _own(rest)
    elif re.fullmatch(r"python[\d.]*|torchrun", program):
        _python(rest, TORCHRUN if program == "torchrun" else {}, written)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        _known("make", rest, targets)
    elif program == "pip":
        extras = re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        _known("pip install", [one for word in rest for one in re.findall(r"\[(.*)\]", word)], extras)
    elif program not in ("cd", "git", "export", "source"):
        raise ValueError(f"{program} is a command that this test does not know: {shlex.join(words)}")


def _own(words: list[str]) -> None:
    """Parse the words as ``foreshock`` would, and run nothing."""
    root = typer.main.get_command(app)
    if not words or words[0] in ("--help", "--version", "--install-completion", "--show-completion"):
        return
    name, *rest = words
    if name not in root.commands:
        raise ValueError(f"foreshock has no command {name}")
    if "--help" in rest:
        return
    try:
        root.commands[name].make_context(name, list(rest))
    except Exception as error:
        missing = getattr(
            getattr(error, "param", None), "name", ""
        )  # an option or argument that is not there has no message
        raise ValueError(f"foreshock {shlex.join(words)}: {getattr(error, 'message', error) or missing}") from error


def _python(words: list[str], options: dict[str, int], written: tuple[str, ...]) -> None:
    rest = list(words)
    while rest and rest[0] in options:
        rest = rest[1 + options[rest[0]] :]
    if rest[:2] == ["-m", "foreshock.run"]:
        _own(["run", *rest[2:]])
    elif rest[:2] in (["-m", "pytest"], ["-m", "pip"], ["-m", "venv"]):
        return
    elif not rest or (rest[0].startswith("-") and rest[0] != "-c"):
        raise ValueError(f"an option that this test does not know: {shlex.join(words)}")
    elif rest[0] != "-c" and rest[0] not in (*ELSEWHERE, *written) and not (ROOT / rest[0]).exists():
        raise ValueError(f"there is no {rest[0]}")


def _known(what: str, words: list[str], known: list[str]) -> None:
    for word in [one for words in words for one in words.split(",")]:
        if word not in known:
            raise ValueError(f"{what}: there is no {word}; there are {', '.join(known)}")
