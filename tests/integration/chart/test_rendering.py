"""What Helm would send, byte for byte; `QLORA_WRITE_GOLDEN=1` writes the files anew."""

import os
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api.v1alpha1 import QLoRAJobSpec
from tests.integration.chart.rendering import names_of, notes_of, render

FOLDER: Final = Path(__file__).parent / "golden"
GENERATED: Final = {"CustomResourceDefinition"}
"""Compared with the code by `make check`."""

VALUES: Final[dict[str, dict[str, Any]]] = {
    "defaults": {},
    "namespaced": {
        "watchNamespaces": ["team-a", "team-b"],
        "serviceAccount": {"name": "qlora"},
        "rbac": {"aggregate": False},
        "crds": {"enabled": False},
    },
    "private": {
        "image": {"repository": "registry.example/operator", "digest": f"sha256:{'a' * 64}", "pullPolicy": "Always"},
        "trainerImage": {"repository": "registry.example/trainer", "tag": "1.0"},
        "imagePullSecrets": [{"name": "registry"}],
        "platform": {
            "s3": {"endpoint": "https://s3.example", "region": "eu", "addressing": "path"},
            "hub": {"mirror": "s3://models/hub"},
        },
        "serviceAccount": {"annotations": {"team": "ml"}},
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"team": "ml"},
        "priorityClassName": "system-cluster-critical",
    },
    "bare": {
        "replicas": 1,
        "crds": {"keep": False},
        "serviceAccount": {"create": False, "name": "ours"},
        "rbac": {"create": False},
        "podDisruptionBudget": {"enabled": False},
    },
}
"""The sets of values that are looked at whole."""


@pytest.mark.parametrize("name", VALUES)
def test_what_is_sent(name: str) -> None:
    manifests = [manifest for manifest in render(VALUES[name]) if manifest["kind"] not in GENERATED]
    text = yaml.safe_dump_all(manifests, sort_keys=False, width=120)
    path = FOLDER / f"{name}.yaml"
    if os.environ.get("QLORA_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_nothing_of_a_namespaced_installation_gives_rights_on_runs_elsewhere() -> None:
    roles = names_of(render(VALUES["namespaced"]))
    assert {role for role in roles if role.startswith("Cluster")} == {
        "ClusterRole/qlora-operator-cluster",
        "ClusterRoleBinding/qlora-operator-cluster",
    }


@pytest.mark.parametrize("name", VALUES)
def test_no_rule_has_a_wildcard_or_reads_secrets(name: str) -> None:
    rules = [rule for manifest in render(VALUES[name]) for rule in manifest.get("rules", ())]
    words = {word for rule in rules for values in rule.values() for word in values}
    assert not words & {"*", "secrets", "pods/exec", "impersonate", "escalate", "bind"}


@pytest.mark.parametrize(
    ("values", "starts"),
    [
        pytest.param({"platform": {"hub": {"endpoint": "https://hub.example"}}}, (), id="nothing"),
        pytest.param({}, ("NOTE: models come from the public hub",), id="defaults"),
        pytest.param(VALUES["namespaced"], ("NOTE: models come from the public hub",), id="namespaced"),
        pytest.param(VALUES["private"], (), id="private"),
        pytest.param(
            VALUES["bare"],
            (
                "WARNING: replicas is 1",
                "NOTE: models come",
                "WARNING: crds.keep is false",
                "WARNING: rbac.create is false",
            ),
            id="bare",
        ),
        pytest.param(
            {"image": {"tag": "latest"}, "platform": {"hub": {"mirror": "s3://models/hub"}}},
            ("WARNING: image.tag latest moves", "WARNING: platform.hub.mirror is for clusters without a way out"),
            id="moving-and-air-gapped",
        ),
        pytest.param(
            {
                "image": {"tag": "latest", "digest": f"sha256:{'a' * 64}"},
                "platform": {"hub": {"endpoint": "https://hub.example"}},
            },
            (),
            id="pinned",
        ),
    ],
)
def test_notes_warn_of_what_may_surprise(values: dict[str, Any], starts: tuple[str, ...]) -> None:
    warnings = [line for line in notes_of(values).splitlines() if line.startswith(("WARNING", "NOTE:"))]
    assert [line[: len(start)] for line, start in zip(warnings, starts, strict=True)] == list(starts)


def test_the_first_run_of_the_notes_is_a_valid_one() -> None:
    notes = notes_of({"watchNamespaces": ["team-a"]})
    assert "--namespace team-a" in notes
    manifest = notes.split("<<EOF\n")[1].split("EOF\n")[0]
    assert QLoRAJobSpec.model_validate(yaml.safe_load(manifest)["spec"]).lora.rank == 16
