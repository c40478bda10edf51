"""QLoRAClasses on a real API server: what it accepts and refuses, and the pods of a run that uses one."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api import names
from qlora_api.reasons import Reason
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import CommandError, wait_until
from tests.integration.operator_process import NAME, PREPARE, ROOT, STEP_PATIENCE, Operator, install
from tests.integration.test_pod_profile import EVERYTHING
from tests.make import make_manifest

EXAMPLE: Final = ROOT / "examples/class/ten-teams.yaml"
NAMESPACE: Final = "class"


@pytest.fixture(scope="module")
def installed(control_plane: Cluster) -> Cluster:
    install(control_plane)
    wait_until(
        "the class API", lambda: "qloraclasses" in control_plane.kubectl("api-resources", "--api-group=qlora.dev"), 60
    )
    control_plane.create_namespace(NAMESPACE)
    return control_plane


def make_class(name: str = "team-a", annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "annotations": annotations or {}}
    return {"apiVersion": names.API_VERSION, "kind": names.CLASS_KIND, "metadata": metadata, "spec": spec}


def stored(cluster: Cluster, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the API server makes of a class, without storing it."""
    text = cluster.kubectl(
        "create", "--dry-run=server", "--validate=strict", "-o", "json", "-f", "-", stdin=yaml.safe_dump(manifest)
    )
    return json.loads(text)


def refusal_of(cluster: Cluster, manifest: dict[str, Any]) -> str:
    with pytest.raises(CommandError) as refusal:
        stored(cluster, manifest)
    return str(refusal.value)


def test_class_with_every_setting_is_stored_as_written(installed: Cluster) -> None:
    pods = copy.deepcopy(EVERYTHING)
    selector = {"matchExpressions": [{"key": "team", "operator": "In", "values": ["a"]}]}
    spec = {
        "namespaces": {"names": ["ml"], "selector": selector},
        "queue": {"name": "gpus", "priorityClass": "nightly", "required": True},
        "resources": {"prepare": {"cpu": "4", "memory": "64Gi", "ephemeralStorage": "400Gi"}},
        "ttl": "7d",
        "pods": {**pods, "prepare": {"labels": {"a": "b"}}, "train": {"nodeSelector": {"pool": "gpu"}}},
    }  # fmt: skip
    assert stored(installed, make_class(**spec))["spec"] == spec


def test_toleration_without_operator_is_for_one_value(installed: Cluster) -> None:
    toleration = {"key": "team", "value": "a", "effect": "NoSchedule"}
    [kept] = stored(installed, make_class(pods={"train": {"tolerations": [toleration]}}))["spec"]["pods"]["train"][
        "tolerations"
    ]
    assert kept == toleration | {"operator": "Equal"}


