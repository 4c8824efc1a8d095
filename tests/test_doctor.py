"""What the doctor finds on a machine that is well, and on machines that are not."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from foreshock import _torch, cli, doctor
from foreshock.doctor import Check, examine


def by_name(**options: bool) -> dict[str, Check]:
    return {check.name: check for check in examine(compiles=False, **options)}


def test_a_machine_that_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "caches"))
    found = by_name()
    assert [name for name, check in found.items() if check.state == "problem"] == []
    assert found["entry point"].found == "foreshock:instrumented"
    assert "inductor" in found["backends"].found
    assert found["compile caches"].found.startswith(f"{tmp_path / 'caches'}: ")
    assert {"Python", "torch", "foreshock", "wandb"} <= found.keys()


def test_caches_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "code.so").write_bytes(bytes(3 * 2**20))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert f"{tmp_path}: 1 files of 3 MiB" in by_name()["compile caches"].found
    assert doctor._size(tmp_path / "nowhere") == "not made yet"


def test_caches_that_cannot_be_written_or_hold_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check = by_name()["compile caches"]
    assert (check.state, "set TORCHINDUCTOR_CACHE_DIR" in check.advice) == ("problem", True)
    monkeypatch.undo()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    check = by_name()["compile caches"]
    assert (check.state, "less than 1 GiB" in check.advice) == ("problem", True)


@pytest.mark.parametrize("points", [(), (EntryPoint("foreshock", "other:thing", "torch_dynamo_backends"),)])
def test_an_entry_point_that_is_missing_or_another(
    monkeypatch: pytest.MonkeyPatch, points: tuple[EntryPoint, ...]
) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda group: points)
    check = next(doctor._registered())
    assert (check.state, "pip install" in check.advice) == ("problem", True)


@pytest.mark.parametrize(
    ("version", "state"), [("2.10.1", "problem"), ("2.11.0+cu128", "ok"), ("2.15.2", "ok"), ("2.16.0a0", "problem")]
)
def test_versions_out_of_range(version: str, state: str) -> None:
    check = doctor._between("torch", version, doctor.TORCH, "")
    assert check.state == state
    assert (state == "ok") or "2.11 to 2.15" in check.advice


def test_settings_that_are_wrong_or_not_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORESHOCK_EVERY", "3")
    assert by_name()["settings"].found == "every=3"
    monkeypatch.setenv("FORESHOCK_EVRY", "3")
    check = by_name()["settings"]
    assert (check.state, "FORESHOCK_EVRY" in check.found) == ("problem", True)


def test_what_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    checks = {check.name: check for check in doctor._optional()}
    assert {check.state for check in checks.values()} == {"missing"}
    assert checks["pyarrow"].advice == "pip install 'foreshock[parquet]'"


@pytest.mark.parametrize(
    ("stderr", "cure"),
    [
        (
            "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in x",
            "apt-get install g++",
        ),
        (
            "x.cpp:2:10: fatal error: Python.h: No such file or directory\nCppCompileError: C++ compile error",
            "python3-dev",
        ),
        ("fatal error: omp.h: No such file or directory\nCppCompileError: C++ compile error", "libgomp1"),
        ("OSError: [Errno 28] No space left on device", "free the disk"),
        ("RuntimeError: who knows", "TORCH_LOGS"),
    ],
)
def test_each_failure_has_its_cure(stderr: str, cure: str) -> None:
    check = doctor._failed("compiling on cpu", stderr)
    assert check.state == "problem"
    assert cure in check.advice
    assert check.found == stderr.splitlines()[-1]


def test_a_compiler_that_is_missing_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Really compiled, as far as it goes."""
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    [check] = doctor._compiles("cpu")
    assert (check.state, "InvalidCxxCompiler" in check.found) == ("problem", True)
    assert "apt-get install g++" in check.advice


def test_compiling_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    [check] = doctor._compiles("cpu")
    assert (check.state, check.found) == ("problem", "not done after 0.2 s")


@pytest.mark.slow
def test_this_machine_compiles() -> None:
    """With fresh caches, so that the compiler is really asked: half a minute."""
    checks = list(doctor._compiles("cpu"))
    assert [(check.name, check.state) for check in checks] == [("compiling on cpu", "ok"), ("foreshock on cpu", "ok")]
    assert "1 site" in checks[1].found


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for state, code in (("ok", 0), ("missing", 0), ("problem", 1)):
        check = Check("torch", state, "2.13", "keep it")
        monkeypatch.setattr(doctor, "examine", lambda compiles, begin, check=check: iter([check]))
        for more in ([], ["--json"]):
            monkeypatch.setattr(sys, "argv", ["foreshock", "doctor", *more])
            with pytest.raises(SystemExit) as leaving:
                cli.main()
            assert (leaving.value.code or 0) == code
        printed = capsys.readouterr().out
        assert "keep it" in printed
        assert json.loads(printed[printed.index("[") :]) == [check.to_json()]


def test_the_folder_of_the_caches_is_inductors_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert _torch.compile_caches().folder == cache_dir()
