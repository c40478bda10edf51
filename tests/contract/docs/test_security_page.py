"""Every test that docs/security.md names exists, and every row of its threat model names one."""

import re
from typing import Final

import pytest

from tests.contract.docs.blocks import ROOT

PAGE: Final = (ROOT / "docs/security.md").read_text(encoding="utf-8")
NAMED: Final = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
LINKED: Final = sorted(set(re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", PAGE)))
ROWS: Final = re.findall(
    r"^\| (?!threat|---)(.+?) \|(?:.+)\| (.+?) \|$", PAGE.partition("\n## ")[2].partition("\n## ")[0], re.MULTILINE
)


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_named_test_exists(path: str, name: str) -> None:
    assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8").replace("\nasync def ", "\ndef ")


@pytest.mark.parametrize(("name", "path"), LINKED)
def test_linked_test_exists(name: str, path: str) -> None:
    file = ROOT / path
    assert name == file.stem or f"def {name}(" in file.read_text(encoding="utf-8")


def test_every_threat_has_a_test_or_a_page_that_names_it() -> None:
    assert len(ROWS) > 15
    assert [
        threat for threat, shown in ROWS if not re.search(r"tests/|\.md\)|permissions below|hostile manifests", shown)
    ] == []
