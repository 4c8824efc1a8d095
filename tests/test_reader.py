"""Opening a run: what it holds, and one helpful line for what is no run."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest

from foreshock.errors import RunError
from foreshock.reader import open_run
from foreshock.records import Coverage, Reading, Site, SiteStatus
from foreshock.store import RunStore
from foreshock.tables import FILE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = RunStore(tmp_path / "runs" / "one")
    for step in range(400):
        store.write(
            step, [Reading("run/loss", None, np.array([step])), Reading("router/load", "r", np.array([1.0, 2.0]))]
        )
    site = Site("r", "layers.0.router", "router", "topk", experts=2, top_k=1)
    store.coverage(Coverage((SiteStatus(site, 1, 1, {}), SiteStatus(site, 2, 2, {}))))
    store.close()
    return tmp_path / "runs" / "one"


def test_sites_and_steps(folder: Path) -> None:
    with open_run(folder) as run:
        assert [site.name for site in run.sites] == ["layers.0.router"]
        assert run.steps.tolist() == list(range(400))
        assert run.name == "one"
        assert (run.alarms, run.meta) == ([], {})


def test_frame_is_long(folder: Path) -> None:
    pytest.importorskip("pandas")
    with open_run(folder / FILE) as run:
        frame = run.to_pandas()
    assert list(frame.columns) == ["step", "metric", "site", "index", "value"]
    assert len(frame) == 400 * 3
    loads = frame[frame.metric == "router/load"]
    assert loads[loads["index"] == 1].value.unique().tolist() == [2.0]


def test_without_pandas_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with open_run(folder) as run, pytest.raises(RunError, match="pip install"):
        run.to_pandas()


def test_reading_never_writes(folder: Path) -> None:
    before = (folder / FILE).read_bytes()
    with open_run(folder) as run:
        run.series("run/loss")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            run._db.execute("DELETE FROM tail")
    assert (folder / FILE).read_bytes() == before


def test_an_empty_run_is_a_run(tmp_path: Path) -> None:
    RunStore(tmp_path).flush()
    with open_run(tmp_path) as run:
        assert (run.sites, run.metrics(), run.steps.tolist()) == ([], [], [])
        assert len(run.to_pandas()) == 0


def test_missing(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(RunError, match="no such folder; pass"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"holds no run\.sqlite"):
        open_run(tmp_path)
    with pytest.raises(RunError, match=r"pass one of .*one"):
        open_run(folder.parent)


def test_damaged(folder: Path) -> None:
    file = folder / FILE
    whole = file.read_bytes()
    file.write_bytes(b"no database at all" * 99)
    with pytest.raises(RunError, match="damaged") as caught:
        open_run(folder)
    assert "\n" not in str(caught.value)
    file.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(RunError, match="damaged"), open_run(folder) as run:
        run.series("router/load")


def test_another_database(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("CREATE TABLE recipe (name TEXT)")
    db.close()
    with pytest.raises(RunError, match="not a foreshock run"):
        open_run(tmp_path)


def test_a_newer_format(folder: Path) -> None:
    with sqlite3.connect(folder / FILE) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(RunError, match="upgrade foreshock"):
        open_run(folder)
    with pytest.raises(RunError, match="format 99"):
        RunStore(folder).flush()
