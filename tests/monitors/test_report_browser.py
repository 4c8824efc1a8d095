"""The report in a real browser: its figures are drawn, its links jump, it fits a phone, a keyboard reads it, it opens at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, drawn, opened, until

from foreshock.monitors.report import write_report
from foreshock.reader import open_run
from foreshock.records import Alarm, Coverage, Reading, Site, SiteStatus
from foreshock.store import RunStore

SITES = 4
ROUTERS, EXPERTS, BUSY = 2, 8, 5
NAME = "<b>layers</b>.{}.attention"  # shown as text
EULER = "#m-law-euler"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four attentions of three heads; head 1 of the third breaks Euler's law from step 400 on, and the loss is once infinite.
    Two routers of eight experts; the second gives expert 5 more and more."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    store = RunStore(folder)
    for step in range(0, 1000, 10):
        store.write(step, [Reading("run/loss", None, np.array([np.inf if step == 500 else 3 + rng.normal()]))])
        for i in range(SITES):
            euler = np.abs(rng.normal(size=3)) * 1e-3
            euler[1] += 0.4 * (i == 2 and step >= 400)
            entropy = 0.7 + 0.02 * rng.normal(size=3)
            store.write(
                step, [Reading("law/euler", f"s{i}", euler), Reading("attention/entropy_norm", f"s{i}", entropy)]
            )
            store.write(step, [Reading("attention/q_rms", f"s{i}", np.ones(3))])
        for i in range(ROUTERS):
            load = np.full(EXPERTS, 1 / EXPERTS) + (np.eye(EXPERTS)[BUSY] - 1 / EXPERTS) * i * step / 1980
            store.write(step, [Reading("router/load", f"r{i}", load)])
    sites = [
        Site(f"s{i}", NAME.format(i), "attention", "sdpa", heads=3, kv_heads=3, dtype="bfloat16") for i in range(SITES)
    ]
    sites += [Site(f"r{i}", f"layers.{i}.router", "router", "topk", experts=EXPERTS, top_k=2) for i in range(ROUTERS)]
    store.coverage(
        Coverage(tuple(SiteStatus(site, 100, 100, {"law/euler": ""} if site.heads else {}) for site in sites))
    )
    evidence = ("law/euler at the third is 0.4", "attention/q_rms is not off")
    words = ("critical", "wrong attention backward", evidence, "it is off")
    sure = {"head": 1, "onset_interval": (390, 400), "confidence": "proved"}
    store.alarm(Alarm(410, 400, "s2", "law/euler", 0.4, "at most 0.06", *words, **sure))
    store.close()
    with open_run(folder) as run:
        return write_report(run, folder / "report.html").as_uri()


def test_figures_are_drawn_where_they_are_seen(browser: Any, report: str) -> None:
    with opened(browser, report) as page:
        assert drawn(page, "#alarm-1-chart") == 5  # three heads, the floor, and dots where a head is above it
        assert page.locator("#alarm-1-chart .heatmaplayer image").count() == 1
        assert page.locator("#alarm-1-chart .readout").inner_text().startswith("Last, at step 990: 0.4")
        assert page.locator("h1").count() == 1
        assert page.locator("body b").count() == 0, "names are text"
        assert "<b>layers</b>.2.attention" in page.locator("#verdict").inner_text()
        assert page.locator("#m-attention-q-rms .plot").count() == 0, "what is folded away is drawn when it is seen"
        page.locator(EULER).scroll_into_view_if_needed()
        assert drawn(page, EULER) == SITES + 2  # likewise
        page.locator("#m-run-loss").scroll_into_view_if_needed()
        until(lambda: "not finite at 1 step" in page.locator("#m-run-loss .readout").inner_text())
        assert "not finite" in page.locator("#m-run-loss .legend").text_content()
        heard = page.locator("#alarm-1-chart .legend").text_content()
        assert "floor" in heard
        assert "alarm heard" in heard
        assert "began" in heard


def test_links_of_an_alarm_jump_to_its_figures(browser: Any, report: str) -> None:
    with opened(browser, report) as page:
        page.get_by_role("link", name="law/euler", exact=True).first.click()
        assert page.locator(f"{EULER} select").input_value() == "2", "at the alarm's site"
        assert page.locator(f"{EULER} select").evaluate("(one) => one === document.activeElement")
        until(lambda: 0 <= page.locator(EULER).bounding_box()["y"] < 300)
        folded = page.locator("#m-attention-q-rms")
        assert not folded.is_visible()
        page.get_by_role("link", name="attention/q_rms").click()
        folded.locator(".plot").wait_for(state="visible")
        page.get_by_role("link", name="The alarm and its evidence").click()
        assert page.evaluate("document.activeElement.id") == "alarm-1"
    with opened(browser, f"{report}#m-attention-q-rms") as page:
        page.locator("#m-attention-q-rms .plot").wait_for(state="visible")


@pytest.mark.slow
def test_one_site_shows_its_heads(browser: Any, report: str) -> None:
    with opened(browser, report) as page:
        panel = page.locator(EULER)
        panel.scroll_into_view_if_needed()
        panel.locator("select").select_option(label="<b>layers</b>.1.attention")
        until(lambda: "key/value head 2" in panel.locator(".legend").text_content())
        panel.locator("summary").click()
        until(lambda: panel.locator("tbody tr").count() == 3)
        panel.locator("select").select_option(value="-1")
        assert panel.locator("tbody tr").count() == SITES


def test_one_router_shows_its_experts(browser: Any, report: str) -> None:
    with opened(browser, f"{report}#m-router-load") as page:
        panel = page.locator("#m-router-load")
        assert drawn(page, "#m-router-load") == ROUTERS
        panel.locator("select").select_option(label="layers.1.router")
        until(lambda: f"expert {EXPERTS - 1}" in panel.locator(".legend").text_content())
        assert drawn(page, "#m-router-load") == EXPERTS + 2  # and the edges of the band
        panel.locator(".numbers summary").click()
        rows = panel.locator("tbody tr")
        until(lambda: rows.count() == EXPERTS)
        last = {(cells := row.split("\t"))[0]: float(cells[1]) for row in rows.all_inner_texts()}
        assert max(last, key=last.__getitem__) == f"expert {BUSY}"
        assert sum(last.values()) == pytest.approx(1, abs=0.01)


def test_where_nobody_reads_what_is_skipped_a_missing_browser_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CHROMIUM", raising=False)
    for set_, outcome in (("", pytest.skip.Exception), ("true", pytest.fail.Exception)):
        monkeypatch.setenv("CI", set_)
        with pytest.raises(outcome, match="apt-get install chromium"), chromium():
            pass


def test_it_fits_a_phone(browser: Any, report: str) -> None:
    with opened(browser, report, width=390) as page:
        page.locator("summary").evaluate_all("(all) => all.forEach((one) => { one.parentElement.open = true; })")
        page.wait_for_timeout(200)
        wide = """() => [...document.querySelectorAll("main *")].filter((one) => {
            const box = one.getBoundingClientRect();
            return box.width && box.right > innerWidth + 1;
        }).map((one) => one.outerHTML.slice(0, 80))"""
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate(wide) == []


@pytest.mark.slow
def test_a_keyboard_reads_the_figures(browser: Any, report: str) -> None:
    with opened(browser, report) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        outlined = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outlined) == "solid"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"
        drawn(page, "#alarm-1-chart")
        numbers = page.locator("#alarm-1-chart summary")
        for _ in range(14):
            page.keyboard.press("Tab")
            if numbers.evaluate("(one) => one === document.activeElement"):
                break
        assert page.evaluate(outlined) == "solid"
        page.keyboard.press("Enter")
        until(lambda: page.locator("#alarm-1-chart tbody tr").count() == 3)
        assert "key/value head 1" in page.locator("#alarm-1-chart tbody").inner_text()
        told = page.locator("#alarm-1-chart .plot").get_attribute("aria-label")
        assert told.startswith("law/euler, <b>layers</b>.2.attention: 3 lines, from")


@pytest.mark.slow
def test_a_pointer_reads_the_figures(browser: Any, report: str) -> None:
    with opened(browser, report) as page:
        drawn(page, "#alarm-1-chart")
        plot = page.locator("#alarm-1-chart .nsewdrag").first
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        until(lambda: _hovered(page, box))
        assert "step 990" in page.locator("#alarm-1-chart .hovertext").text_content()


def _hovered(page: Any, box: dict[str, float]) -> bool:
    for down in range(4, int(box["height"]), 6):  # along the edge of the last sample, until a line is under it
        page.mouse.move(box["x"] + box["width"] - 1, box["y"] + down)
        page.wait_for_timeout(60)
        if page.locator("#alarm-1-chart .hovertext").count():
            return True
    return False


@pytest.mark.slow
def test_dark_is_dark_and_the_switch_stays(browser: Any, report: str) -> None:
    page_color = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, report, scheme="dark") as page:
        assert page.evaluate(page_color) == "rgb(14, 17, 20)"
        drawn(page, "#alarm-1-chart")
        legend = page.locator("#alarm-1-chart .legendtext").first
        fill = "(one) => getComputedStyle(one).fill"
        assert legend.evaluate(fill) == "rgb(163, 173, 184)"
        page.get_by_label("Colours").select_option("light")
        until(lambda: legend.evaluate(fill) == "rgb(86, 96, 107)")
        assert page.evaluate(page_color) == "rgb(244, 245, 247)"
        page.reload()
        assert page.evaluate(page_color) == "rgb(244, 245, 247)"
    with opened(browser, report) as page:
        assert page.evaluate(page_color) == "rgb(244, 245, 247)"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out(browser: Any, report: str, scheme: str) -> None:
    """A contrast of 4.5 between text and its ground, as WCAG 2 AA asks for."""
    pairs = """() => [...document.querySelectorAll("main *, header *")].filter((one) => one.innerText && one.offsetWidth
            && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim())).map((one) => {
        let ground = one;
        while (ground && getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
        return [one.innerText.slice(0, 30), getComputedStyle(one).color, getComputedStyle(ground || document.body).backgroundColor];
    })"""
    with opened(browser, report, scheme=scheme) as page:
        for text, color, ground in page.evaluate(pairs):
            light, dark = sorted((_luminance(color), _luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, color, ground)


def _luminance(color: str) -> float:
    values = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.slow
def test_what_is_printed_holds_the_verdict(browser: Any, report: str) -> None:
    with opened(browser, report, scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.locator("#verdict").is_visible()
        assert not page.locator("#theme").is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.slow
def test_a_million_numbers_open_in_two_seconds(browser: Any, tmp_path: Path) -> None:
    store, rng = RunStore(tmp_path), np.random.default_rng(0)
    names = ("law/euler", "attention/lse", "attention/sink", "attention/logit_max", "attention/entropy_norm")
    for step in range(2500):
        store.write(step, [Reading(m, f"l{i}", np.abs(rng.normal(size=4))) for i in range(20) for m in names])
        if step % 500 == 0:
            store.flush()
    store.close()
    with open_run(tmp_path) as run:
        path = write_report(run, tmp_path / "report.html")
    assert path.stat().st_size < 10e6
    with opened(browser, "about:blank") as page:
        told = page.context.new_cdp_session(page)
        told.send("Performance.enable", {"timeDomain": "threadTicks"})  # processor time
        page.goto(path.as_uri())
        assert drawn(page, "figure:has(.plot)") > 1
        took = {one["name"]: one["value"] for one in told.send("Performance.getMetrics")["metrics"]}["TaskDuration"]
    assert took < 2, "seconds of the page's thread until the first figure stands"
