"""Each source is read, the later one wins, and a mistake is named with its source."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from foreshock.config import Settings, load_settings
from foreshock.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FORESHOCK_")]:
        monkeypatch.delenv(name)


def test_order_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(tmp_path) == Settings()
    (tmp_path / "pyproject.toml").write_text('[tool.foreshock]\nevery = 2\nrows = 4\nrun = "a"\nwindows = [5]\n')
    (tmp_path / "foreshock.toml").write_text('rows = 8\nmonitors = ["laws"]\n')
    monkeypatch.setenv("FORESHOCK_RUN", "b")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    expected = Settings(every=2, rows=8, run="b", windows=(5,), monitors=("laws",))
    assert load_settings(tmp_path / "deep" / "er") == expected


def test_variables_have_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "EVERY": "3",
        "BUDGET": "5e-3",
        "STRICT": "true",
        "MONITORS": "laws, router",
        "WINDOWS": "7,8",
        "BASELINE": "",
    }.items():
        monkeypatch.setenv(f"FORESHOCK_{name}", text)
    expected = Settings(every=3, budget=0.005, strict=True, monitors=("laws", "router"), windows=(7, 8))
    assert load_settings(tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evry = 1", r"foreshock\.toml: there is no setting 'evry' \(did you mean every\?\)"),
        ("every = 0", "every must be at least 1, got 0"),
        ("steps_per_false_alarm = 0", "steps_per_false_alarm must be at least 1, got 0"),
        ('align = "token"', r"align must be one of step, tokens, got 'token' \(did you mean tokens"),
        ("merge_timeout = 0", "merge_timeout must be seconds, more than 0, got 0"),
        ("budget = 1", "budget must be a share of a step's time between 0 and 1, got 1.0"),
        ('budget = "x"', "budget must be float"),
        ("every = true", "every must be int, got True"),
        ('every = "2"', "every must be int, got '2'"),
        ('monitors = ["lawz"]', r"monitors names 'lawz' \(did you mean laws\?\)"),
        ('monitors = "laws"', "monitors must be tuple"),
        ('on_alarm = "wran"', r"one of warn, raise, stop, got 'wran' \(did you mean warn"),
        ("windows = [0]", "windows must be steps of at least 1"),
        ("every = ", "correct the file"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "foreshock.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("FORESHOCK_EVRY", "1", "variable FORESHOCK_EVRY: there is no setting 'evry'"),
        ("FORESHOCK_EVERY", "often", "every must be int, got 'often'"),
        ("FORESHOCK_STRICT", "maybe", "strict must be bool, got 'maybe'"),
        ("FORESHOCK_WINDOWS", "1,x", "windows must be tuple"),
    ],
)
def test_mistakes_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=message):
        load_settings(tmp_path)


def test_replace_is_checked() -> None:
    assert Settings().replace(every=4, run=Path("runs"), windows=[3]) == Settings(every=4, run="runs", windows=(3,))
    with pytest.raises(ConfigError, match=r"did you mean strict"):
        Settings().replace(strikt=True)
    with pytest.raises(ConfigError, match="rows must be at least 1"):
        Settings().replace(rows=0)
