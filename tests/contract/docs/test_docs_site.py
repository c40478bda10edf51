"""The pages link to what exists, on a code host and on the site; the site builds without a warning, and is complete."""

import json
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

import pytest

from docs.site.__main__ import build, write_sources
from docs.site.links import is_outside, links, prose, relink
from docs.site.sources import pages, place
from tests.contract.docs.blocks import PAGES, ROOT

CONFIGURATION: Final = ROOT / "docs/site/zensical.toml"


def anchors(page: Path) -> set[str]:
    """The anchors that a code host gives to headings: words and hyphens; a repeated one gets a number."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
    seen: Counter[str] = Counter()
    found = set()
    for slug in slugs:
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if not is_outside(target) and not (there.exists() and (not anchor or anchor in anchors(there))):
            lost.append(target)
    assert lost == []


def test_links_of_code_are_none() -> None:
    text = "[a](b.md)\n```text\n[c](d.md)\n```\n![e](f.png) ~~~ [g](h.md#i)\n"
    assert links(text) == ["b.md", "f.png", "h.md#i"]
    assert relink(text, str.upper).count("d.md") == 1


class Page(HTMLParser):
    """What a built page links to, what it loads, where it can be linked to, and its paragraphs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.paragraphs: list[str] = []
        self._in_paragraph = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {value for value in (given.get("id"), given.get("name")) if value}
        if tag == "a":
            self.links += filter(None, [given.get("href")])
        elif tag != "link" or given.get("rel") == "stylesheet":
            self.loads += filter(None, [given.get("src"), given.get("href")])
        if tag == "p":
            self._in_paragraph = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_paragraph = self._in_paragraph and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._in_paragraph:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    write_sources(folder)
    status, said = build(folder)
    assert (status, "No issues found" in said, "warning" in said.lower()) == (0, True, False), said
    built = folder / "site"
    return {
        path.resolve(): Page(path.read_text(encoding="utf-8"))
        for path in built.rglob("*.html")
        if path.name != "404.html"
    }


def test_every_page_is_built(site: dict[Path, Page]) -> None:
    built = {str(path).rpartition("/site/")[2] for path in site}
    assert {str(place(ROOT, page).with_suffix(".html")) for page in pages(ROOT)} - built == set()


def test_the_search_has_the_reasons_and_not_the_decisions(site: dict[Path, Page]) -> None:
    [index] = {path.parent for path in site if (path.parent / "search.json").is_file()}
    items = json.loads((index / "search.json").read_text(encoding="utf-8"))["items"]
    found = {item["location"].partition("#")[0] for item in items}
    assert {"index.html", "docs/reference/reasons.html", "docs/troubleshooting.html"} - found == set()
    assert {page for page in found if page.startswith("docs/decisions/")} == {"docs/decisions/index.html"}


def test_links_of_the_site_lead_somewhere(site: dict[Path, Page]) -> None:
    lost = []
    for path, page in site.items():
        for target in page.links:
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            if is_outside(target):
                continue
            if not there.is_file() or (anchor and there in site and anchor not in site[there].ids):
                lost.append(f"{path.name}: {target}")
    assert lost == []
    assert sum(len(page.links) for page in site.values()) > 1000


def test_the_site_loads_nothing_from_elsewhere(site: dict[Path, Page]) -> None:
    assert {target for page in site.values() for target in page.loads if is_outside(target) or "//" in target} == set()
    assert all(page.loads for page in site.values())


def test_lists_and_tables_are_understood(site: dict[Path, Page]) -> None:
    # A code host needs no empty line before a list or a table; Python-Markdown makes them part of the paragraph.
    left = re.compile(r"\n *(?:[-*|]|\d+\.) |^\|")
    assert [words for page in site.values() for words in page.paragraphs if left.search(words)] == []


def test_site_generator_rejects_broken_links(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "x"\ndocs_dir = "pages"\n')
    (tmp_path / "pages/index.md").write_text("# x\n\n[y](z.md)\n")
    assert build(tmp_path)[0] != 0
    shutil.rmtree(tmp_path / "site", ignore_errors=True)
    (tmp_path / "pages/index.md").write_text("# x\n\n[y](index.md)\n")
    assert build(tmp_path)[0] == 0


def navigated(entries: Any) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
    else:
        for entry in entries.values() if isinstance(entries, dict) else entries:
            yield from navigated(entry)


def test_every_page_is_in_the_navigation_once() -> None:
    configured = tomllib.loads(CONFIGURATION.read_text(encoding="utf-8"))["project"]["nav"]
    times = Counter(navigated(configured))
    assert {page for page, found in times.items() if found > 1} == set()
    assert {str(place(ROOT, page)) for page in pages(ROOT)} - times.keys() == set()
