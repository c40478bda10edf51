"""`qlora init`, completion behind kubectl, and the name that a user typed."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_cli.__main__ import app
from qlora_cli.commands.init import SHOWN_FIELDS, default_of, write_manifest
from qlora_cli.completion import completions


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
