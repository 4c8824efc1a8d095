"""The report is one page that needs nothing else, says first what matters, and never breaks on an odd run."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreshock.errors import RunError
from foreshock.monitors.laws import floor
from foreshock.monitors.report import write_report
from foreshock.monitors.report_data import anchor
from foreshock.monitors.report_page import asset, library, policy
from foreshock.monitors.report_thin import Packed, extremes, odd, thin
from foreshock.reader import open_run
from foreshock.records import Alarm, Coverage, Reading, Site, SiteStatus
from foreshock.store import RunStore

EVIL = "</script><script>alert(1)</script>"
VOID = {"meta", "input", "br", "link", "img"}


def site(id_: str, name: str) -> Site:
    return Site(id_, name, "attention", "sdpa", heads=2, kv_heads=2, head_dim=8, dtype="bfloat16")


def alarm(step: int, **more: object) -> Alarm:
    values = {"site": "a", "metric": "law/euler", "value": 0.5, "expected": "< 0.01", "severity": "critical"}
    words = {"mechanism": "wrong attention backward", "evidence": ("law/euler left",), "message": "the kernel is wrong"}
    return Alarm(step=step, onset=step - 5, **{"confidence": "proved", **values, **words, **more})  # type: ignore[arg-type]


def page(store: RunStore) -> str:
    store.flush()
    store.close()
    with open_run(store.path) as run:
        return write_report(run, store.path.with_name("out") / "report.html").read_text()


class Parsed(HTMLParser):
    """Elements as (tag, attributes), the text outside of scripts and styles, and what scripts hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def attributes(self, name: str) -> Iterator[str]:
        return (str(found[name]) for _, found in self.elements if name in found)

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def recorded(folder: Path, steps: int = 50) -> RunStore:
    """Two heads of one attention, the second of which breaks Euler's law from step 25 on; a loss, and a user's own metric."""
    store = RunStore(folder)
    for step in range(steps):
        euler = np.array([1e-3, 0.5 if step >= 25 else 2e-3])
        readings = [Reading("law/euler", "a", euler), Reading("run/loss", None, np.array([2.0]))]
        store.write(step, [*readings, Reading("mine/metric", "a", np.ones(3))])
    return store


def test_it_says_since_when_where_what_to_do_and_how_sure(tmp_path: Path) -> None:
    store = recorded(tmp_path / "run")
    store.alarm(alarm(30, head=1))
    laws = {"law/euler": "", "law/value_mass": "dropout on P"}
    watched = (SiteStatus(site("a", "layers.0"), 9, 3, laws, ("a note",)),)
    store.coverage(Coverage(watched, ("lm_head",), ("print",), ("loop",), ("look",)))
    store.meta(cost={"share": 0.012}, every=10)
    found = Parsed(page(store))
    head = found.text[
        : found.text.index("Alarms In") if "Alarms In" in found.text else found.text.index("The alarm and its")
    ]
    answers = (
        "▲ critical Not healthy since about step 25",
        "Where layers.0, key/value head 1",
        "Since when About step 25; heard at step 30, 5 steps later. The run is at step 49.",
        "What to do Compare the kernel's backward with a reference",
        "Checkpoints up to step 25 are from before it.",
        "How sure Proved: an identity of every correct kernel is broken",
    )
    places = [head.index(answer) for answer in answers]
    assert places == sorted(places), "in the order in which they are asked"
    for expected in (
        "value_mass not checked: dropout on P",
        "a note",
        "lm_head",
        "Graph breaks print",
        "Left to eager loop",
        "1 attention site; 1 candidate left out; 1 graph break; 1 left to eager; 1 warning",
        "0.012",
        "law/euler ▲ broken",
        "25 of 50, last at 49",
    ):
        assert expected in found.text, expected
    ids = list(found.attributes("id"))
    assert len(ids) == len(set(ids))
    assert {"alarm-1", "m-law-euler", "m-run-loss", "m-mine-metric", "coverage", "cost"} <= set(ids)
    assert {link[1:] for link in found.attributes("href") if link.startswith("#")} <= set(ids), (
        "every link leads somewhere"
    )


def test_alarms_stand_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    store = recorded(tmp_path)
    store.alarm(alarm(20, mechanism="unknown", severity="warning"))
    store.alarm(alarm(45, mechanism="data fault"))
    store.alarm(alarm(40, mechanism="router collapse", confidence="possible", severity="warning"))
    text = Parsed(page(store)).text
    assert "critical Not healthy since about step 35" in text  # by its cause, at its worst
    assert "2 more alarms" in text
    assert text.index("35 40 router collapse") < text.index("40 45 data fault") < text.index("15 20 unknown")


