"""``foreshock watch --web``: the report, and word of when it changes, for browsers on this machine alone.

Listens on 127.0.0.1, answers GET of three paths, and only where the request names this machine (by any port, as the near end of an
SSH tunnel has its own): a page of another site, whose own name has been made to lead here (DNS rebinding), is refused by its Host.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from foreshock.errors import RunError
from foreshock.following import Following
from foreshock.monitors.report import render
from foreshock.monitors.report_page import LIBRARY, library

PORT = 8642
LOCAL = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", re.IGNORECASE)  # hosts that are answered
EVERY = 2.0  # seconds that a page stands, at least
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
WAITING = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">'
    "<title>foreshock</title><p>{}</p>"
)


class Pages:
    """The page as it stands, made anew once the run has changed and the last one has stood for a while. Safe from any thread."""

    def __init__(self, following: Following) -> None:
        self._following = following
        self._lock = threading.Lock()
        self._version, self._page, self._made = "", "", 0.0

    @property
    def version(self) -> str:
        """Of the page that would be given now."""
        now = self._following.version
        stands = self._page and time.monotonic() - self._made < self._following.rest(EVERY)
        return self._version if stands or not now else hashlib.sha256(now.encode()).hexdigest()[:16]

    def page(self) -> str:
        """Raises RunError where there is no run, or none yet."""
        with self._lock:
            version = self.version  # before it is read: what is written meanwhile is a change
            if version != self._version or not self._page:
                page = self._following.look(lambda run: render(run, version))
                self._version, self._page, self._made = version, page, time.monotonic()
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "foreshock", ""

    def do_GET(self) -> None:
        if not LOCAL.fullmatch(self.headers.get("Host", "")):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", f"ask for {self.server.address}\n")
        elif self.path == "/changes":
            self._answer(HTTPStatus.OK, "application/json", json.dumps({"version": self.server.pages.version}))
        elif self.path == "/":
            self._page()
        elif self.path.partition("?")[0] == f"/{LIBRARY}":
            self._answer(HTTPStatus.OK, "text/javascript", library(), "public, max-age=31536000, immutable")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", f"there is /, /changes and /{LIBRARY}\n")

    def _page(self) -> None:
        try:
            self._answer(HTTPStatus.OK, "text/html", self.server.pages.page())
        except RunError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/html", WAITING.format(html.escape(str(error))))

    def _answer(self, status: HTTPStatus, kind: str, text: str, keep: str = "no-store") -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", keep)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A line for every question of every page would bury the address."""


class Server(ThreadingHTTPServer):
    """Raises RunError if the port is taken, or there is no folder to watch."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, path: str, port: int = PORT) -> None:
        following = Following(path)
        following.exists()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise RunError(
                f"serving on port {port}: {error.strerror}; pass another with --port, or 0 for any"
            ) from error
        self.pages = Pages(following)
        self.address = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away is no error; anything else is said in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            print(f"foreshock: answering {client_address[0]}: {type(error).__name__}: {error}", file=sys.stderr)


def serve(path: str, port: int = PORT) -> int:
    """Serve until Ctrl-C. The exit code."""
    with suppress(KeyboardInterrupt), Server(path, port) as server:
        print(f"{server.address} shows {path} as it is written; Ctrl-C ends it", flush=True)
        server.serve_forever(poll_interval=0.2)
    return 0
