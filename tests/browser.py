"""A real browser for tests of pages: Debian's Chromium, driven by Playwright; without either a test is skipped and says so.

Where `CI` is set it fails instead, so that no green run has left the pages out.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest

# Without a sandbox, as root in a container needs it, and without the background traffic of a desktop browser.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


def leave(reason: str) -> NoReturn:
    """Skip, or fail where nobody reads what was skipped."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser object."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        leave("no chromium on this machine: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        leave("no playwright: pip install playwright")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, address: str, *, width: int = 1200, scheme: str = "light", but: str = "\n") -> Iterator[Any]:
    """A page at ``address`` that has written nothing to its console when it is left, ``but`` lines with this in them."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, told = context.new_page(), []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    try:
        page.goto(address)
        yield page
    finally:
        context.close()
    assert [text for text in told if but not in text] == []


def until(holds: Callable[[], bool], seconds: float = 5) -> None:
    """Wait for it; a page's policy lets Playwright's own waiting evaluate nothing."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def drawn(page: Any, figure: str) -> int:
    """How many lines Plotly has drawn in a figure."""
    lines = page.locator(f"{figure} .plot .lines path.js-line")
    lines.first.wait_for(state="attached")
    return sum(len(path or "") > 20 for path in lines.evaluate_all("(all) => all.map((one) => one.getAttribute('d'))"))
