"""`qlora validate` refuses what the API server would refuse only in the pods of a run, after its preparation."""

from typing import Any

import pytest
import yaml

from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.yaml_documents import parse_documents
from qlora_planner.validation import CLUSTER_RULES
from tests.integration.test_validate_agrees import ACCEPTED, PODS_REFUSED, Change, manifest, validated
from tests.make import make_manifest


@pytest.mark.parametrize("change", PODS_REFUSED, ids=str)
def test_manifest_whose_pods_would_be_refused_is_invalid(change: Change) -> None:
    assert validated(manifest(change))


@pytest.mark.parametrize("change", ACCEPTED, ids=str)
def test_manifest_whose_pods_are_accepted_is_valid(change: Change) -> None:
    assert validated(manifest(change)) == ""


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (
            {"tolerations": [{"operator": "Exists"}, {"key": "gpu", "operator": "Exists", "value": "true"}]},
            "spec.resources.tolerations[1].value is true, but operator Exists matches every value; "
            "leave value out, or write Equal",
        ),
        (
            {"tolerations": [{"key": "spot", "operator": "Exists", "tolerationSeconds": 60}]},
            "spec.resources.tolerations[0].tolerationSeconds is set, but effect is not set; write effect "
            "NoExecute, or leave tolerationSeconds out",
        ),
        (
            {"tolerations": [{"value": "x"}]},
            "spec.resources.tolerations[0].key is missing, and operator Equal needs one; add the taint's key, or "
            "write operator Exists for all taints",
        ),
        (
            {"memory": "512m"},
            "spec.resources.memory is 512m, in thousandths of a byte; write 512Mi, or another unit",
        ),
        (
            {"memory": "16"},
            "spec.resources.memory is 16, and a training pod takes from 256Mi to 1024Ti; write a number and a unit, "
            "such as 16Gi",
        ),
        ({"cpu": "0"}, "spec.resources.cpu is 0, and training needs a CPU; write 2 or 500m"),
        (
            {"cpu": "2Gi"},
            "spec.resources.cpu is 2Gi, with a unit of memory; write cores, such as 2, or thousandths, such as 500m",
        ),
        (
            {"nodeSelector": {"a" * 64: "x"}},
            "spec.resources.nodeSelector.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.[key]: "
            "write a label key, such as topology.kubernetes.io/zone: at most 63 characters after the '/', got "
            '"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…',
        ),
    ],
)
def test_problem_of_pod_names_field_cause_and_fix(resources: dict[str, Any], message: str) -> None:
    assert validated(make_manifest(resources=resources)).partition(": ")[2] == message


def test_problem_of_toleration_has_its_line() -> None:
    tolerations = [{"operator": "Exists"}, {"key": "gpu"}, {"key": "gpu", "operator": "Exists", "value": "true"}]
    text = yaml.safe_dump(make_manifest(resources={"tolerations": tolerations}))
    [document] = parse_documents(text, "job.yaml")
    with pytest.raises(ManifestError) as error:
        parse_manifest(document, CLUSTER_RULES)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "value: 'true'" in line)
    assert str(error.value).startswith(f"job.yaml:{line}: spec.resources.tolerations[2].value is true")