def test_a_quiet_run_is_healthy(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write(1, [Reading("attention/entropy", "a", np.array([1.0, 2.0]))])
    store.coverage(Coverage((SiteStatus(site("a", "layers.0"), 1, 1, {}),)))
    found = Parsed(page(store))
    assert "● good Healthy in steps 1 Alarms None at 1 watched site. What to do Nothing." in found.text
    assert "Only 1 steps were recorded" in found.text
    assert "alarms" not in found.attributes("id")


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for step in range(3):
        store.write(step, [Reading(f"x/{EVIL}", EVIL, np.ones(2)), Reading("law/euler", EVIL, np.ones(2))])
    status = SiteStatus(site(EVIL, EVIL), 1, 1, {EVIL: EVIL}, (EVIL,))
    store.coverage(Coverage((status,), (EVIL,), (EVIL,), (EVIL,), (EVIL,)))
    store.alarm(
        alarm(
            2, site=EVIL, message=EVIL, mechanism=EVIL, evidence=(EVIL,), expected=EVIL, severity=EVIL, confidence=EVIL
        )
    )
    store.meta(**{EVIL: EVIL})
    html = page(store)
    assert EVIL not in html
    assert "<script>alert" not in html
    found = Parsed(html)
    assert sum(tag == "script" for tag, _ in found.elements) == 4  # data, Plotly, figures, page
    assert found.data["sites"] == [EVIL]
    assert found.text.count(EVIL) > 8
    assert not any("<" in id_ for id_ in found.attributes("id"))


def test_it_needs_no_network_and_runs_no_other_script(tmp_path: Path) -> None:
    html = page(recorded(tmp_path))
    found = Parsed(html)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html.replace(library(), ""))
    assert "url(" not in asset("report.css")
    [admitted] = [text for text in found.attributes("content") if "script-src" in text]
    assert admitted == policy((library(), asset("chart.js"), asset("report.js")), live=False)
    assert "connect-src 'none'" in admitted
    assert "unsafe" not in admitted.replace("style-src 'unsafe-inline';", "")
    for _, attributes in found.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), "the policy would not run it"


def test_it_can_be_read_without_a_mouse_or_colours(tmp_path: Path) -> None:
    store = recorded(tmp_path)
    store.alarm(alarm(30))
    found = Parsed(page(store))
    tags = [tag for tag, _ in found.elements]
    assert next(a["href"] for tag, a in found.elements if tag == "a") == "#content", (
        "the first stop skips what is repeated"
    )
    assert tags.count("h1") == tags.count("main") == 1
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    assert ("html", {"lang": "en"}) in found.elements
    assert "▲ critical" in found.text  # a word and a shape beside the colour
    style = asset("report.css")
    for needed in (":focus-visible", "prefers-color-scheme: dark", "@media print", "prefers-reduced-motion"):
        assert needed in style


@pytest.mark.parametrize("values", [[np.nan], [np.inf, -np.inf], [0.0, np.nan], [-1.0, 1e38], [0.0]])
@pytest.mark.parametrize("steps", [1, 4])
def test_odd_numbers_do_not_break_it(tmp_path: Path, values: list[float], steps: int) -> None:
    store = RunStore(tmp_path)
    for step in range(steps):
        for metric in ("law/euler", "law/bias_t", "law/bias", "router/entropy", "attention/nonfinite"):
            store.write(step, [Reading(metric, "a", np.array(values))])
        store.write(step, [Reading("run/loss", None, np.array(values[:1]))])
    store.coverage(Coverage((SiteStatus(site("a", "layers.0"), 1, 1, {}),)))
    store.alarm(alarm(1, site=None, value=float("nan")))
    found = Parsed(page(store))
    assert "the whole run" in found.text
    (loss,) = [series for series in found.data["series"] if found.data["metrics"][series["m"]]["name"] == "run/loss"]
    what = "NaN" if np.isnan(values[0]) else "infinite"
    assert loss["odd"] == ([] if np.isfinite(values[0]) else [[step, what] for step in range(steps)])


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    text = Parsed(page(RunStore(tmp_path))).text
    assert "Nothing to judge: no step was recorded" in text
    assert "No site was found." in text


def test_a_place_that_refuses_is_named(tmp_path: Path) -> None:
    RunStore(tmp_path).flush()
    (tmp_path / "file").write_text("")
    with open_run(tmp_path) as run, pytest.raises(RunError, match="pass another file with -o"):
        write_report(run, tmp_path / "file" / "report.html")


