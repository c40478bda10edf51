"""docs/cli.md shows every command, and what it shows of those that need no cluster is what they print."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from qlora_api.v1alpha1 import OutputStatus
from qlora_cli.__main__ import app
from qlora_cli.cluster.connection import Connection
from qlora_cli.commands import serve_snippet
from tests.contract.docs.commands import commands
from tests.make import DIGEST, make_prepared, make_result
from tests.unit.cli.fake_cluster import SUCCEEDED, FakeClusterClient, make_raw

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
TYPED = [command.words[1:] for command in commands() if command.place.startswith("docs/cli.md:")]
SECTIONS = dict(re.findall(r"^## `qlora ([a-z-]+)`\n(.*?)(?=^## |\Z)", REFERENCE, re.MULTILINE | re.DOTALL))


def test_every_command_is_on_the_page():
    assert [command for command in SECTIONS if not re.search(rf"`(?:qlora )?{command}\b", PAGE)] == []


def test_init_and_render_do_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = {line[0]: line for line in reversed(TYPED) if line}
    written = CliRunner().invoke(app, typed["init"])
    assert (written.exit_code, written.output.strip() in PAGE) == (0, True), written.output
    rendered = CliRunner().invoke(app, typed["render"])
    assert rendered.exit_code == 0, rendered.output
    children = {(child["kind"], child["metadata"]["name"]) for child in yaml.safe_load_all(rendered.output)}
    assert {("QLoRAJob", "support-bot"), ("Job", "support-bot-prepare"), ("Job", "support-bot-1")} <= children


@pytest.mark.parametrize("page", ["docs/cli.md", "docs/quickstart.md"])
def test_validate_prints_what_the_page_shows(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    printed = CliRunner().invoke(app, ["validate", "examples/broken.yaml"])
    assert printed.exit_code == 1
    shown = (ROOT / page).read_text(encoding="utf-8").splitlines()
    lines = printed.output.splitlines()
    assert [line for line in lines if line not in shown] == []
    assert len(lines) == 3


@pytest.mark.parametrize("line", [line for line in TYPED if line[:2] == ("serve-snippet", "support-bot")], ids=" ".join)
def test_serve_snippet_prints_what_the_page_shows(line: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    commit = re.search(r"--revision (\w+)", PAGE)
    assert commit
    model = make_prepared().model.model_copy(update={"commit": commit[1]})
    output = OutputStatus(digest=DIGEST, prefix=make_prepared().prefix, adapter=make_result().adapter)
    raw = make_raw(status=SUCCEEDED.model_copy(update={"model": model, "output": output}))
    monkeypatch.setattr(serve_snippet, "open_connection", lambda *_: Connection(FakeClusterClient(raw), "ml"))
    monkeypatch.setattr(serve_snippet, "read_generation_config", lambda *_: '{"eos_token_id": 2}')
    printed = CliRunner().invoke(app, line)
    assert printed.exit_code == 0, printed.output
    assert (printed.output in PAGE) == ("--for" not in line)
    assert make_result().adapter in printed.output
