"""`qlora init`, completion behind kubectl, and the name that a user typed."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_cli.__main__ import app
from qlora_cli.command_table import COMMANDS
from qlora_cli.commands.init import SHOWN_FIELDS, default_of, write_manifest
from qlora_cli.commands.run import load_manifest
from qlora_cli.completion import completions
from qlora_cli.console import Console


def test_init_writes_valid_manifest(tmp_path: Path):
    path = tmp_path / "job.yaml"
    made = CliRunner().invoke(app, ["init", str(path), "--name", "bot", "--gpus", "0", "--model", "hf://a/b"])
    assert (made.exit_code, made.stdout) == (0, "")
    assert made.stderr.endswith(f"wrote {path}; next: qlora plan {path}, then qlora submit {path}\n")
    manifest = yaml.safe_load(path.read_text())
    spec = QLoRAJobSpec.model_validate(manifest["spec"])
    assert (manifest["metadata"]["name"], spec.model.uri, spec.resources.gpus_per_node) == ("bot", "hf://a/b", 0)
    assert CliRunner().invoke(app, ["validate", str(path)]).exit_code == 0


def test_init_writes_description_and_default_of_each_field():
    text = write_manifest("bot", {"model.uri": "hf://a/b", "output.secretRef.name": "keys"})
    assert text.count("#") > len(SHOWN_FIELDS)
    assert "    # Rank r of the update matrices.\n    rank: 16\n" in text
    assert default_of("training.learningRate") == 2e-4


def test_init_does_not_overwrite_existing_file(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text("mine")
    refused = CliRunner().invoke(app, ["init", str(path)])
    assert (refused.exit_code, path.read_text()) == (1, "mine")
    assert "already exists; choose another name, or use --force" in refused.stderr
    assert CliRunner().invoke(app, ["init", str(path), "--force"]).exit_code == 0


def test_invalid_options_write_no_manifest(tmp_path: Path):
    refused = CliRunner().invoke(app, ["init", str(tmp_path / "job.yaml"), "--name", "Not.A.Name"])
    assert refused.exit_code == 1
    assert 'metadata.name: must look like support-bot, got "Not.A.Name"' in refused.stderr
    assert list(tmp_path.iterdir()) == []


ROW = '{"instruction": "Add 2 and 9.", "output": "11"}\n'


@pytest.mark.parametrize("data", ["my.jsonl", "./my.jsonl", "{folder}/my.jsonl", "file://{folder}/my.jsonl"])
def test_local_data_gives_a_manifest_for_qlora_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str):
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text(ROW * 40)
    made = CliRunner().invoke(app, ["init", "--model", "a/b", "--data", data.format(folder=tmp_path)])
    assert (made.exit_code, made.stderr) == (0, "wrote job.yaml; next: qlora run job.yaml\n")
    text = Path("job.yaml").read_text()
    spec = yaml.safe_load(text)["spec"]
    assert (spec["model"]["uri"], spec["output"], spec["lora"]["targets"]) == (
        "hf://a/b",
        {"uri": "out"},
        ["all-linear"],
    )
    assert (spec["dataset"]["evaluation"]["fraction"], spec["training"]["globalBatchSize"]) == (0.2, 4)
    assert "40 instruction rows, by the field instruction; the longest has" in " ".join(text.replace("#", "").split())
    checked = CliRunner().invoke(app, ["validate", "job.yaml"])
    assert (checked.exit_code, len(checked.stdout.splitlines())) == (0, 3)
    assert checked.stdout.startswith("job.yaml:2: QLoRAJob my-adapter is valid for qlora run\n")


def test_paths_of_a_new_manifest_are_relative_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text(ROW)
    Path("jobs").mkdir()
    assert CliRunner().invoke(app, ["init", "jobs/job.yaml", "--data", "my.jsonl"]).exit_code == 0
    monkeypatch.chdir("/")
    manifest = load_manifest(f"{tmp_path}/jobs/job.yaml", [], Console(stderr=True))
    assert manifest.spec.dataset.uri == (tmp_path / "my.jsonl").as_uri()
    assert manifest.spec.output.uri == (tmp_path / "out").as_uri()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file "),
        ("", "has no rows that can be read"),
        ('{"a": 1}\n', "has the fields a; write"),
    ],
)
def test_data_that_cannot_be_trained_on_gives_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("my.jsonl").write_text(content)
    refused = CliRunner().invoke(app, ["init", "--data", "my.jsonl"])
    assert (refused.exit_code, message in refused.stderr, Path("job.yaml").exists()) == (1, True, False)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["sus"], ["suspend\tLet a run write a checkpoint, stop and...", ":4"]),
        (["status", "--watc"], ["--watch\tKeep running and show changes until the run ends.", ":4"]),
        (["list", "-o", ""], ["table", "wide", "json", "yaml", ":4"]),
        (["submit", ""], [":0"]),
    ],
)
def test_kubectl_completes(words: list[str], found: list[str]):
    assert list(completions(words)) == found


@pytest.mark.parametrize(("program", "name"), [("qlora", "qlora"), ("kubectl-qlora", "kubectl qlora")])
def test_help_uses_invoked_program_name(program: str, name: str):
    told = subprocess.run(
        [Path(sys.executable).with_name(program), "status", "--help"], capture_output=True, text=True, check=True
    )
    assert f"Usage: {name} status [OPTIONS]" in told.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_of_each_command_is_that_of_its_help(name: str):
    documentation = inspect.getdoc(get_command(app).commands[name].callback)
    assert documentation is not None
    assert " ".join(documentation.split("\n\n")[0].split()) == COMMANDS[name].summary


@pytest.mark.parametrize(
    ("typed", "known"), [("train", "run"), ("get", "list"), ("delete", "suspend"), ("help", "--help")]
)
def test_name_of_another_program_is_answered_with_the_command(typed: str, known: str):
    refused = CliRunner().invoke(app, [typed, "job.yaml"], prog_name="qlora")
    assert (refused.exit_code, f"write qlora {known}" in " ".join(refused.stderr.split())) == (2, True)
