"""The annotations for Artifact Hub in Chart.yaml match the chart."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api import __version__, names
from qlora_api.crd import build_crd, spec_schema
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


NAMES_A_PLACE: Final = re.compile(r"(uri|url|host|endpoint|server|address|registry|repository|proxy)s?$", re.IGNORECASE)
"""Field names that say where something is; a field is also one if a pattern of it has `://`."""


def uri_fields(schema: dict[str, Any], path: str = "spec") -> Iterator[str]:
    """Yield the path of every field by which a user names a URI, a host or an endpoint."""
    for name, field in schema.get("properties", {}).items():
        inner = f"{path}.{name}"
        leaf, inner = (field["items"], f"{inner}[]") if "items" in field else (field, inner)
        yield from uri_fields(leaf, inner)
        rules = [rule["rule"] for rule in leaf.get("x-kubernetes-validations", ())]
        is_place = NAMES_A_PLACE.search(name) or "://" in " ".join([leaf.get("pattern", ""), *rules])
        if leaf["type"] == "string" and is_place:
            yield inner


def test_policy_knows_the_default_server_of_wandb() -> None:
    template = (CHART / "templates/_policy.tpl").read_text(encoding="utf-8")
    [default] = re.findall(r"orValue\('(https://[^']+)'\)", template)
    [package] = (find_spec("wandb") or pytest.fail("wandb is not installed")).submodule_search_locations or ()
    assert f'DEFAULT_BASE_URL = "{default}"' in (Path(package) / "sdk/lib/urls.py").read_text(encoding="utf-8")


def test_policy_restricts_every_field_that_names_a_uri() -> None:
    template = (CHART / "templates/_policy.tpl").read_text(encoding="utf-8")
    assert sorted(re.findall(r"'field': '([^']+)'", template)) == sorted(uri_fields(spec_schema()))


@pytest.mark.parametrize(
    "field",
    [
        {"apiEndpoint": {"type": "string"}},
        {"mirror": {"type": "string", "pattern": "^https://.+$"}},
        {"from": {"type": "string", "x-kubernetes-validations": [{"rule": "self.startsWith('s3://')"}]}},
        {"mirrors": {"type": "array", "items": {"type": "string", "pattern": "^s3://"}}},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_new_field_that_names_a_uri_is_noticed(field: dict[str, Any]) -> None:
    inner = {"type": "object", "properties": field}
    [found] = uri_fields({"properties": {"block": inner}})
    assert found.removesuffix("[]") == f"spec.block.{next(iter(field))}"
