"""The page about sizes shows what `qlora plan` prints for its manifest, which is the README's."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora_cli.__main__ import app

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "tests" / "unit" / "planner" / "configs" / "llama-3.2-3b.json"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ qlora plan job\.yaml --config config\.json (.*)$", PAGE, re.MULTILINE)


def manifest_of(page: str) -> str:
    manifest = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert manifest
    return manifest[1]


@pytest.mark.parametrize("options", COMMANDS)
def test_the_page_shows_what_is_printed(options: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(manifest_of(PAGE))
    arguments = ["plan", str(job), "--config", str(CONFIG), *options.split()]
    printed = CliRunner(env={"COLUMNS": "120"}).invoke(app, arguments).output
    lines = [line.rstrip() for line in printed.splitlines()]
    assert len(lines) > 0
    assert [line for line in lines if line not in PAGE] == []


def test_the_page_has_a_plan_that_fits_and_one_that_does_not() -> None:
    assert len(COMMANDS) == 2
    assert "error: does not fit" in PAGE


def test_the_manifest_is_that_of_the_readme() -> None:
    assert manifest_of(PAGE) == manifest_of(README)
