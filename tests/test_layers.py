"""The directions of imports in docs/architecture.md, the public names, and the one file of private torch APIs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import foreshock

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "": ROOT / "src/foreshock",
    "patterns": ROOT / "patterns",
    "passes": ROOT / "passes",
    "monitors": ROOT / "monitors",
}
FILES = {
    ".".join(("foreshock", *([room] if room else []), *path.relative_to(folder).with_suffix("").parts)): path
    for room, folder in FOLDERS.items()
    for path in sorted(folder.rglob("*.py"))
}
PRIVATE = ("torch._dynamo", "torch._guards", "torch._inductor", "torch._subclasses", "torch._functorch")
PUBLIC = [
    "Alarm",
    "AlarmRaised",
    "CheckpointError",
    "CheckpointGuard",
    "ConfigError",
    "Coverage",
    "ForeshockError",
    "PatternError",
    "Probe",
    "Reading",
    "Run",
    "RunError",
    "Site",
    "SiteStatus",
    "Watch",
    "WeightView",
    "default_watch",
    "instrumented",
    "open_run",
    "scan",
    "sites",
]


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(name: str) -> str | None:
    """Which room of foreshock an import reaches; "" is the root package, None is no part of foreshock."""
    parts = name.split(".")
    if parts[0] != "foreshock":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("patterns", "passes", "monitors") else ""


def _of(room: str) -> dict[str, Path]:
    return {name: path for name, path in FILES.items() if _room(name) == room}


def _reached(path: Path) -> set[str]:
    return set(_imports(ast.parse(path.read_text())))


def _outside(reached: set[str], room: str, allowed: tuple[str, ...]) -> set[str]:
    """Imports of foreshock beyond the room itself and the modules it may know."""
    ours = {name for name in reached if _room(name) is not None and _room(name) != room}
    return {name for name in ours if not any(name == entry or name.startswith(f"{entry}.") for entry in allowed)}


LEAVES = ("foreshock.records", "foreshock.errors", "foreshock.layout", "foreshock.stages", "foreshock.transfer")


def test_the_walk_sees_the_whole_library() -> None:
    assert len(FILES) > 40
    assert {_room(name) for name in FILES} == {"", "patterns", "passes", "monitors"}
    assert _reached(FILES["foreshock.backend"]) >= {"foreshock.patterns.find", "foreshock.passes.instrument", "torch"}


@pytest.mark.parametrize("name", ["foreshock.records", "foreshock.errors"])
def test_records_and_errors_know_nothing_of_the_rest(name: str) -> None:
    assert {found for found in _reached(FILES[name]) if _room(found) is not None} == set()


@pytest.mark.parametrize("name", _of("patterns"))
def test_patterns_know_records_alone(name: str) -> None:
    assert _outside(_reached(FILES[name]), "patterns", LEAVES) == set()


@pytest.mark.parametrize("name", _of("passes"))
def test_passes_know_patterns_and_no_monitors(name: str) -> None:
    assert _outside(_reached(FILES[name]), "passes", (*LEAVES, "foreshock.patterns", "foreshock._torch")) == set()


@pytest.mark.parametrize("name", _of("monitors"))
def test_monitors_know_no_graphs(name: str) -> None:
    reached = _reached(FILES[name])
    assert {found for found in reached if _room(found) in ("patterns", "passes")} == set()
    assert {found for found in reached if found.startswith(("torch.fx", "torch._dynamo"))} == set()


@pytest.mark.parametrize("name", _of("monitors"))
def test_only_what_is_shown_to_people_reads_runs(name: str) -> None:
    """Reports draw from a stored run; what measures and judges knows records alone."""
    allowed = LEAVES if "report" not in name else (*LEAVES, "foreshock.reader")
    assert _outside(_reached(FILES[name]), "monitors", allowed) == set()


@pytest.mark.parametrize("name", [n for n in FILES if n not in ("foreshock.__init__",)])
def test_no_module_imports_the_package_itself(name: str) -> None:
    """``from foreshock import _torch`` is a module; ``from foreshock import Watch`` would be a circle."""
    public = {f"foreshock.{entry}" for entry in PUBLIC}
    assert _reached(FILES[name]) & public <= (
        {"foreshock.Watch", "foreshock.default_watch"} if ".demo." in name else set()
    )


def test_imports_run_in_no_circle() -> None:
    known = {name.removesuffix(".__init__") for name in FILES}
    edges: dict[str, set[str]] = {}
    for name, path in FILES.items():
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]  # if TYPE_CHECKING
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        targets = {found if found in known else found.rpartition(".")[0] for found in _imports(top)}
        edges[name.removesuffix(".__init__")] = {
            target for target in targets if target in known and target != "foreshock"
        }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in FILES if name != "foreshock._torch"])
def test_private_torch_apis_stand_in_one_file(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    assert [found for found in _imports(tree) if found.startswith(PRIVATE)] == []
    spelled = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [found for found in sorted(spelled) if found.startswith(PRIVATE)] == []


def test_each_private_api_says_the_version_it_was_checked_on() -> None:
    tree = ast.parse(FILES["foreshock._torch"].read_text())
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        if any(found.startswith(PRIVATE) for found in _imports(function)):
            assert "Checked on 2." in (ast.get_docstring(function) or ""), function.name


def test_public_names() -> None:
    assert sorted(foreshock.__all__) == PUBLIC
    assert list(foreshock.__all__) == sorted(foreshock.__all__)
    assert all(hasattr(foreshock, name) for name in PUBLIC)
