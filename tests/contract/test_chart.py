"""The annotations for Artifact Hub in Chart.yaml match the chart."""

from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api import __version__, names
from qlora_api.crd import build_crd
from qlora_api.v1alpha1 import QLoRAJobSpec

CHART: Final = Path(__file__).parents[2] / "charts/qlora-operator"


@pytest.fixture
def chart() -> dict[str, Any]:
    return dict(yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8")))


def told(chart: dict[str, Any], annotation: str) -> Any:
    return yaml.safe_load(chart["annotations"][f"artifacthub.io/{annotation}"])


def test_the_chart_installs_this_operator(chart: dict[str, Any]) -> None:
    assert chart["appVersion"] == __version__


def test_its_crds_are_named(chart: dict[str, Any]) -> None:
    [crd] = told(chart, "crds")
    assert (crd["kind"], crd["version"], crd["name"]) == (names.KIND, names.VERSION, build_crd()["metadata"]["name"])


def test_its_example_is_a_valid_run(chart: dict[str, Any]) -> None:
    [example] = told(chart, "crdsExamples")
    assert (example["apiVersion"], example["kind"]) == (names.API_VERSION, names.KIND)
    assert QLoRAJobSpec.model_validate(example["spec"]).lora.targets == ("all-linear",)


def test_its_changes_are_of_a_kind_that_is_known(chart: dict[str, Any]) -> None:
    kinds = {change["kind"] for change in told(chart, "changes")}
    assert kinds <= {"added", "changed", "deprecated", "removed", "fixed", "security"}
