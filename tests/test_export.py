"""A run as one long table in a file, read back by what reads such files."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from foreshock import cli, open_run
from foreshock import export as module
from foreshock.errors import ConfigError, RunError
from foreshock.export import COLUMNS, export
from foreshock.reader import Run
from foreshock.records import Reading
from foreshock.store import RunStore

STEPS = 300  # so that some rows are in chunks and some in the tail


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    generator = np.random.default_rng(0)
    store = RunStore(tmp_path / "one")
    for step in range(STEPS):
        values = generator.standard_normal(4).astype(np.float32).astype(np.float64)
        values[1] = (math.nan, math.inf, -math.inf)[step % 3]
        store.write(step, [Reading("law/euler", "a", values), Reading("law/euler", "b", values[:2])])
        store.write(step, [Reading("run/loss", None, values[:1])])
        store.flush()
    store.close()
    with open_run(tmp_path / "one") as opened:
        yield opened


def rows_of(path: Path) -> list[tuple[int, str, str | None, int, float]]:
    """As each format's own reader has them."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path)
        assert table.column_names == list(COLUMNS)
        return list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            head, *rows = csv.reader(file)
        assert head == list(COLUMNS)
        return [(int(s), m, site or None, int(i), float(v)) for s, m, site, i, v in rows]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["step"], r["metric"], r["site"], r["index"], float(r["value"])) for r in rows]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_every_number_is_there_once(run: Run, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 500)  # several blocks, and row groups, a series
    path = tmp_path / "below" / f"run{suffix}"
    assert export(run, path) == STEPS * (4 + 2 + 1)
    rows = rows_of(path)
    assert len(rows) == len({row[:4] for row in rows}) == STEPS * 7
    for metric, site in (("law/euler", "a"), ("law/euler", "b"), ("run/loss", None)):
        steps, values = run.series(metric, site)
        own = [row for row in rows if row[1:3] == (metric, site)]
        np.testing.assert_array_equal([row[4] for row in own], values.reshape(-1))
        np.testing.assert_array_equal([row[0] for row in own], np.repeat(steps, values.size // len(steps)))
    assert not list(path.parent.glob(".*"))


def test_as_pandas_has_it(run: Run, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    export(run, tmp_path / "run.parquet")
    keys = ["metric", "site", "step", "index"]
    tables = pandas.read_parquet(tmp_path / "run.parquet"), run.to_pandas()
    one, other = (table.sort_values(keys).reset_index(drop=True) for table in tables)
    pandas.testing.assert_frame_equal(one, other, check_dtype=False)


def test_short_series_share_a_row_group(run: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    export(run, tmp_path / "run.parquet")
    assert parquet.ParquetFile(tmp_path / "run.parquet").num_row_groups == 1


def test_one_series_is_in_memory_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []
    told: list[tuple[int, int]] = []
    series = Run.series

    def watched(self: Run, metric: str, site: str | None = None):
        assert len(told) == len(asked) + 1  # each is written before the next is read
        asked.append((metric, site))
        return series(self, metric, site)

    monkeypatch.setattr(Run, "series", watched)
    export(run, tmp_path / "run.csv", progress=lambda done, of: told.append((done, of)))
    assert asked == [("law/euler", "a"), ("law/euler", "b"), ("run/loss", None)]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_what_cannot_be(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"one of .parquet, .csv, .jsonl, got '.xlsx'"):
        export(run, tmp_path / "run.xlsx")
    with pytest.raises(ConfigError, match=r"no metric fits 'law/eule' \(did you mean law/euler\?\)"):
        export(run, tmp_path / "run.csv", metrics=["law/eule"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'foreshock\[parquet\]', or give .csv"):
        export(run, tmp_path / "run.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.csv"
    path.write_text("of yesterday")

    def fails(self: Run, metric: str, site: str | None = None):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Run, "series", fails)
    with pytest.raises(RunError, match="the disk is gone; free the disk"):
        export(run, path)
    assert path.read_text() == "of yesterday"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["one", "run.csv"]


def test_the_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.csv"
    command = ["foreshock", "export", str(tmp_path / "one"), "-o", str(file), "--metric", "run/*"]
    plain = json.dumps({"file": str(file), "rows": 300}, indent=2)
    for more, expected in (([], f"{file}: 300 rows"), (["--json"], plain)):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert not leaving.value.code
        assert capsys.readouterr().out == f"{expected}\n"
    assert {row[1] for row in rows_of(file)} == {"run/loss"}
