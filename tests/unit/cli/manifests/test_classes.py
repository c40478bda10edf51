"""`qlora validate` and `qlora render` with QLoRAClasses, and the examples."""

from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from typer.testing import CliRunner, Result

from qlora_api import names
from qlora_cli.__main__ import app
from qlora_cli.manifests.classes import parse_class, to_raw_class
from qlora_cli.manifests.yaml_documents import read_documents
from tests.unit.cli.make import JOB

EXAMPLE: Final = Path(__file__).parents[4] / "examples/class/ten-teams.yaml"
CLASS: Final = """\
apiVersion: qlora.dev/v1alpha1
kind: QLoRAClass
metadata:
  name: team-a
spec:
  namespaces: {selector: {matchLabels: {team: a}}}
  queue: {name: gpus}
  resources:
    prepare: {memory: 16Gi}
  pods:
    labels: {cost-center: "42"}
    train: {runtimeClassName: nvidia}
"""
NAMED: Final = JOB.replace("spec:\n", "spec:\n  className: team-a\n")


def run(*args: str, text: str) -> Result:
    return CliRunner().invoke(app, args, input=text)


def jobs_of(result: Result) -> dict[str, dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    documents = yaml.safe_load_all(result.stdout)
    return {found["metadata"]["name"]: found for found in documents if found["kind"] == "Job"}


@pytest.mark.parametrize("text", [CLASS, f"{NAMED}---\n{CLASS}"], ids=["alone", "beside-a-job"])
def test_valid_class_is_said_to_be(text: str) -> None:
    result = run("validate", "-", text=text)
    assert result.exit_code == 0
    assert "QLoRAClass team-a is valid" in result.output


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("cost-center", "job-name", 11, "spec.pods.labels: 'job-name' is set by the operator or"),
        ("runtimeClassName", "runtimeClass", 12, "spec.pods.train.runtimeClass: unknown field; remove it,"),
        ("16Gi", "16GB", 9, 'spec.resources.prepare.memory: must look like 16Gi, got "16GB"'),
        ("{team: a}", "{team: [a]}", 6, "spec.namespaces.selector.matchLabels.team: must be a string"),
        ("{name: gpus}", "gpus", 7, 'spec.queue: must be a mapping of fields, got "gpus"'),
        ("{name: gpus}", "{name: gpus, name: other}", 7, "spec.queue.name: duplicate key, first at standard input:7"),
        ("name: team-a", "name: Team_A", 4, 'metadata.name: must look like team-a, got "Team_A"'),
        ("v1alpha1", "v2", 1, "apiVersion: must be qlora.dev/v1alpha1"),
        ("  queue: {name: gpus}\n", "  speed: high\n", 7, "spec.speed: unknown field"),
    ],
)  # fmt: skip
def test_wrong_class_is_refused_with_line_field_and_fix(old: str, new: str, line: int, message: str) -> None:
    assert old in CLASS
    result = run("validate", "-", text=CLASS.replace(old, new, 1))
    assert result.exit_code == 1
    assert f"standard input:{line}: {message}" in result.output


@pytest.mark.parametrize("command", ["render", "submit"])
def test_class_alone_is_nothing_to_render_or_submit(command: str) -> None:
    result = run(command, "-", text=CLASS)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "contains no QLoRAJob, only" in result.stderr


@pytest.mark.parametrize("beside", [True, False], ids=["in-the-same-file", "in-its-own-file"])
def test_render_shows_the_jobs_with_their_class(tmp_path: Path, beside: bool) -> None:
    file = tmp_path / "class.yaml"
    file.write_text(CLASS)
    args, text = ([], f"{NAMED}---\n{CLASS}") if beside else (["--class", str(file)], NAMED)
    result = run("render", "-", *args, text=text)
    prepare, train = jobs_of(result).values()
    assert train["metadata"]["labels"][names.CLASS_LABEL] == "team-a"
    assert train["metadata"]["labels"][names.QUEUE_LABEL] == "gpus"
    assert train["spec"]["template"]["spec"]["runtimeClassName"] == "nvidia"
    assert prepare["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {"memory": "16Gi"}
    assert "runtimeClassName" not in prepare["spec"]["template"]["spec"]
    assert {job["spec"]["template"]["metadata"]["labels"]["cost-center"] for job in (prepare, train)} == {"42"}


def test_render_takes_a_default_class_for_a_run_that_names_none() -> None:
    default = CLASS.replace("name: team-a", 'name: team-a\n  annotations: {qlora.dev/is-default-class: "true"}')
    for text, expected in ((default, "team-a"), (CLASS, None)):
        train = jobs_of(run("render", "-", text=f"{JOB}---\n{text}"))["support-bot-1"]
        assert train["metadata"]["labels"].get(names.CLASS_LABEL) == expected


def test_render_of_a_class_that_no_file_has_says_how_to_pass_it() -> None:
    result = run("render", "-", text=NAMED)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "spec.className: QLoRAClass team-a does not exist" in result.stderr
    assert "qlora render --class FILE reads one" in result.stderr


def test_render_of_a_class_for_other_namespaces_is_refused() -> None:
    other = CLASS.replace("{selector: {matchLabels: {team: a}}}", "{names: [other]}")
    result = run("render", "-", text=f"{NAMED}---\n{other}")
    assert result.exit_code == 1
    assert "is not for namespace default" in result.stderr


def test_render_with_values_of_the_chart_shows_what_they_set(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("replicas: 2\npods:\n  securityContext: {runAsUser: null}\n  train: {schedulerName: volcano}\n")
    train = jobs_of(run("render", "-", "--values", str(values), text=JOB))["support-bot-1"]["spec"]["template"]["spec"]
    assert train["schedulerName"] == "volcano"
    assert train["securityContext"] == {
        "runAsNonRoot": True, "runAsGroup": 65532, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip


def test_render_with_wrong_values_names_the_field(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("pods: {labels: {job-name: x}}\n")
    result = run("render", "-", "--values", str(values), text=JOB)
    assert result.exit_code == 1
    assert "pods.labels: 'job-name' is set by the operator" in result.stderr


def test_example_has_a_default_class_for_each_of_ten_teams() -> None:
    classes = [to_raw_class(parse_class(found), found.value["spec"]) for found in read_documents(str(EXAMPLE))]
    assert len({known.name for known in classes if known.is_default}) == 10
    assert [known.name for known in classes if not known.is_default] == ["high-priority"]
