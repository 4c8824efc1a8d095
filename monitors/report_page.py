"""The page of a report, made of the files in ``assets``. Everything from a run passes through autoescape, or is JSON that holds no
markup; and should a name be taken for a script after all, the page's own policy lets no browser run it."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from functools import cache
from importlib.metadata import version as installed
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

LIBRARY = "plotly.js"  # where it is served
SYMBOLS = {"critical": "▲", "warning": "◆", "good": "●", "unknown": "○"}  # a shape beside each colour


@cache
def asset(name: str) -> str:
    """The text of one of the page's own files."""
    return files("foreshock.monitors").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def library() -> str:
    """The text of plotly.js, 5 MB: part of a page that stands alone, served once where pages change."""
    from plotly.offline import get_plotlyjs  # a third of a second, for pages alone

    return str(get_plotlyjs())


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
    scripts = (parts["chart"], parts["script"])
    parts["library"] = "" if version else library()
    return _template().render(
        **facts,
        **{name: Markup(text) for name, text in parts.items()},
        data=Markup(embedded(data)),
        policy=policy(scripts if version else (parts["library"], *scripts), live=bool(version)),
        version=version,
        library_path=f"{LIBRARY}?v={installed('plotly')}",
    )


def embedded(value: Any) -> str:
    """JSON for a script element: no ``<``, so that nothing in it can end the element or begin another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(scripts: tuple[str, ...], *, live: bool) -> str:
    """The content security policy that admits these scripts and nothing else; live, also what the page's own server has.

    Styles are free: Plotly sets them on what it draws, and with no network there is nothing that a style could tell to anyone.
    """
    own = "'self'" if live else "'none'"
    allowed = " ".join([*map(_hashed, scripts), *(["'self'"] if live else [])])
    admitted = f"style-src 'unsafe-inline'; script-src {allowed}; connect-src {own}"
    return f"default-src 'none'; img-src data:; {admitted}; base-uri 'none'; form-action 'none'"


@cache
def _hashed(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
