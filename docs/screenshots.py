"""Take the pictures of docs/report.md in Debian's Chromium, from a run of `foreshock demo`: ``python docs/screenshots.py RUN``.

Without RUN it is runs/demo/attention, which `make demo` leaves. `CHROMIUM` names another browser.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

import foreshock
from foreshock.monitors.report import write_report

HERE = Path(__file__).parent
DRAWN = ".plot .lines path.js-line"


@dataclass(frozen=True)
class Picture:
    """docs/NAME.png: what is at the top, once these figures are drawn; width and height in pixels."""

    name: str
    scheme: str
    size: tuple[int, int]
    at: str = "html"
    figures: tuple[str, ...] = ("#alarm-1-chart",)


LAWS = ("#m-law-key-shift", "#m-law-value-mass", "#m-law-euler", "#m-law-hull")
PICTURES = (
    Picture("report", "light", (1280, 1170)),
    Picture("report-dark", "dark", (1280, 1170)),
    Picture("report-laws", "light", (1280, 1000), LAWS[0], LAWS),
    Picture("report-phone", "dark", (390, 1150), figures=()),
)


def take(browser: Any, address: str, picture: Picture) -> None:
    width, height = picture.size
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=picture.scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(address)
    page.locator(picture.at).evaluate("(one) => one.scrollIntoView()")
    for figure in picture.figures:
        page.locator(f"{figure} {DRAWN}").first.wait_for(state="attached")
    page.locator(picture.at).evaluate("(one) => one.scrollIntoView()")  # what was drawn above moved it
    page.wait_for_timeout(500)
    page.screenshot(path=HERE / f"{picture.name}.png")
    context.close()


def main() -> None:
    """Write the pictures."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/attention")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or sys.exit("apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = Path(folder) / "report.html"
        with foreshock.open_run(run) as opened:
            write_report(opened, report)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for picture in PICTURES:
            take(browser, report.as_uri(), picture)
            print(HERE / f"{picture.name}.png")
        browser.close()


if __name__ == "__main__":
    main()
