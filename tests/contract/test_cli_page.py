"""docs/cli.md shows every command, and what it shows of those that need no cluster is what they print."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from qlora_cli.__main__ import app
from tests.contract.commands import commands

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `qlora ([a-z-]+)`\n(.*?)(?=^## |\Z)", REFERENCE, re.MULTILINE | re.DOTALL))


def test_every_command_is_on_the_page():
    assert [command for command in SECTIONS if not re.search(rf"`(?:qlora )?{command}\b", PAGE)] == []


def test_init_and_render_do_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = {command.words[1]: command.words[1:] for command in commands() if command.place.startswith("docs/cli.md:")}
    written = CliRunner().invoke(app, typed["init"])
    assert (written.exit_code, written.output.strip() in PAGE) == (0, True), written.output
    rendered = CliRunner().invoke(app, typed["render"])
    assert rendered.exit_code == 0, rendered.output
    children = {(child["kind"], child["metadata"]["name"]) for child in yaml.safe_load_all(rendered.output)}
    assert {("QLoRAJob", "support-bot"), ("Job", "support-bot-prepare"), ("Job", "support-bot-1")} <= children
