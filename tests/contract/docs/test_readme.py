"""The README is short and true: what it shows is in the transcripts and manifests of the pages."""

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[3]
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART: Final = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
LONGEST: Final = 160
"""Lines; a visitor decides in the first forty."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_nothing_is_left_to_be_filled_in(page: str) -> None:
    assert re.findall(r"@[A-Z]+@", (ROOT / page).read_text(encoding="utf-8")) == []


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= LONGEST


def test_output_in_the_readme_is_in_the_transcripts() -> None:
    output = [block for block in blocks("text") if "─►" not in block]
    assert len(output) == 2
    shown = [line for block in output for line in block.splitlines()]
    assert [line for line in shown if line not in QUICKSTART.splitlines()] == []
    [table] = [block for block in blocks("console") if block.startswith("$ kubectl get qlj")]
    assert [line for line in table.splitlines()[1:] if line not in QUICKSTART] == []


def test_gpu_status_is_on_the_first_screen() -> None:
    first_screen = " ".join(line.removeprefix("> ") for line in README.splitlines()[:12])
    assert "has not run on a GPU" in first_screen
