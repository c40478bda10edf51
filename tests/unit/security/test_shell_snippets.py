"""Commands to paste, run in bash: each program gets the intended words, and nothing that others chose runs."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from typer.testing import CliRunner

from qlora_api.v1alpha1 import OutputStatus
from qlora_cli.__main__ import app
from qlora_cli.cluster.client import ClusterError
from qlora_cli.cluster.jobs import ClusterJob
from qlora_cli.commands import report, serve_snippet
from qlora_cli.commands.serve_snippet import ServedModel, Server, resolve_served_model
from tests.make import DIGEST, make_prepared, make_result
from tests.unit.cli.fake_cluster import SUCCEEDED, make_job

ATTACKS: Final = {
    "substitution": "x$(touch canary)",
    "substitution-without-blanks": "x$(touch${IFS}canary)",
    "backticks": "x`touch canary`",
    "separator": "x; touch canary",
    "pipe": "x|touch canary",
    "background": "x& touch canary",
    "redirection": "x > canary",
    "line-break": "x\ntouch canary\n",
    "carriage-return": "x\r\ntouch canary",
    "comment": "x #",
    "quotes": "x' ; touch canary; '",
    "double-quotes": 'x"; touch canary; "',
    "ansi-c-quotes": "\x1b' ; touch canary; '\\",
    "history": "x!!",
    "glob": "*",
    "home": "~/x",
    "braces": "{a,b}",
    "option": "-x",
    "long-option": "--trust-remote-code",
    "equals-sign": "a=b",
    "blanks": "two words",
    "escape-codes": "x\x1b[2J\x07\x9b",
    "bidi": "x\u202ey",
    "backslash": "x\\",
    "empty": "",
}
PROGRAM: Final = """#!/bin/bash
printf '%s\\0' $(($# + 1)) "$(basename "$0")" "$@" >> "$RECORD"
"""
SERVED: Final = ServedModel("bot", "hf://org/base", "a" * 40, "s3://bucket/adapter", 16, ("--x=1",), chat_template=True)


def run_in_bash(snippet: str, folder: Path) -> list[list[str]]:
    """Return the words of each program that a snippet starts; there must be no other effect."""
    programs, here = folder / "bin", folder / "here"
    for path in (programs, here):
        path.mkdir()
    for name in ("vllm", "aws", "qlora", "kubectl"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "RECORD": str(folder / "record"), "LC_ALL": "C.UTF-8"}
    subprocess.run(["bash", "-c", snippet], cwd=here, env=environment, check=True)
    assert list(here.iterdir()) == []
    words, commands = (folder / "record").read_bytes().decode().split("\0")[:-1], []
    while words:
        count, *words = words
        commands.append(words[: int(count)])
        words = words[int(count) :]
    return commands


def intended(served: ServedModel) -> list[list[str]]:
    """What to run for an adapter, in words."""
    fetched, model = [], served.model.removeprefix("hf://")
    if served.model.startswith("s3://"):
        model = "./model"
        fetched.append(["aws", "s3", "sync", served.model, model])
    folder = (served.adapter or "").removeprefix("hf://")
    if folder.startswith("s3://"):
        folder = f"./{served.name}"
        fetched.append(["aws", "s3", "sync", served.adapter or "", folder])
    values = {"--revision": served.revision or "", "--max-lora-rank": "16"}
    values["--lora-modules"] = f"{served.name}={folder}"
    values["--generation-config"] = folder
    values["--chat-template"] = f"{folder}/chat_template.jinja"
    words = ["vllm", "serve", model]
    for option, value in values.items():
        words += [option, value] if value or option == "--generation-config" else []
        words += ["--enable-lora"] if option == "--revision" else []
    return [*fetched, [*words, *served.arguments]]


def split_options(command: list[str]) -> list[str]:
    """Write --option=-value as two words, JSON of --lora-modules as name=path, and ./-x as -x, as programs do."""
    words: list[str] = []
    for word in command:
        option, _, value = word.partition("=-")
        words += [option, f"-{value}"] if option.startswith("--") and "=" not in option and value else [word]
    if "--lora-modules" in words:
        place = words.index("--lora-modules") + 1
        if words[place].startswith("{"):
            module = json.loads(words[place])
            words[place] = f"{module['name']}={module['path']}"
    return [word.replace("./-", "-") for word in words]


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("field", ["name", "model", "revision", "adapter", "arguments"])
@pytest.mark.parametrize("scheme", ["", "hf://", "s3://bucket/"])
def test_pasted_commands_run_as_intended(tmp_path: Path, scheme: str, field: str, text: str):
    value: Any = (text,) if field == "arguments" else f"{scheme}{text}" if field in {"model", "adapter"} else text
    served = replace(SERVED, **{field: value or "x"})
    snippet = serve_snippet.write_vllm(served)
    found = run_in_bash(snippet, tmp_path)
    expected = intended(served)
    assert [split_options(command) for command in found] == [
        [word.replace("./-", "-") for word in command] for command in expected
    ]


@pytest.mark.parametrize("text", [pytest.param(text, id=key) for key, text in ATTACKS.items() if text])
def test_next_commands_of_init_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    file = text.replace("/", "_")
    done = CliRunner().invoke(app, ["init", "--", file])
    commands = done.stderr.rpartition("; next: ")[2].split(", then ")
    word = f"./{file}" if file.startswith("-") else file
    assert run_in_bash("\n".join(commands), tmp_path) == [["qlora", "plan", word], ["qlora", "submit", word]]


@pytest.mark.parametrize("name", ["null", "true", "on", "yes", "e1"])
def test_name_that_yaml_reads_otherwise_is_quoted(name: str):
    done = CliRunner().invoke(app, ["init", "-", "--name", name])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(done.stdout)["metadata"]["name"] == name


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("write", [serve_snippet.write_kserve, serve_snippet.write_kubeai])
def test_manifests_keep_hostile_values_as_data(write: Any, text: str):
    served = ServedModel(text, f"s3://bucket/{text}", text or "x", f"s3://bucket/{text}", 16, (text,))
    manifest = yaml.safe_load(write(served))
    plain = yaml.safe_load(write(ServedModel("N", "s3://bucket/N", "N", "s3://bucket/N", 16, ("N",))))

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        return [shape(item) for item in value] if isinstance(value, list) else type(value)

    assert shape(manifest) == shape(plain)
    assert manifest["metadata"]["name"].startswith(text)


def published(commit: str = "a" * 40, **output: str) -> ClusterJob:
    prepared, result = make_prepared(), make_result()
    facts = {"digest": DIGEST, "prefix": prepared.prefix, "adapter": result.adapter, "report": result.report}
    model = prepared.model.model_copy(update={"commit": commit})
    return make_job(SUCCEEDED.model_copy(update={"output": OutputStatus(**facts | output), "model": model}))


BELOW: Final = f"s3://adapters/team-a/support-bot/{DIGEST}"


@pytest.mark.parametrize("server", Server)
@pytest.mark.parametrize(
    "adapter",
    [
        "hf://x$(touch${IFS}canary)",
        "x",
        "",
        "/etc",
        "file:///etc",
        "https://evil.example/adapter",
        "s3://evil/support-bot/0123456789abcdef/adapter",
        "s3://adapters/team-a/other-bot/0123456789abcdef/adapter",
        f"s3://adapters/team-a-evil/support-bot/{DIGEST}/adapter",
        f"{BELOW}/$(touch canary)",
        f"{BELOW}/../../../evil/adapter",
        f"{BELOW}/./adapter",
        f"{BELOW}//adapter",
        f"{BELOW}/adapter\n",
        f"{BELOW}/adapter --trust-remote-code",
        f"{BELOW}/-x",
        f"{BELOW}/ad\u202eapter",
        f"{BELOW}/\x1b[31m",
    ],
)
def test_adapter_of_somebody_else_is_refused(server: Server, adapter: str):
    with pytest.raises(ClusterError, match=r"status\.output\.adapter of support-bot is .*, and not .*qlora rerun"):
        serve_snippet.WRITERS[server](resolve_served_model(published(adapter=adapter)))
    with pytest.raises(ClusterError, match=r"status\.output\.merged of support-bot"):
        resolve_served_model(published(merged=adapter))


@pytest.mark.parametrize("commit", ["abc$(touch canary)", "main", "-x", "a" * 39 + "\n", "", "../x", "--help"])
def test_revision_that_is_no_commit_is_refused(commit: str):
    with pytest.raises(ClusterError, match=r"model\.commit"):
        resolve_served_model(published(commit=commit))


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "x",
        "hf://a/b",
        "/etc/x",
        "s3://a/../b",
        "s3://buck\u202eet/x/report.json",
        "s3://evil/support-bot/0123456789abcdef/report/report.json",
        "s3://adapters/team-a/support-bot-evil/report/report.json",
        f"{BELOW}/../../other/x/report/report.json",
    ],
)
def test_report_of_an_odd_uri_is_refused(uri: str):
    with pytest.raises(ClusterError, match=r"status\.output\.report of support-bot is .*not the URI of a report"):
        report.find_report(published(report=uri))
