"""The README and the page about sizes show what `qlora plan` prints for the README's manifest."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora_cli.__main__ import app

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "unit" / "operator" / "plan" / "configs" / "llama-3.2-3b.json"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README, "docs/plan.md": (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")}
COMMANDS = [
    (page, options)
    for page, text in PAGES.items()
    for options in re.findall(r"^\$ qlora plan job\.yaml --config config\.json (.*)$", text, re.MULTILINE)
]


@pytest.mark.parametrize(("page", "options"), COMMANDS)
def test_the_page_shows_what_is_printed(page: str, options: str, tmp_path: Path) -> None:
    manifest = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert manifest
    job = tmp_path / "job.yaml"
    job.write_text(manifest[1])
    arguments = ["plan", str(job), "--config", str(CONFIG), *options.split()]
    printed = CliRunner(env={"COLUMNS": "120"}).invoke(app, arguments).output
    lines = [line.rstrip() for line in printed.splitlines()]
    assert len(lines) > 0
    assert [line for line in lines if line not in PAGES[page]] == []


def test_every_page_has_commands() -> None:
    assert [page for page, _ in COMMANDS] == ["README.md", "docs/plan.md", "docs/plan.md"]
