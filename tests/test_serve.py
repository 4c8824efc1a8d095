"""``foreshock watch --web``: what it answers, whom it refuses, and a browser that keeps its place while the run goes on."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, drawn, opened, until
from writing import FAULT, NAME, write

from foreshock import serve as module
from foreshock.errors import RunError
from foreshock.monitors.report_page import library
from foreshock.serve import Server
from foreshock.store import RunStore


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page stands as short as it takes to make it."""
    monkeypatch.setattr(module, "EVERY", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    found = RunStore(tmp_path / "run")
    for step in range(10):
        write(found, step)
    yield found
    found.close()


@pytest.fixture
def server(store: RunStore) -> Iterator[Server]:
    yield from _serving(store.path.parent)


def _serving(folder: Path) -> Iterator[Server]:
    with Server(str(folder), 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", host: str | None = None) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return found


def version(server: Server) -> str:
    return str(json.loads(ask(server, "/changes")[1])["version"])


def test_it_serves_the_report_and_its_version(server: Server) -> None:
    status, page, headers = ask(server, "/")
    assert status == 200
    assert "Healthy in steps 0 to 9" in page
    assert f'data-version="{version(server)}"' in page
    assert "connect-src &#39;self&#39;" in page
    assert "[bold]layers" in page
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert "python" not in headers["server"].lower()


def test_a_flush_is_a_new_version(server: Server, store: RunStore) -> None:
    before = version(server)
    assert version(server) == before
    write(store, 10)
    until(lambda: version(server) != before)
    assert "Healthy in steps 0 to 10" in ask(server, "/")[1]


def test_a_page_stands_for_a_while(server: Server, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 60.0)
    first = ask(server, "/")[1]
    write(store, 10)
    assert ask(server, "/")[1] == first
    assert f'data-version="{version(server)}"' in first


REFUSED = [
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1.evil.example:{port}",
    "localhost.evil.example",
    "evil.localhost:1",
    "",
]
REFUSED += [
    "127.0.0.1@evil.example",
    "127.0.0.1:80.evil.example",
    "127.0.0.1:",
    "127.0.0.10",
    "localhost:8642,evil.example",
    "[::1]",
]


@pytest.mark.parametrize("host", REFUSED)
def test_another_host_is_refused(server: Server, host: str) -> None:
    for path in ("/", "/changes"):
        status, text, _ = ask(server, path, host=host.format(port=server.server_port))
        assert status == 421
        assert "layers" not in text


@pytest.mark.parametrize("host", ["localhost:{port}", "127.0.0.1:{port}", "localhost:9000", "127.0.0.1", "Localhost:1"])
def test_this_machine_is_answered_by_any_port(server: Server, host: str) -> None:
    """The near end of an SSH tunnel has a port of its own."""
    assert ask(server, "/changes", host=host.format(port=server.server_port))[0] == 200


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/run.sqlite", 404), ("GET", "/../run.sqlite", 404), ("GET", "/?a=1", 404), ("GET", "//evil.example/", 404),
    ("POST", "/", 501), ("PUT", "/", 501), ("DELETE", "/", 501), ("OPTIONS", "/", 501),
])  # fmt: skip
def test_nothing_else_is_answered(server: Server, method: str, path: str, status: int) -> None:
    assert ask(server, path, method)[0] == status


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(RunError, match="pass another with --port"):
        Server(str(server.pages._following.file.parent), server.server_port)
    with pytest.raises(RunError, match="there is no such folder"):
        Server("nowhere", 0)


def test_a_run_is_waited_for(tmp_path: Path) -> None:
    for server in _serving(tmp_path):
        status, text, _ = ask(server, "/")
        assert status == 503
        assert 'http-equiv="refresh"' in text
        assert version(server) == ""
        store = RunStore(tmp_path)
        write(store, 0)
        assert "Healthy in steps 0" in ask(server, "/")[1]
        store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_it_with_0(store: RunStore) -> None:
    start = "import sys; sys.argv = ['foreshock', 'watch', *sys.argv[1:]]; from foreshock.cli import main; main()"
    command = [sys.executable, "-c", start, str(store.path.parent), "--web", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = process.stdout.readline()
    assert re.match(r"http://127\.0\.0\.1:\d+/ shows .*; Ctrl-C ends it", told)
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


def still(page: Any) -> float:
    """Where the coverage stands, once nothing moves any more."""
    seen: list[float] = []
    while len(seen) < 10 or len(set(seen[-10:])) > 1:
        seen.append(page.locator("#coverage").bounding_box()["y"])
        page.wait_for_timeout(50)
    return seen[-1]


def test_the_library_is_served_once_and_is_no_part_of_the_page(server: Server) -> None:
    status, text, headers = ask(server, "/plotly.js")
    assert (status, headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    assert text == library()
    assert "immutable" in headers["cache-control"]
    page = ask(server, "/")[1]
    assert text not in page
    assert len(page) < 5e5
    address = re.search(r'src="(plotly\.js\?v=[\d.]+)"', page)[1]
    assert ask(server, f"/{address}")[1] == text


def test_a_browser_keeps_its_place_while_the_run_goes_on(server: Server, store: RunStore) -> None:
    with chromium() as browser, opened(browser, server.address, but="ERR_CONNECTION_REFUSED") as page:
        assert "Healthy in steps 0 to 9" in page.locator("#verdict").inner_text()
        figure = page.locator("#m-law-euler")
        page.get_by_label("Colours").select_option("dark")
        page.get_by_role("link", name="Coverage").click()
        page.locator("#m-law-euler summary").click()
        until(lambda: figure.locator("tbody tr").count() == 2)
        assert drawn(page, "#m-law-euler") > 0
        zoomed = "() => document.querySelector('#m-law-euler .plot').layout.xaxis.range"
        figure.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        box = figure.locator(".nsewdrag").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 3 / 4, box["y"] + 44, steps=5)
        page.mouse.up()
        until(lambda: page.evaluate(zoomed)[1] < 8)
        chosen = page.evaluate(zoomed)
        page.evaluate("document.querySelector('#coverage').scrollIntoView({ behavior: 'instant' })")
        place = still(page)
        for step in range(10, FAULT + 5):
            write(store, step)
        until(lambda: f"Not healthy since about step {FAULT}" in page.locator("#verdict").inner_text(), 15)
        assert page.title().startswith("▲")
        assert abs(still(page) - place) < 2, "the alarm above it has moved nothing"
        until(lambda: figure.locator("tbody tr").count() == 2)
        assert page.evaluate(zoomed) == chosen
        assert page.get_by_label("Colours").input_value() == "dark"
        page.get_by_role("link", name="The alarm and its evidence").click()
        assert drawn(page, "#alarm-1-chart") > 0
        assert NAME in page.locator("#alarm-1").inner_text()
        server.shutdown()
        server.server_close()
        until(lambda: "The server has ended" in page.locator("#facts").inner_text(), 15)
