"""The pages for contributors name files and folders that exist."""

import re
from typing import Final

import pytest

from tests.contract.docs.blocks import ROOT

PAGES: Final = ("docs/architecture.md", ".github/CONTRIBUTING.md")
ROOTS: Final = (ROOT, ROOT / "operator", ROOT / "trainer_image")
"""Where a path may start."""
_PATH: Final = re.compile(r"`((?:qlora_\w+|tests|docs|charts|benchmarks|operator|trainer_image)/[\w./-]*)`")


def missing(text: str) -> list[str]:
    return [path for path in _PATH.findall(text) if not any((root / path).exists() for root in ROOTS)]


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(_PATH.findall(text)) > 20
    assert missing(text) == []


def test_missing_path_is_found() -> None:
    assert missing("`qlora_api/names.py`, `qlora_api/nothing.py`, `tests/unit/none/`, `make check`") == [
        "qlora_api/nothing.py",
        "tests/unit/none/",
    ]
