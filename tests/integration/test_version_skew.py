"""The CRD moves to the next version, back below this one and back again; operators restart; no run notices."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api import names
from qlora_api.reasons import Reason
from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.operator_process import JobNamespace, Operator, install
from tests.make import (
    PREPARED_MESSAGE,
    PUBLISHED_MESSAGE,
    make_manifest,
    make_termination_message,
    merge,
    message_for,
)

CRD: Final = Path(__file__).parents[2] / "crds/qlorajobs.qlora.dev.yaml"
PHASES: Final = {
    "preparing": "Preparing",
    "queued": "Queued",
    "training": "Training",
    "retrying": "Training",
    "suspended": "Suspended",
}
"""The run of each phase, by its name."""
SETTLED: Final = 3.0
"""Seconds in which an operator that was to act on a run would have: the watch delivers within one."""

Schema = dict[str, Any]


def load_crd() -> Schema:
    return dict(yaml.safe_load(CRD.read_text(encoding="utf-8")))


def properties(crd: Schema, *path: str) -> Schema:
    """Return the properties of a block of a QLoRAJob."""
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for name in path:
        schema = schema["properties"][name]
    found: Schema = schema["properties"]
    return found


def next_crd() -> Schema:
    """The CRD of the next version: more fields with defaults, more words."""
    crd = load_crd()
    properties(crd, "spec", "training")["gradientNoise"] = {"type": "number", "default": 0}
    properties(crd, "spec", "lora")["variant"] = {"type": "string", "enum": ["plain", "fancy"], "default": "plain"}
    properties(crd, "spec")["priority"] = {
        "type": "object", "default": {"level": 1}, "properties": {"level": {"type": "integer", "default": 1}},
    }  # fmt: skip
    properties(crd, "spec")["distribution"]["enum"].append("zero4")
    properties(crd, "status")["rehearsal"] = {"type": "object", "properties": {"steps": {"type": "integer"}}}
    properties(crd, "status")["reason"]["enum"].append("RehearsedAtNight")
    properties(crd, "status")["phase"]["enum"].append("Rehearsing")
    attempts = properties(crd, "status")["attempts"]["items"]["properties"]
    attempts["reason"]["enum"].append("SolarFlare")
    attempts["joules"] = {"type": "integer"}
    return crd


def former_crd() -> Schema:
    """The CRD of the former version: what it does not have yet is pruned, and its lists lack a reason."""
    crd = load_crd()
    for path, field in (
        (("spec",), "ttl"), (("spec", "lora"), "init"), (("spec", "deadlines"), "heartbeat"),
        (("status",), "checkpoint"), (("status",), "lastReport"), (("status", "plan"), "image"),
        (("status", "model"), "config"),
    ):  # fmt: skip
        del properties(crd, *path)[field]
        if len(path) > 1:
            properties(crd, *path[:-1])[path[-1]].get("default", {}).pop(field, None)
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for block in (spec, *spec["properties"].values()):
        block.pop("x-kubernetes-validations", None)
    status = properties(crd, "status")
    for owner in (status, *(status[name]["items"]["properties"] for name in ("attempts", "conditions"))):
        owner["reason"]["enum"].remove("S3Unavailable")
    return crd


def serve(cluster: Cluster, crd: Schema, served: Callable[[], bool]) -> None:
    """Replace the CRD, and wait until the API server reads and writes by it."""
    cluster.kubectl("replace", "--filename=-", stdin=json.dumps(crd))
    cluster.wait_until_served()
    wait_until("the CRD", served, 30)


@pytest.fixture(scope="module")
def installed(control_plane: Cluster) -> Iterator[Cluster]:
    install(control_plane)
    yield control_plane
    control_plane.kubectl("replace", "--filename=-", stdin=json.dumps(load_crd()))


@pytest.fixture
def operator(installed: Cluster, job_namespace: JobNamespace, tmp_path: Path) -> Iterator[Operator]:
    operator = Operator(installed, tmp_path, job_namespace.namespace).start()
    yield operator
    operator.stop_and_check_log()


def submit(namespace: JobNamespace, name: str, **change: Any) -> None:
    namespace.cluster.admin.create(
        namespace.path("qlorajobs"), make_manifest(name, namespace.namespace, **merge({"ttl": "7d"}, change))
    )
    namespace.wait_for("Preparing", name=name)


def prepare(namespace: JobNamespace, name: str) -> None:
    namespace.end_pod(names.prepare_job_name(name), 0, message_for(name, PREPARED_MESSAGE))


def start(namespace: JobNamespace, name: str, attempt: int = 1) -> None:
    namespace.start_pod(names.train_job_name(name, attempt))
    namespace.wait_for("Training", name=name)


def fail(namespace: JobNamespace, name: str, reason: str, attempt: int = 1) -> None:
    message = make_termination_message(Reason(reason), "of the attempt")
    namespace.end_pod(names.train_job_name(name, attempt), 1, message)


def publish(namespace: JobNamespace, name: str, attempt: int) -> None:
    namespace.end_pod(names.train_job_name(name, attempt), 0, message_for(name, PUBLISHED_MESSAGE))
    namespace.wait_for("Succeeded", "Published", name=name)


def start_runs(namespace: JobNamespace) -> None:
    """Bring one run into each phase."""
    submit(namespace, "preparing")
    submit(namespace, "queued", queue={"name": "research"})
    for name in ("training", "retrying", "suspended"):
        submit(namespace, name)
    for name in ("queued", "training", "retrying", "suspended"):
        prepare(namespace, name)
    namespace.wait_for("Queued", name="queued")
    for name in ("training", "retrying", "suspended"):
        start(namespace, name)
    fail(namespace, "retrying", "Interrupted")
    start(namespace, "retrying", 2)
    set_suspended(namespace, "suspended", value=True)
    namespace.wait_for("Suspended", name="suspended")
    wait_until("the pod to end", lambda: names.train_job_name("suspended", 1) not in live_jobs(namespace), 30)


def set_suspended(namespace: JobNamespace, name: str, *, value: bool) -> None:
    patch = json.dumps({"spec": {"suspend": value}})
    namespace.kubectl("patch", "qlorajob", name, "--type=merge", f"--patch={patch}")


def live_jobs(namespace: JobNamespace) -> dict[str, str]:
    """Uid of every Job that is not being deleted, by its name."""
    items = namespace.items("jobs")
    return {
        job["metadata"]["name"]: job["metadata"]["uid"] for job in items if "deletionTimestamp" not in job["metadata"]
    }


def state(namespace: JobNamespace) -> tuple[dict[str, str], dict[str, str]]:
    return {name: namespace.status(name).get("phase", "") for name in PHASES}, live_jobs(namespace)


def check_unnoticed(namespace: JobNamespace, before: tuple[dict[str, str], dict[str, str]]) -> None:
    """Nothing changes for a while."""
    deadline = time.monotonic() + SETTLED
    while time.monotonic() < deadline:
        assert state(namespace) == before
        time.sleep(0.2)


@promise(
    fault="CRD and operator are upgraded and rolled back, not at the same time",
    promise="runs that prepare, train, are retried, suspended and ended do not notice",
    how="the CRDs of three versions, and a status with fields and reasons of the next one",
)
def test_runs_of_five_phases_outlive_crds_of_three_versions(
    operator: Operator, installed: Cluster, job_namespace: JobNamespace
) -> None:
    start_runs(job_namespace)
    before = state(job_namespace)
    assert before[0] == PHASES

    def spec() -> dict[str, Any]:
        return dict(installed.admin.get(f"{job_namespace.path('qlorajobs')}/training")["spec"])

    def restart_and_check() -> None:
        check_unnoticed(job_namespace, before)
        operator.kill()
        operator.start()
        check_unnoticed(job_namespace, before)

    serve(installed, next_crd(), lambda: "gradientNoise" in spec()["training"])
    write_as_next_operator(job_namespace)
    restart_and_check()
    assert job_namespace.status("retrying")["rehearsal"] == {"steps": 2}

    serve(installed, former_crd(), lambda: "init" not in spec()["lora"])
    restart_and_check()
    fail(job_namespace, "retrying", "S3Unavailable", 2)
    start(job_namespace, "retrying", 3)
    reasons = [attempt.get("reason") for attempt in job_namespace.status("retrying")["attempts"]]
    assert reasons[1:] == ["TrainerError", None]
    before = state(job_namespace)

    serve(installed, load_crd(), lambda: "init" in spec()["lora"])
    restart_and_check()

    prepare(job_namespace, "preparing")
    start(job_namespace, "preparing")
    set_suspended(job_namespace, "suspended", value=False)
    start(job_namespace, "suspended", 2)
    for name, attempt in (("preparing", 1), ("training", 1), ("retrying", 3), ("suspended", 2)):
        publish(job_namespace, name, attempt)


def write_as_next_operator(namespace: JobNamespace) -> None:
    """Write what only the operator of the next version knows, as it would have before a rollback."""
    path = f"{namespace.path('qlorajobs')}/retrying"
    attempts = copy.deepcopy(namespace.status("retrying")["attempts"])
    attempts[0] |= {"reason": "SolarFlare", "joules": 7}
    status = {"phase": "Rehearsing", "reason": "RehearsedAtNight", "rehearsal": {"steps": 2}, "attempts": attempts}
    code, answer = namespace.cluster.admin.patch_status(path, status)
    assert code == 200, answer
    namespace.wait_for("Training", name="retrying")
