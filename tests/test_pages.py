"""The pages as text: each is in the site's navigation, and each relative link leads to something. `make site` checks the rest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
CODE = re.compile(r"^ *(`{3,}).*?^ *\1`*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]*)|(?:src|href)=\"(?![a-z]+:)([^\"]+)")


def links(text: str) -> list[str]:
    """Where the relative links and pictures of a Markdown text lead, code left out."""
    return ["".join(found) for found in LINK.findall(CODE.sub("", text))]


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown text's headings, as GitHub and mkdocs both spell plain ones."""
    heads = re.findall(
        r"^#+ (.+)$", re.sub(r"^ *(`{3,}).*?^ *\1`*$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def broken(page: Path) -> list[str]:
    """The links of ``page`` that lead nowhere."""
    wrong = []
    for link in links(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            wrong.append(link)
    return wrong


def test_links_are_found_and_code_is_not() -> None:
    text = '[a](b.md#c) ![p](q.png)\n```\n[no](no.md)\n```\n`[no](no.md)` [w](https://x.y) <img src="r.svg">'
    assert links(text) == ["b.md#c", "q.png", "r.svg"]
    assert anchors("# A `b` c!\n```\n# no\n```\n## Two words") == {"a-b-c", "two-words"}


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Here\n[1](#here) [2](#there) [3](page.md) [4](gone.md) [5](page.md#gone)")
    assert broken(page) == ["#there", "gone.md", "page.md#gone"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_leads_to_something(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_formula_is_taken_for_a_tag(page: Path) -> None:
    tags = re.findall(r"<(?!!--)/?[^\s<]*", CODE.sub("", page.read_text(encoding="utf-8")))
    assert [
        tag
        for tag in tags
        if not re.match(r"</?(img|br|p|div|details|summary|picture|source|https?:|\d|=|-)", tag + " ")
    ] == []


def test_each_page_is_in_the_navigation_once() -> None:
    _, _, nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    named = re.findall(r"^ *- [^#\n]+: (\S+\.md)$", nav, re.MULTILINE)
    pages = [str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)]
    assert sorted(name for name in named if not name.startswith("repository/")) == pages
