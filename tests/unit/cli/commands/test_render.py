from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from qlora_cli.__main__ import app
from qlora_cli.display.formats import to_yaml
from tests.unit.cli.make import JOB


def render(*args: str, text: str = JOB) -> list[Any]:
    rendered = CliRunner().invoke(app, ["render", "-", *args], input=text)
    assert rendered.exit_code == 0, rendered.stderr
    return list(yaml.safe_load_all(rendered.stdout))


def test_render_prints_defaults_and_children():
    job, *children = render("--image", "registry.example/trainer:1", "--set", "training.seed=7")
    assert job["spec"]["training"]["seed"] == 7
    assert job["spec"]["retries"] == {"maxAttempts": 5}
    assert [(child["kind"], child["metadata"]["name"]) for child in children] == [
        ("ConfigMap", "support-bot-prepare"), ("Job", "support-bot-prepare"),
        ("ConfigMap", "support-bot-1"), ("Job", "support-bot-1"),
    ]  # fmt: skip
    images = {child["spec"]["template"]["spec"]["containers"][0]["image"] for child in children if "spec" in child}
    assert images == {"registry.example/trainer:1"}


def test_several_nodes_get_a_service():
    kinds = [manifest["kind"] for manifest in render("--set", "resources.nodes=2")]
    assert kinds == ["QLoRAJob", "ConfigMap", "Job", "ConfigMap", "Service", "Job"]


def test_render_without_children_prints_only_the_qlorajob():
    assert [manifest["kind"] for manifest in render("--no-children")] == ["QLoRAJob"]


def test_invalid_manifest_is_not_rendered():
    refused = CliRunner().invoke(app, ["render", "-", "--set", "lora.rank=0"], input=JOB)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "spec.lora.rank: must be ≥ 1, got 0" in refused.stderr


@pytest.mark.parametrize("value", [{"b": 1, "a": "x\ny\n"}, {"a": [1, None, "no", "1e3", "é"], "b": {}}, "text"])
def test_yaml_keeps_what_it_is_given(value: Any):
    assert yaml.safe_load(to_yaml(value)) == value


def test_yaml_is_as_people_write_it():
    shared = {"x": 1}
    assert to_yaml({"b": shared, "a": shared, "c": "one\ntwo\n"}) == "b:\n  x: 1\na:\n  x: 1\nc: |\n  one\n  two\n"
