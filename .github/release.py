"""The steps of the release workflow that a test can run.

python .github/release.py version v0.1.0             print the version, or fail where tag, code and changelog differ
python .github/release.py pin-images CHART IMAGE...  write both images, as NAME@sha256:…, into values.yaml
python .github/release.py notes 0.1.0                print this version's section of CHANGELOG.md
"""

import re
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
VALUES_KEYS: Final = ("image", "trainerImage")
"""Top-level keys of the chart's values, in the order in which `pin-images` takes the images."""


class ReleaseError(Exception):
    """Something of the repository must change before this release can be made."""


def check_version(tag: str, root: Path) -> str:
    """Return the version that the tag names, once code, chart and changelog name it too."""
    version = tag.removeprefix("v")
    code = _search(r'^__version__: Final = "(.+)"$', root / "operator/qlora_api/__init__.py")
    app = _search(r'^appVersion: "(.+)"$', root / "charts/qlora-operator/Chart.yaml")
    if {tag} != {f"v{code}", f"v{app}"}:
        raise ReleaseError(f"the tag is {tag}, __version__ {code}, the chart's appVersion {app}: they must be one")
    release_notes(version, root)
    if _section(r"\[Unreleased\]", root):
        raise ReleaseError(f"CHANGELOG.md: move what is under [Unreleased] to the section of {version}")
    return version


def _search(pattern: str, path: Path) -> str:
    found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ReleaseError(f"{path} has no line like {pattern}")
    return found[1]


def release_notes(version: str, root: Path) -> str:
    """Return the text below a version's heading in the changelog, which must have a date."""
    notes = _section(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", root)
    if not notes:
        raise ReleaseError(f"CHANGELOG.md: write a section `## [{version}] - YYYY-MM-DD`")
    return notes


def _section(heading: str, root: Path) -> str:
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def pin_images(values: str, images: dict[str, str]) -> str:
    """Return values.yaml with repository and digest of each top-level key's image, and every comment as it was."""
    lines = values.splitlines(keepends=True)
    left = {(key, field) for key in images for field in ("repository", "digest")}
    block = ""
    for number, line in enumerate(lines):
        if top := re.match(r"(\w+):", line):
            block = top[1]
        elif (field := re.match(r"  (repository|digest): ", line)) and block in images:
            name, _, digest = images[block].partition("@")
            lines[number] = f'  {field[1]}: "{name if field[1] == "repository" else digest}"\n'
            left.discard((block, field[1]))
    if left:
        raise ReleaseError(f"values.yaml has no {sorted(left)}")
    return "".join(lines)


def main(arguments: list[str]) -> None:
    """Run one step."""
    match arguments:
        case ["version", tag]:
            sys.stdout.write(f"version={check_version(tag, ROOT)}\n")
        case ["notes", version]:
            sys.stdout.write(f"{release_notes(version, ROOT)}\n")
        case ["pin-images", chart, *images] if all(re.fullmatch(r".+@sha256:[0-9a-f]{64}", image) for image in images):
            path = Path(chart) / "values.yaml"
            pinned = pin_images(path.read_text(encoding="utf-8"), dict(zip(VALUES_KEYS, images, strict=True)))
            path.write_text(pinned, encoding="utf-8")
        case _:
            raise ReleaseError(__doc__ or "")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ReleaseError as error:
        sys.exit(str(error))
