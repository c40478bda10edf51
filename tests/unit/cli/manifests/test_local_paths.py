"""Local paths of a manifest: written in any way, relative to its folder, and never sent to a cluster."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora_cli.__main__ import app
from qlora_cli.hub_cache import offline_hub_cache
from qlora_cli.manifests.job_files import read_jobs
from qlora_cli.manifests.local_paths import to_local_uri
from qlora_cli.options import make_platform
from tests.unit.cli.make import JOB

DATA, MODEL, OUTPUT = ("spec", "dataset", "uri"), ("spec", "model", "uri"), ("spec", "output", "uri")


@pytest.mark.parametrize(
    ("field", "text", "path"),
    [
        (DATA, "my.jsonl", "my.jsonl"),
        (DATA, "./my.jsonl", "my.jsonl"),
        (DATA, "data/my.csv.gz", "data/my.csv.gz"),
        (DATA, "../my.jsonl", "../my.jsonl"),
        (DATA, "file://my.jsonl", "my.jsonl"),
        (DATA, "file:./my.jsonl", "my.jsonl"),
        (DATA, "file://../my.jsonl", "../my.jsonl"),
        (DATA, "/data/my.jsonl", "/data/my.jsonl"),
        (DATA, "rows/", "rows"),
        (MODEL, "./model", "model"),
        (MODEL, "here/model", "here/model"),
        (OUTPUT, "out", "out"),
    ],
)
def test_path_is_relative_to_the_folder_of_the_manifest(
    tmp_path: Path, field: tuple[str, ...], text: str, path: str
) -> None:
    folder = tmp_path / "jobs"
    for name in ("rows", "here/model"):
        (folder / name).mkdir(parents=True)
    assert to_local_uri(field, text, folder).rstrip("/") == (folder / path).resolve().as_uri()


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (DATA, "s3://bucket/my.jsonl"),
        (DATA, "tatsu-lab/alpaca"),
        (DATA, "hf://datasets/a/b/c.jsonl"),
        (DATA, "file:///data/my.jsonl"),
        (MODEL, "meta-llama/Llama-3.1-8B"),
        (MODEL, "pvc://claim/model"),
        (OUTPUT, "s3://bucket/out"),
        (OUTPUT, ""),
    ],
)
def test_uri_and_name_of_the_hub_are_unchanged(tmp_path: Path, field: tuple[str, ...], text: str) -> None:
    assert to_local_uri(field, text, tmp_path) == text


def test_sources_and_held_out_rows_may_be_local(tmp_path: Path) -> None:
    sources = "dataset: {sources: [{uri: a.jsonl}, {uri: s3://bucket/b}], evaluation: {uri: c.jsonl}}"
    job = tmp_path / "job.yaml"
    job.write_text(JOB.replace("dataset:\n    uri: s3://data/train.jsonl", sources))
    [document] = read_jobs(str(job))
    assert document.value["spec"]["dataset"] == {
        "sources": [{"uri": (tmp_path / "a.jsonl").as_uri()}, {"uri": "s3://bucket/b"}],
        "evaluation": {"uri": (tmp_path / "c.jsonl").as_uri()},
    }


def test_manifest_with_local_data_is_valid_with_a_note_and_not_submitted(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB.replace("s3://data/train.jsonl", "my.jsonl"))
    (tmp_path / "my.jsonl").touch()
    checked = CliRunner().invoke(app, ["validate", str(job)])
    assert (checked.exit_code, checked.stdout.splitlines()) == (
        0,
        [
            f"{job}:1: QLoRAJob support-bot is valid for qlora run",
            f"{job}:9: spec.dataset.uri: {tmp_path}/my.jsonl is on this machine; only qlora run {job} can use it, "
            "a cluster needs s3://",
        ],
    )
    for command in ("submit", "render"):
        refused = CliRunner().invoke(app, [command, str(job)])
        assert refused.exit_code == 1
        assert "file:// works with 'qlora run' only" in refused.stderr
        assert refused.stderr.endswith(f"to train with local files, on this machine: qlora run {job}\n")


def test_missing_local_file_is_named(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB.replace("s3://data/train.jsonl", "my.jsonl"))
    checked = CliRunner().invoke(app, ["validate", str(job)])
    assert f"nothing is at {tmp_path}/my.jsonl on this machine" in checked.stdout


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({}, None),
        ({"HF_HUB_OFFLINE": "0"}, None),
        ({"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/cache"}, "/cache"),
        ({"HF_HUB_OFFLINE": "true", "HF_HOME": "/home"}, "/home/hub"),
        ({"TRANSFORMERS_OFFLINE": "1", "XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ],
)
def test_hub_cache_is_the_mirror_when_offline(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], cache: str | None
) -> None:
    for name in (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HOME",
        "XDG_CACHE_HOME",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert offline_hub_cache() == cache
    assert make_platform(None, None, None).hub_mirror == (cache and f"file://{cache}")
    assert make_platform("/mirror", None, None).hub_mirror == "file:///mirror"