def test_a_million_numbers_stay_small(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    rng = np.random.default_rng(0)
    names = ("lse", "sink", "q_rms", "x", "y")
    for step in range(2500):
        store.write(step, [Reading(f"attention/{m}", f"l{i}", rng.normal(size=4)) for i in range(20) for m in names])
    html = page(store)
    assert len(html) < 10e6
    assert len(html) - len(library()) < 3e6


def test_many_heads_leave_room_for_the_ones_that_matter(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for step in range(300):
        readings = [Reading(name, f"l{i}", np.ones(128)) for i in range(30) for name in ("law/euler", "attention/lse")]
        store.write(step, readings)
    store.alarm(alarm(200, site="l7", metric="attention/lse"))
    html = page(store)
    assert len(html) < 10e6
    data = Parsed(html).data
    held = {(data["metrics"][s["m"]]["name"], data["sites"][s["s"]]) for s in data["series"] if "heads" in s}
    assert ("attention/lse", "l7") in held
    assert {("law/euler", f"l{i}") for i in range(30)} <= held
    assert ("attention/lse", "l9") not in held


def test_thinning_keeps_the_spikes() -> None:
    values = np.zeros(10_001)
    values[[17, 5003]] = 9, -9
    values[100:300] = np.nan
    values[7000] = np.inf
    steps, thinned = thin(np.arange(10_001), values, 100)
    assert len(steps) <= 100
    assert {17, 5003} <= set(steps.tolist())
    assert thinned[steps.tolist().index(5003)] == -9
    assert not np.isinf(thinned).any()
    assert odd(np.arange(10_001), values[:, None], whole=False) == [[7000, "infinite"]]
    assert len(odd(np.arange(10_001), values[:, None], whole=True)) == 200  # and 200 of NaN, thinned


def test_heads_keep_their_extremes() -> None:
    values = np.zeros((1001, 3))
    values[[17, 503], 1] = 9, -9
    values[900, 2] = np.inf
    steps, rows, pairs = extremes(np.arange(1001), values, 100)
    assert (len(steps), rows.shape, pairs) == (100, (3, 100), True)
    assert (np.diff(steps) >= 0).all()
    assert (rows.min(1).tolist(), rows.max(1).tolist()) == ([0, -9, 0], [0, 9, np.inf])
    assert extremes(np.arange(5), values[:5], 100)[2] is False


def test_packed_numbers_come_back() -> None:
    packed, values = Packed(), np.array([0.0, -1.25, 3.14159, 1e38, 3.37e38, np.inf, -np.inf, np.nan])
    assert packed.halves(values) == 0
    assert packed.floats(values) == 1
    assert packed.floats(values.copy()) == 1, "each array once"
    kinds = {"h": "<u2", "f": "<f4"}
    halves, floats = (np.frombuffer(base64.b64decode(text[1:]), kinds[text[0]]) for text in packed.texts)
    back = (halves.astype("<u4") << 16).view("<f4")
    np.testing.assert_allclose(back, values, rtol=2**-8)
    np.testing.assert_array_equal(floats, values.astype("<f4"))


def test_floors_are_those_that_laws_are_judged_by(tmp_path: Path) -> None:
    store = recorded(tmp_path)
    store.coverage(Coverage((SiteStatus(site("a", "layers.0"), 1, 1, {}),)))
    data = Parsed(page(store)).data
    (euler,) = [series for series in data["series"] if data["metrics"][series["m"]]["name"] == "law/euler"]
    assert euler["beyond"]["worst"] == pytest.approx(0.5 / floor("euler", "bfloat16"))
    assert (euler["beyond"]["head"], euler["beyond"]["count"], euler["beyond"]["last"]) == (1, 25, 49)


@pytest.mark.parametrize(("held", "dtype"), [({"kernel_dtype": None, "tf32": True}, "tf32"), ({}, "float32")])
def test_floors_follow_what_the_run_was_held_to(tmp_path: Path, held: dict[str, Any], dtype: str) -> None:
    store = recorded(tmp_path)
    exact = Site("a", "layers.0", "attention", "sdpa", dtype="float32")
    store.coverage(Coverage((SiteStatus(exact, 1, 1, {}),)))
    store.meta(held_to=held)
    data = Parsed(page(store)).data
    (euler,) = [series for series in data["series"] if "beyond" in series]
    assert euler["beyond"]["worst"] == pytest.approx(0.5 / floor("euler", dtype))


def test_ids_of_metrics_differ() -> None:
    names = ["law/euler", "attention/delta2_norm", "attention/delta2_norm@50", "x/a b", "x/a-b", "x/a.b", EVIL]
    assert len({anchor(name) for name in names}) == len(names)
    assert all(re.fullmatch(r"m-[\w-]+", anchor(name)) for name in names)
