"""The report is one page that needs nothing else, shows what a run holds, and never breaks on an odd one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from foreshock.errors import RunError
from foreshock.monitors.report import write_report
from foreshock.monitors.report_figures import thin
from foreshock.reader import open_run
from foreshock.records import Alarm, Coverage, Reading, Site, SiteStatus
from foreshock.store import RunStore

EVIL = "</script><script>alert(1)</script>"


def site(id_: str, name: str) -> Site:
    return Site(id_, name, "attention", "sdpa", heads=2, kv_heads=2, head_dim=8)


def alarm(step: int, **more: object) -> Alarm:
    values = {"site": "a", "metric": "law/euler", "value": 0.5, "expected": "< 0.01", "severity": "critical"}
    words = {"mechanism": "wrong attention backward", "evidence": ("euler left",), "message": "the kernel is wrong"}
    return Alarm(step=step, onset=step - 5, **{**values, **words, **more})  # type: ignore[arg-type]


def page(store: RunStore) -> str:
    store.flush()
    store.close()
    with open_run(store.path) as run:
        return write_report(run, store.path.with_name("out") / "report.html").read_text()


def own(html: str) -> str:
    """The page without plotly's own script."""
    return re.sub(r"<script>.*?</script>", "", html, count=1, flags=re.S)


def test_it_says_since_when_where_and_what_to_do(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    for step in range(50):
        readings = [Reading("law/euler", "a", np.array([1e-3, 2e-3])), Reading("run/loss", None, np.array([2.0]))]
        store.write(step, [*readings, Reading("mine/metric", "a", np.ones(3))])
    store.alarm(alarm(30, head=1))
    laws = {"euler": "", "value_mass": "dropout on P"}
    store.coverage(
        Coverage(
            (SiteStatus(site("a", "layers.0"), 9, 3, laws, ("a note",)),),
            ("lm_head",),
            ("print",),
            ("loop",),
            ("look",),
        )
    )
    store.meta(cost={"share": 0.012}, every=10)
    text = own(page(store))
    for expected in (
        "Not healthy since about step 25",
        "layers.0, head 1",
        "the kernel is wrong",
        "Compare the kernel&#39;s backward",
        "not value_mass: dropout on P",
        "a note",
        "lm_head",
        "<h3>Graph breaks</h3><ul><li>print</li>",
        "<h3>Left to eager</h3><ul><li>loop</li>",
        "1 attention site; 1 candidate left out; 1 graph break; 1 left to eager; 1 warning",
        "0.012",
        'id="heat-2"',
        'id="curve-1"',
        "<h3>mine/metric</h3>",
        'id="loss"',
    ):
        assert expected in text


def test_a_quiet_run_is_healthy(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write(1, [Reading("attention/entropy", "a", np.array([1.0, 2.0]))])
    store.coverage(Coverage((SiteStatus(site("a", "layers.0"), 1, 1, {}),)))
    text = own(page(store))
    assert "Healthy in steps 1" in text
    assert "<h2>Alarms</h2>" not in text


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for step in range(3):
        store.write(step, [Reading(f"x/{EVIL}", EVIL, np.ones(2)), Reading("law/euler", EVIL, np.ones(2))])
    store.coverage(
        Coverage((SiteStatus(site(EVIL, EVIL), 1, 1, {EVIL: EVIL}, (EVIL,)),), (EVIL,), (EVIL,), (EVIL,), (EVIL,))
    )
    store.alarm(alarm(2, site=EVIL, message=EVIL, mechanism=EVIL, evidence=(EVIL,), expected=EVIL, severity=EVIL))
    store.meta(**{EVIL: EVIL})
    text = own(page(store))
    assert EVIL not in text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_it_needs_no_network(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write(1, [Reading("run/loss", None, np.array([2.0]))])
    html = page(store)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", own(html))
    assert "Plotly.newPlot" in own(html)
    assert html.count("plotly.js v") == 1


@pytest.mark.parametrize("values", [[np.nan], [np.inf, -np.inf], [0.0, np.nan], [-1.0, 1e38], [0.0]])
@pytest.mark.parametrize("steps", [1, 4])
def test_odd_numbers_do_not_break_it(tmp_path: Path, values: list[float], steps: int) -> None:
    store = RunStore(tmp_path)
    for step in range(steps):
        for metric in ("law/euler", "law/bias_t", "router/entropy", "attention/nonfinite"):
            store.write(step, [Reading(metric, "a", np.array(values))])
        store.write(step, [Reading("run/loss", None, np.array(values[:1]))])
    store.alarm(alarm(1, site=None, value=float("nan")))
    assert "1 alarm" in page(store)


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    assert "Nothing to judge: no step was recorded" in page(RunStore(tmp_path))


def test_a_place_that_refuses_is_named(tmp_path: Path) -> None:
    RunStore(tmp_path).flush()
    (tmp_path / "file").write_text("")
    with open_run(tmp_path) as run, pytest.raises(RunError, match="pass another file with -o"):
        write_report(run, tmp_path / "file" / "report.html")


def test_a_million_numbers_stay_small(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    rng = np.random.default_rng(0)
    for step in range(2500):
        store.write(
            step,
            [
                Reading(f"attention/{m}", f"l{i}", rng.normal(size=4))
                for i in range(20)
                for m in ("lse", "sink", "q_rms", "x", "y")
            ],
        )
    assert len(page(store)) < 10e6


def test_thinning_keeps_the_spikes() -> None:
    values = np.zeros(10_001)
    values[[17, 5003]] = 9, -9
    values[100:300] = np.nan
    steps, thinned = thin(np.arange(10_001), values, 100)
    assert len(steps) <= 100
    assert {17, 5003} <= set(steps.tolist())
    assert thinned[steps.tolist().index(5003)] == -9
