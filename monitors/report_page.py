"""The page of a report, made of the files in ``assets``. Everything from a run passes through autoescape, or is JSON that holds no
markup; and should a name be taken for a script after all, the page's own policy lets no browser run it."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

SYMBOLS = {"critical": "▲", "warning": "◆", "good": "●", "unknown": "○"}  # a shape beside each colour


@cache
def asset(name: str) -> str:
    """The text of one of the page's own files."""
    return files("foreshock.monitors").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["symbols"] = SYMBOLS
    return environment.from_string(asset("report.html.j2"))


def page(data: Any, version: str = "", **facts: Any) -> str:
    """The whole page. ``data`` is what the figures draw; ``version``: what is served live says by it which one it is."""
    parts = {"style": asset("report.css"), "chart": asset("chart.js"), "script": asset("report.js")}
    return _template().render(
        **facts,
        **{name: Markup(text) for name, text in parts.items()},
        data=Markup(embedded(data)),
        policy=policy(parts["style"], (parts["chart"], parts["script"]), live=bool(version)),
        version=version,
    )


def embedded(value: Any) -> str:
    """JSON for a script element: no ``<``, so that nothing in it can end the element or begin another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(style: str, scripts: tuple[str, ...], *, live: bool) -> str:
    """The content security policy that admits these and nothing else, and of the network, live, the page's own server."""
    allowed = " ".join(map(_hashed, scripts))
    network = "'self'" if live else "'none'"
    admitted = f"style-src {_hashed(style)}; script-src {allowed}; connect-src {network}"
    return f"default-src 'none'; img-src data:; {admitted}; base-uri 'none'; form-action 'none'"


def _hashed(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
