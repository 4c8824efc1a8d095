"""The command line as people call it, in the process of a test."""

from __future__ import annotations

import sys

import pytest

from foreshock import cli


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`cli.main` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["foreshock", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return int(leaving.value.code or 0)
