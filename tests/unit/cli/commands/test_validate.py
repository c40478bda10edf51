import subprocess
import sys
import textwrap
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
        (
            "[q_proj, v_proj]",
            r"['.*\.(q|v)_proj']",
            12,
            r'spec.lora.targets[0]: must look like q_proj, got ".*\\.(q|v)_proj"; '
            "patterns are not supported, write each name",
        ),
        (
            "[q_proj, v_proj]",
            "['*_proj', q_proj]",
            12,
            'spec.lora.targets[0]: must look like q_proj, got "*_proj"; patterns are not supported, write each name',
        ),
        ("[q_proj, v_proj]", "[q proj]", 12, 'spec.lora.targets[0]: must look like q_proj, got "q proj"'),
        (
            "support-bot",
            "{{ .Values.name }}",
            4,
            "invalid map key; quote the value, or render the template (helm template) before it is read",
        ),
        (
            "rank: 16",
            "? [a, b]\n    : 8",
            11,
            "invalid map key; quote the value, or render the template (helm template) before it is read",
        ),
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


@pytest.mark.parametrize("number", ["16.0", "1.6e1", "16e0", "0x10", "+16", "1_6"])
def test_integer_may_be_written_as_kubernetes_reads_it(number):
    assert validate(JOB.replace("rank: 16", f"rank: {number}"))[0] == 0


def test_integer_written_with_exponent_is_one():
    assert validate(JOB + "  training: {maxSteps: 1e3, epochs: 3.0}\n")[0] == 0


@pytest.mark.parametrize(
    ("number", "said"), [("16.5", "16.5"), ("1e-1", "0.1"), ("1e30", "1e+30"), (".inf", "Infinity"), ("1:30", '"1:30"')]
)
def test_number_that_is_no_integer_is_named(number, said):
    message = f"standard input:11: spec.lora.rank: must be an integer, got {said}"
    assert validate(JOB.replace("rank: 16", f"rank: {number}")) == (1, [message])


def in_list(*texts, kind="List", api_version="v1"):
    items = "".join(textwrap.indent(text, "  ").replace("  ", "- ", 1) for text in texts)
    return f"apiVersion: {api_version}\nkind: {kind}\nmetadata: {{resourceVersion: ''}}\nitems:\n{items}"


def test_jobs_in_a_list_are_checked_with_their_lines():
    broken = JOB.replace("rank: 16", "rank: 0")
    assert validate(in_list(JOB, "apiVersion: v1\nkind: Secret\n", broken)) == (
        1,
        [
            "standard input:5: QLoRAJob support-bot is valid",
            f"standard input:{5 + len(JOB.splitlines()) + 2 + 10}: spec.lora.rank: must be ≥ 1, got 0",
        ],
    )


@pytest.mark.parametrize(("kind", "version"), [("List", "v1"), ("QLoRAJobList", "qlora.dev/v1alpha1")])
def test_lists_of_kubectl_and_of_the_api_are_read(kind, version):
    assert validate(in_list(JOB, kind=kind, api_version=version)) == (
        0, ["standard input:5: QLoRAJob support-bot is valid"]
    )  # fmt: skip


def test_lists_in_lists_are_read():
    code, lines = validate(in_list(in_list(JOB)))
    assert (code, len(lines)) == (0, 1)


def test_object_of_the_api_server_is_valid():
    """With status and metadata as `qlora list -o yaml` writes them."""
    status = "status: {phase: Failed, observedGeneration: 1}\n"
    written = JOB.replace("name: support-bot", "name: support-bot\n  uid: abc\n  generation: 1", 1)
    assert validate(in_list(written + status))[0] == 0


@pytest.mark.parametrize("items", ["[]", "[null]", "{}", ""])
def test_list_without_jobs_is_reported(items):
    assert validate(f"apiVersion: v1\nkind: List\nitems: {items}\n") == (1, ["-: contains no QLoRAJob"])


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
