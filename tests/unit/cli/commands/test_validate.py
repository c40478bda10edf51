import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora_cli.__main__ import app
from tests.unit.cli.make import JOB

ROOT = Path(__file__).parents[4]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def validate(text: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["validate", "-"], input=text)
    return result.exit_code, result.output.splitlines()


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("rank: 16", "rank: 0", 11, "spec.lora.rank: must be ≥ 1, got 0"),
        ("rank: 16", "rank: 2000", 11, "spec.lora.rank: must be ≤ 1024, got 2000"),
        ("rank: 16", "rank: 1.5", 11, "spec.lora.rank: must be an integer, got 1.5"),
        ("rank: 16", 'rank: "16"', 11, 'spec.lora.rank: must be an integer, got "16"'),
        ("rank: 16", "dropout: 1", 11, "spec.lora.dropout: must be < 1, got 1"),
        ("rank: 16", "dora: 1", 11, "spec.lora.dora: must be true or false, got 1"),
        ("rank: 16", "rnk: 8", 11, "spec.lora.rnk: unknown field; did you mean rank?"),
        (
            "rank: 16",
            "learningRate: 1",
            11,
            "spec.lora.learningRate: unknown field; did you mean spec.training.learningRate?",
        ),
        (
            "rank: 16",
            "colour: red",
            11,
            "spec.lora.colour: unknown field; known are rank, alpha, rankPattern, alphaPattern, "
            "dropout, targets, dora, rslora, init, modulesToSave",
        ),
        ("[q_proj, v_proj]", "q_proj", 12, 'spec.lora.targets: must be a list, got "q_proj"'),
        ("[q_proj, v_proj]", "[]", 12, "spec.lora.targets: must have 1 or more entries, got []"),
        ("[q_proj, v_proj]", "[q_proj, 8]", 12, "spec.lora.targets[1]: must be a string, got 8"),
        ("rank: 16", "use_dora: true", 11, "spec.lora.use_dora: unknown field; did you mean dora?"),
        ("gpusPerNode: 0", "memory: 16GB", 14, 'spec.resources.memory: must look like 16Gi, got "16GB"'),
        ("    uri: s3://adapters/team-a\n", "    ifExists: Skip\n", 15, "spec.output.uri: is required"),
        ("s3://adapters/team-a", "a", 16, 'spec.output.uri: must look like s3://adapters/team-a, got "a"'),
        ("support-bot", "support.bot", 4, 'metadata.name: must look like support-bot, got "support.bot"'),
        ("support-bot", "x" * 53, 4, "metadata.name: may have 52 characters"),
        ("v1alpha1", "v1", 1, 'apiVersion: must be qlora.dev/v1alpha1, got "qlora.dev/v1"'),
        ("kind: QLoRAJob", "kind: QloraJob", 2, 'kind: must be QLoRAJob, got "QloraJob"'),
        (
            "s3://data",
            "file:///data",
            9,
            "spec.dataset.uri is file:///data/train.jsonl, and file:// works with 'qlora run' only; "
            "upload it and use s3://",
        ),
        (
            "[q_proj, v_proj]",
            "[q_proj, all-linear]",
            12,
            "spec.lora.targets lists all-linear with other names; list it alone, or list module names without it",
        ),
        ("rank: 16", "rank: 16\n    rank: 8", 12, "duplicate key 'rank'"),
    ],
)  # fmt: skip
def test_problem_has_line_field_and_fix(old, new, line, message):
    assert old in JOB
    expected = f"standard input:{line}: {message}"
    assert validate(JOB.replace(old, new, 1)) == (1, [expected])


def test_broken_yaml_is_named_with_its_line():
    code, lines = validate(JOB + "  evaluation: [1\n")
    assert code == 1
    assert lines == ["standard input:18: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"]


def test_all_problems_are_reported_in_file_order():
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s3-credentials}\n---\n"
    broken = JOB.replace("hf://", "").replace("rank: 16", "rank: 0")
    assert validate(f"{secret}{broken}---\n{JOB}") == (
        1,
        [
            f'standard input:11: spec.model.uri: must look like hf://{MODEL}, got "organization/name"',
            "standard input:15: spec.lora.rank: must be ≥ 1, got 0",
            "standard input:22: QLoRAJob support-bot is valid",
        ],
    )


def test_numbers_are_read_as_kubernetes_reads_them():
    assert validate(JOB + "  training: {learningRate: 4e-4, epochs: 3}\n") == (
        0,
        ["standard input:1: QLoRAJob support-bot is valid"],
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: Secret\n", "-: contains no QLoRAJob"),
        ("", "-: contains no QLoRAJob"),
        ("just text\n", 'standard input:1: a QLoRAJob: must be a mapping of fields, got "just text"'),
        ("spec: {x: &a [*a]}\n", "standard input: an anchor contains itself, or the nesting is too deep"),
    ],
)
def test_file_without_manifest_is_reported(text, message):
    assert validate(text) == (1, [message])


def test_missing_file_does_not_hide_problems_of_others():
    result = CliRunner().invoke(app, ["validate", "missing.yaml", str(ROOT / "examples/quickstart/job.yaml")])
    assert result.exit_code == 1
    assert "missing.yaml: No such file or directory" in result.output
    assert "QLoRAJob quickstart is valid" in result.output


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["validate", "examples/quickstart/job.yaml"]])
def test_quick_commands_do_not_import_the_trainer(command):
    code = (
        "import sys\n"
        "from qlora_cli.__main__ import app\n"
        f"try: app({command})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'boto3', 'kopf', 'kubernetes', 'qlora_trainer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True, capture_output=True)
