"""For `make site`: a link that leaves docs/ leads to a page made of the file that it names.

So pages link to each other and to the repository as on GitHub, ``[resume.py](../examples/resume.py)``, and the site needs no
address of a repository. Markdown is shown as it is, every other file as code. A link to a file that does not exist is left alone,
and mkdocs reports it. A page that would fetch something from elsewhere is reported too.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = "repository"  # the folder of such pages in the site
CODE = r"^(?P<fence>`{3,}).*?^(?P=fence)`*$|`[^`\n]+`"  # where brackets are no links
LINK = re.compile(rf"{CODE}|(?<=\]\()(?![a-z]+:|#)(?P<to>[^)#\s]+)", re.MULTILINE | re.DOTALL)
FETCHED = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=\"?(https?://[^\"\s>]+)")
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md")  # in the navigation


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that a page links to, and for those that these link to."""
    waiting = [*ALWAYS, *(path for page in files.documentation_pages() for path in _leaving(page))]
    made: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in made:
            continue
        made.add(path)
        text = (ROOT / path).read_text(encoding="utf-8")
        if not path.endswith(".md"):
            text = f"# {path}\n\n````{Path(path).suffix[1:] or 'text'}\n{text}````\n"
        page = File.generated(config, _page(path), content=text)
        files.append(page)
        waiting += _leaving(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of ``page`` with its links as they are in the site."""
    here = page.file.src_uri

    def inside(found: re.Match[str]) -> str:
        return (
            posixpath.relpath(_page(_target(here, found["to"])), posixpath.dirname(here)) if found["to"] else found[0]
        )

    return LINK.sub(inside, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Report what the page as written would fetch; ``--strict`` makes an error of it."""
    for address in FETCHED.findall(output):
        logging.getLogger("mkdocs.hooks").warning("%s fetches %s", page.file.src_uri, address)
    return output


def _leaving(page: File) -> list[str]:
    """The files outside docs/ that ``page`` links to, from the root of the repository."""
    targets = {_target(page.src_uri, found["to"]) for found in LINK.finditer(page.content_string) if found["to"]}
    return sorted(path for path in targets if not path.startswith("docs/") and (ROOT / path).is_file())


def _target(page: str, link: str) -> str:
    """The file that ``link`` names on the page at ``page``, from the root of the repository."""
    code = f"{OUTSIDE}/"
    source = page.removeprefix(code) if page.startswith(code) else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _page(path: str) -> str:
    """Where the file at ``path`` stands in the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{OUTSIDE}/{path}" if path.endswith(".md") else f"{OUTSIDE}/{path}.md"