def test_example_is_accepted(installed: Cluster) -> None:
    for manifest in yaml.safe_load_all(EXAMPLE.read_text(encoding="utf-8")):
        assert stored(installed, manifest)["spec"] == manifest["spec"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        pytest.param({"pods": {"labels": {"job-name": "x"}}}, "is set by the operator or", id="label"),
        pytest.param({"pods": {"annotations": {"no key/": "x"}}}, "write name or prefix/name", id="key"),
        pytest.param({"pods": {"train": {"env": [{"name": "RANK", "value": "0"}]}}}, "remove it", id="variable"),
        pytest.param(
            {"pods": {"volumeMounts": [{"name": "a", "mountPath": "/etc/qlora"}]}}, "choose another path", id="path"
        ),
        pytest.param({"pods": {"train": {"dnsPolicy": "Any"}}}, "dnsPolicy", id="word"),
        pytest.param({"queue": {"name": "Not A Name"}}, "spec.queue.name", id="queue"),
        pytest.param({"ttl": "soon"}, "spec.ttl", id="duration"),
        pytest.param({"resources": {"prepare": {"memory": "500m"}}}, "thousandths of a byte", id="memory"),
        pytest.param(
            {"namespaces": {"selector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}},
            "need values",
            id="selector",
        ),
        pytest.param({"speed": "high"}, 'unknown field "spec.speed"', id="unknown"),
    ],
)  # fmt: skip
def test_wrong_class_is_refused_by_the_api_server(installed: Cluster, spec: dict[str, Any], words: str) -> None:
    assert words in refusal_of(installed, make_class(**spec))


def test_name_that_is_no_label_is_refused(installed: Cluster) -> None:
    assert "63 characters" in refusal_of(installed, make_class("a" * 64))


@pytest.mark.parametrize(
    ("before", "after"),
    [("team-a", "team-b"), ("team-a", None), (None, "team-a")],
    ids=["changed", "removed", "added"],
)
def test_class_name_of_a_run_cannot_change(installed: Cluster, before: str | None, after: str | None) -> None:
    name = f"fixed-{before}-{after}".lower()
    manifest = make_manifest(name, NAMESPACE, **({"className": before} if before else {}), suspend=True)
    installed.kubectl("create", "-f", "-", stdin=yaml.safe_dump(manifest))
    patch = json.dumps({"spec": {"className": after}})
    with pytest.raises(CommandError, match=r"spec\.className cannot change"):
        installed.kubectl("patch", "qlorajob", name, f"--namespace={NAMESPACE}", "--type=merge", f"--patch={patch}")
    installed.kubectl(
        "patch", "qlorajob", name, f"--namespace={NAMESPACE}", "--type=merge", '--patch={"spec":{"ttl":"1h"}}'
    )


def test_kubectl_explains_and_prints_a_class(installed: Cluster) -> None:
    default = {names.DEFAULT_CLASS_ANNOTATION: "true"}
    installed.apply(make_class("printed", default, namespaces={"names": ["nobody"]}, queue={"name": "gpus"}))
    assert "RuntimeClass" in installed.kubectl("explain", "qloraclass.spec.pods.train.runtimeClassName")
    [header, line] = installed.kubectl("get", "qlc", "printed").splitlines()
    assert header.split() == ["NAME", "DEFAULT", "QUEUE", "RUNTIMECLASS", "AGE"]
    assert line.split()[:3] == ["printed", "true", "gpus"]


@pytest.fixture
def operator(installed: Cluster, tmp_path: Path) -> Iterator[Operator]:
    operator = Operator(installed, tmp_path, NAMESPACE).start()
    yield operator
    operator.stop()


def test_run_waits_for_its_class_and_has_its_pods(installed: Cluster, operator: Operator) -> None:
    installed.kubectl("label", "namespace", NAMESPACE, "team=a", "--overwrite")
    installed.apply(make_manifest(NAME, NAMESPACE, className="late"))

    def read(kind: str, name: str) -> dict[str, Any]:
        found = installed.kubectl("get", kind, name, "-n", NAMESPACE, "--ignore-not-found", "-o", "json")
        return json.loads(found) if found.strip() else {}

    def reason() -> str | None:
        return read("qlorajob", NAME).get("status", {}).get("reason")

    wait_until("the run to wait", lambda: reason() == Reason.CLASS_NOT_READY, STEP_PATIENCE)
    assert not read("job", PREPARE)
    spec = {
        "namespaces": {"selector": {"matchLabels": {"team": "a"}}},
        "resources": {"prepare": {"memory": "6Gi"}},
        "pods": {"labels": {"cost-center": "42"}, "prepare": {"nodeSelector": {"pool": "large"}}},
    }
    installed.apply(make_class("late", **spec))
    wait_until("the prepare Job", lambda: bool(read("job", PREPARE)), STEP_PATIENCE)
    [pod] = wait_for_pods(installed)
    assert pod["metadata"]["labels"][names.CLASS_LABEL] == "late"
    assert pod["metadata"]["labels"]["cost-center"] == "42"
    assert pod["spec"]["nodeSelector"] == {"pool": "large"}
    assert pod["spec"]["containers"][0]["resources"]["limits"] == {"memory": "6Gi"}
    wait_until("the record", lambda: "class" in read("qlorajob", NAME).get("status", {}), STEP_PATIENCE)
    recorded = read("qlorajob", NAME)["status"]["class"]
    assert recorded == {
        "name": "late", "generation": 1, "settings": {name: spec[name] for name in ("resources", "pods")},
    }  # fmt: skip
    installed.kubectl("delete", "qlc", "late")
    assert read("job", PREPARE)
    assert operator.process is not None
    assert operator.process.poll() is None


def wait_for_pods(cluster: Cluster) -> list[dict[str, Any]]:
    def listed() -> list[dict[str, Any]]:
        text = cluster.kubectl("get", "pods", "-n", NAMESPACE, "-l", f"{names.JOB_LABEL}={NAME}", "-o", "json")
        return list(json.loads(text)["items"])

    wait_until("a pod", lambda: len(listed()) == 1, STEP_PATIENCE)
    return listed()
