"""docs/cli.md shows every command, and shows none that does not exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `qlora ([a-z-]+)`\n(.*?)(?=^## |\Z)", REFERENCE, re.MULTILINE | re.DOTALL))


def test_every_command_is_on_the_page():
    assert [command for command in SECTIONS if not re.search(rf"`(?:qlora )?{command}\b", PAGE)] == []


@pytest.mark.parametrize("line", re.findall(r"^\$ (?:kubectl )?qlora ([a-z-]+ .*)$", PAGE, re.MULTILINE))
def test_what_the_page_types_exists(line: str):
    command, _, rest = line.split(" | ", maxsplit=1)[0].partition(" ")
    options = re.findall(r"--[a-z0-9-]+", rest)
    assert [option for option in options if option not in SECTIONS[command]] == []
