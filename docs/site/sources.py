"""What the site is made of: README.md, the pages of docs/, and whatever these link to in the repository.

Pages are read in the repository as well, so they link to files as these lie there. The site mirrors that tree, and what
a site cannot show becomes a page: source code as text, a folder without a README as a list.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from docs.site.links import is_outside, links, relink

_LANGUAGES: Final = {".py": "python", ".yaml": "yaml", ".json": "json", ".jsonl": "json", ".toml": "toml"}
_LONGEST_LISTING: Final = 64 * 1024
"""Bytes of a file that is shown as a page; a longer one is handed over as it is."""
_NOT_SEARCHED: Final = "---\nsearch:\n  exclude: true\n---\n\n"
"""Front matter of pages that would bury the others in the search, whose ranking cannot be weighted: source code, and
the decision records and the glossary of old names, which name everything; the index of decisions stays in it."""
_DECISIONS: Final = PurePosixPath("docs/decisions")
_GLOSSARY: Final = PurePosixPath("docs/glossary.md")
_FENCE: Final = "`" * 6
"""Longer than any fence in what it encloses."""


def pages(root: Path) -> list[PurePosixPath]:
    """Return the pages that the site is for; all others are there because one of these links to them."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [PurePosixPath(page.relative_to(root).as_posix()) for page in found]


def stage(root: Path) -> dict[PurePosixPath, bytes]:
    """Return every file of the site's source, by its place there."""
    staged: dict[PurePosixPath, bytes] = {}
    waiting = pages(root)
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        staged[place(root, source)] = _content(root, source)
        further = set(_linked(root, source)) - seen
        seen |= further
        waiting += sorted(further)
    return staged


def place(root: Path, source: PurePosixPath) -> PurePosixPath:
    """Return where a file or folder lies in the site's source; the generator skips names that begin with a dot."""
    there = PurePosixPath(*(part.removeprefix(".") for part in source.parts))
    if (root / source).is_dir():
        return there / "index.md"
    if source.name == "README.md":
        return there.with_name("index.md")
    return there.with_name(f"{there.name}.md") if _is_listing(root, source) else there


def _is_listing(root: Path, source: PurePosixPath) -> bool:
    path = root / source
    return source.suffix in _LANGUAGES and path.stat().st_size <= _LONGEST_LISTING


def _resolve(root: Path, page: PurePosixPath, target: str) -> PurePosixPath:
    """Return the file that a link means; a folder with a README is that page."""
    source = PurePosixPath(os.path.normpath(page.parent / target.partition("#")[0]))
    readme = source / "README.md"
    return readme if (root / readme).is_file() else source


def _linked(root: Path, source: PurePosixPath) -> Iterator[PurePosixPath]:
    if source.suffix == ".md":
        for target in links((root / source).read_text(encoding="utf-8")):
            if not is_outside(target) and not target.startswith("#"):
                yield _resolve(root, source, target)


def _content(root: Path, source: PurePosixPath) -> bytes:
    path = root / source
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if not child.name.startswith(("__pycache__", ".")))
        listed = "".join(f"- `{name}`\n" for name in names)
        return f"{_NOT_SEARCHED}# {source}/\n\nA folder of the repository, with\n\n{listed}".encode()
    if source.suffix == ".md":
        text = relink(path.read_text(encoding="utf-8"), lambda target: _moved(root, source, target))
        is_decision = source.parent == _DECISIONS and source.name != "README.md"
        is_searched = not is_decision and source != _GLOSSARY
        return f"{'' if is_searched else _NOT_SEARCHED}{text}".encode()
    if _is_listing(root, source):
        text = path.read_text(encoding="utf-8").rstrip()
        language = _LANGUAGES[source.suffix]
        return f"{_NOT_SEARCHED}# {source.name}\n\n`{source}`\n\n{_FENCE}{language}\n{text}\n{_FENCE}\n".encode()
    return path.read_bytes()


def _moved(root: Path, page: PurePosixPath, target: str) -> str:
    if is_outside(target) or target.startswith("#"):
        return target
    _, mark, anchor = target.partition("#")
    there = place(root, _resolve(root, page, target))
    return os.path.relpath(there, place(root, page).parent) + mark + anchor
