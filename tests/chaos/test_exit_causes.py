"""Whatever ends a run or keeps it from starting, provoked on a real node: its reason, and what is decided."""

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import pytest
from safetensors.torch import load_file, save

from examples.quickstart.make_model import DEFAULT_MIRROR, make_model
from qlora_api.names import gang_service_name
from tests.chaos.promises import Dose, promise
from tests.cluster.node.network import GATEWAY
from tests.cluster.node.node import NODE
from tests.e2e.installation import Installation, manifest_of, split_reference, wait_for
from tests.e2e.pod_processes import processes_of, send_signal
from tests.gpu_time import check_gpu_time
from tests.hub import FakeHub, Repository

NAMESPACE: Final = "exit-causes"
SMALL_DISK: Final = "small-disk"
"""A namespace whose pods may write 64 MiB."""
COMMIT: Final = "2" * 40
SECONDS: Final = 600
STEPS: Final = 16
ROWS: Final = 64
"""Rows of a pass that 3 GiB do not hold."""
INTERVAL: Final = 2
"""Steps between two checkpoints."""
SHORT: Final[dict[str, dict[str, Any]]] = {
    "dataset": {"maxSamples": 100, "evaluation": {"fraction": 0.1}},
    "training": {"maxSteps": STEPS, "globalBatchSize": 4, "packing": False},
    "evaluation": {"generations": 0},
    "checkpoint": {"steps": INTERVAL},
    "resources": {"cpu": "300m", "memory": "5Gi"},
}
"""A run of about half a minute."""


def run_manifest(name: str, namespace: str = NAMESPACE, **change: Any) -> dict[str, Any]:
    manifest = manifest_of(name, namespace, **SHORT)
    for block, value in change.items():
        both = isinstance(value, dict) and isinstance(manifest["spec"].get(block), dict)
        manifest["spec"][block] = {**manifest["spec"][block], **value} if both else value
    return manifest


@dataclass(frozen=True)
class Run:
    """A QLoRAJob of this file, and what is done to it."""

    installation: Installation
    name: str
    namespace: str = NAMESPACE

    def status(self) -> dict[str, Any]:
        return dict(self.installation.job(self.name, self.namespace)["status"])

    def kubectl(self, *args: str, stdin: str | None = None) -> str:
        return self.installation.cluster.kubectl(f"--namespace={self.namespace}", *args, stdin=stdin)

    def change(self, **spec: Any) -> None:
        self.kubectl("patch", "qlj", self.name, "--type=merge", f"--patch={json.dumps({'spec': spec})}")

    def wait_for_step(self, step: int) -> None:
        wait_for(f"{self.name}: step {step}", lambda: self.step() >= step, SECONDS)

    def step(self) -> int:
        return int(str(self.status().get("step", "0/0")).partition("/")[0])

    def attempt(self) -> int:
        return int(self.status()["attempt"])

    def trains(self, attempt: int) -> bool:
        """Return whether this attempt has reported; earlier reports are those of the previous one."""
        status = self.status()
        *_, last = status.get("attempts") or [{}]
        report = status.get("lastReport", {}).get("updatedAt", "")
        begun = (last.get("number"), status.get("phase")) == (attempt, "Training")
        return begun and "" < last.get("startedAt", "") < report

    def pod(self) -> str:
        selector = f"--selector=batch.kubernetes.io/job-name={self.name}-{self.attempt()}"
        return self.kubectl("get", "pods", selector, "--output=jsonpath={.items[0].metadata.name}")

    def finished(self) -> dict[str, Any]:
        return dict(self.installation.wait_until_finished(self.name, self.namespace, SECONDS)["status"])

    def reasons(self) -> list[str | None]:
        return [attempt.get("reason") for attempt in self.status().get("attempts", ())]

    def check_gpu_time(self) -> None:
        """Compare what the status accounts with the kubelet's times, once nothing is held."""
        wait_for("the end of all pods", lambda: not self.holding(), SECONDS)
        pods = self.installation.children("pods", self.name, self.namespace)
        check_gpu_time(self.status(), pods)

    def holding(self) -> list[dict[str, Any]]:
        return [pod for attempt in self.status()["attempts"] for pod in attempt["usage"]["holding"]]


@dataclass(frozen=True)
class Start:
    """Something that keeps a run from training."""

    reason: str
    said: tuple[str, ...]
    blocks: dict[str, Any] = field(default_factory=dict)
    waits: bool = False
    """Whether it is waited for; else the run has failed."""
    is_slow: bool = False
    """Whether it is left to the full dose."""


NO_S3: Final = "closed-port"
STARTS: Final = {
    "no-such-node": Start(
        "Unschedulable",
        ("didn't match Pod's node affinity/selector",),
        {"resources": {"nodeSelector": {"pool": "none"}}},
        waits=True,
    ),
    "no-s3": Start(
        "S3Unavailable",
        ("spec.output",),
        {"output": {"secretRef": {"name": NO_S3}}},
        waits=True,
    ),
    "no-volume": Start(
        "StartupDeadlineExceeded",
        ("did not start", "spec.deadlines.startup"),
        {"dataset": {"uri": "pvc://broken/rows.jsonl"}, "deadlines": {"startup": "10s"}},
        waits=True,
    ),
    "two-unreachable-pods": Start(
        "CollectiveTimeout",
        ("got no address within",),
        {"resources": {"nodes": 2}, "deadlines": {"startup": "20s"}},
        waits=True,
        is_slow=True,
    ),
    "broken-weights": Start(
        "NonFiniteLoss",
        ("nothing is trained yet", "spec.model.uri"),
        {"model": {"uri": "hf://example/broken"}},
        is_slow=True,
    ),
    "too-short-a-deadline": Start(
        "DeadlineExceeded", ("spec.deadlines.total",), {"deadlines": {"total": "15s"}}, is_slow=True
    ),
    "gpu-that-is-none": Start(
        "Unschedulable",
        ("didn't match Pod's node affinity/selector",),
        {"resources": {"gpusPerNode": 1}},
        waits=True,
        is_slow=True,
    ),
}


NEVER_STARTS: Final = promise(
    fault="a run cannot start, or fails for good",
    promise="its status has the cause as a reason and a message, and it holds no node",
    how="jobs that the node, the object store, the network or the clock cannot satisfy",
)
TOO_SMALL: Final = promise(
    fault="the node's disk or the container's memory is too small",
    promise="the run says so; it is retried with a smaller micro-batch if that helps, a bounded number of times",
    how="limits of ephemeral storage and memory, enforced by the kubelet and the kernel",
)


def in_dose(name: str, *, slow: bool) -> Any:
    """Return a case by its name, for every day or for the full dose."""
    return pytest.param(name, marks=[pytest.mark.full_dose] if slow else [])


@pytest.fixture(scope="module")
def configured(installation: Installation) -> Installation:
    installation.make_namespace(NAMESPACE)
    keys = {**installation.cluster.s3.environment(), "AWS_ENDPOINT_URL": f"http://{GATEWAY}:9"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": NO_S3, "namespace": NAMESPACE}}
    installation.cluster.apply({**secret, "stringData": keys}, *broken_claim())
    return installation


def broken_claim() -> tuple[dict[str, Any], ...]:
    """A claim whose volume is a folder that the node does not have."""
    capacity = {"storage": "1Gi"}
    shared = {"accessModes": ["ReadWriteOnce"], "storageClassName": ""}
    volume = {"capacity": capacity, "hostPath": {"path": "/nowhere/at/all", "type": "Directory"}, **shared}
    claim = {"resources": {"requests": capacity}, "volumeName": "broken", **shared}
    return (
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "broken"}, "spec": volume},
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "broken", "namespace": NAMESPACE},
            "spec": claim,
        },
    )


@pytest.fixture
def gpu_on_paper(configured: Installation) -> Iterator[None]:
    """The node claims a GPU that no container finds."""
    set_gpus(configured, "1")
    yield
    set_gpus(configured, "0")


def set_gpus(installation: Installation, number: str) -> None:
    patch = json.dumps({"status": {part: {"nvidia.com/gpu": number} for part in ("capacity", "allocatable")}})
    installation.cluster.kubectl("patch", "node", NODE, "--subresource=status", "--type=merge", f"--patch={patch}")


def upload_broken_model(installation: Installation) -> None:
    """Put the quickstart's model into the mirror, with a weight that is no number."""
    folder, client = make_model(DEFAULT_MIRROR), installation.cluster.s3.client()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    prefix = "hub/models--example--broken"
    client.put_object(Bucket="models", Key=f"{prefix}/refs/main", Body=COMMIT.encode())
    for name, content in {**files, "model.safetensors": save(weights, {"format": "pt"})}.items():
        client.put_object(Bucket="models", Key=f"{prefix}/snapshots/{COMMIT}/{name}", Body=content)
    client.close()


def delete_run_service(run: Run) -> None:
    """Delete the Service, so that the pods of a run cannot resolve each other."""
    wait_for("its Service", lambda: bool(run.installation.children("service", run.name, run.namespace)), SECONDS)
    run.kubectl("delete", "service", gang_service_name(run.name, 1))


@NEVER_STARTS
@pytest.mark.parametrize("start", [in_dose(name, slow=case.is_slow) for name, case in STARTS.items()])
@pytest.mark.usefixtures("gpu_on_paper")
def test_unstartable_run_fails_with_reason(
    configured: Installation, start: str, outcome: Callable[[str], None]
) -> None:
    case, run = STARTS[start], Run(configured, start)
    if start == "broken-weights":
        upload_broken_model(configured)
    configured.submit(run_manifest(start, **case.blocks))
    if start == "two-unreachable-pods":
        delete_run_service(run)
    if case.waits:
        wait_for(case.reason, lambda: run.status().get("reason") == case.reason, SECONDS)
        status = run.status()
        assert status["phase"] in {"Preparing", "Scheduling"}
    else:
        status = run.finished()
        assert status["phase"] == "Failed"
        wait_for("nothing running", lambda: not running_pods(run), 90)
    reasons = {status["reason"], *(attempt.get("reason") for attempt in status.get("attempts", ()))}
    assert case.reason in reasons, status
    for fragment in case.said:
        assert fragment in status["message"]
    if start == "gpu-that-is-none":
        assert run.reasons() == ["AcceleratorMissing", None]
    run.kubectl("delete", "qlj", start, "--wait=false")
    outcome(f"{case.reason}")


def preparation_failures(run: Run) -> int:
    return int(run.status().get("preparation", {}).get("failures", 0))


def running_pods(run: Run) -> list[str]:
    pods = run.installation.children("pods", run.name, run.namespace)
    return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] in {"Pending", "Running"}]


@NEVER_STARTS
@pytest.mark.full_dose
def test_hub_rate_limited_is_reported_and_tried_again(configured: Installation, outcome: Callable[[str], None]) -> None:
    """429 is retried for hours, whatever spec.deadlines.startup says."""
    with FakeHub({"example/busy": Repository(status=429)}, GATEWAY) as hub:
        configured.configure({"platform.hub.mirror": "", "platform.hub.endpoint": hub.endpoint})
        try:
            run = Run(configured, "busy-hub")
            configured.submit(run_manifest(run.name, model={"uri": "hf://example/busy"}, deadlines={"startup": "10s"}))
            wait_for("a second try", lambda: preparation_failures(run) > 1, SECONDS)
            assert (run.status()["phase"], run.status()["reason"]) == ("Preparing", "HubRateLimited")
            run.kubectl("delete", "qlj", run.name, "--wait=false")
        finally:
            configured.configure({"platform.hub.mirror": "s3://models/hub", "platform.hub.endpoint": ""})
    outcome("HubRateLimited")


@promise(
    fault="the trainer image does not exist",
    promise="the run says ImagePullFailed with the kubelet's message, holds no GPU, and runs once there is the image",
    how="the operator's trainer image has a tag that the node does not have",
)
@pytest.mark.full_dose
def test_image_missing_is_reported_and_waited_for(configured: Installation, outcome: Callable[[str], None]) -> None:
    configured.configure({"trainerImage.tag": "never-built"})
    try:
        run = Run(configured, "no-image")
        configured.submit(run_manifest(run.name, deadlines={"startup": "20s"}))
        wait_for("a failed preparation", lambda: preparation_failures(run) > 0, SECONDS)
        status = run.status()
    finally:
        configured.configure({"trainerImage.tag": split_reference(configured.trainer_image)[1]})
    assert (status["phase"], status["reason"]) == ("Preparing", "ImagePullFailed")
    assert "never-built" in status["message"]
    assert run.finished()["reason"] == "Published"
    outcome(status["message"].partition(": ")[2].partition(":")[0])


@promise(
    fault="a run's result already exists, and it must not overwrite it",
    promise="the run fails with OutputExists before it trains, and the published result is untouched",
    how="the same run with the same name, with spec.output.ifExists Fail",
)
@pytest.mark.full_dose
def test_output_exists_fails_before_training(configured: Installation, outcome: Callable[[str], None]) -> None:
    run = Run(configured, "twice")
    configured.submit(run_manifest(run.name))
    first = run.finished()
    published = objects_below(configured, first["output"]["prefix"])
    run.kubectl("delete", "qlj", run.name, "--wait")
    configured.submit(run_manifest(run.name, output={"ifExists": "Fail"}))
    status = run.finished()
    assert (first["reason"], status["phase"], status["reason"]) == ("Published", "Failed", "OutputExists")
    assert first["output"]["prefix"] in status["message"]
    jobs = {job["metadata"]["name"] for job in run.installation.children("jobs", run.name, run.namespace)}
    assert jobs <= {"twice-prepare"}
    assert published
    assert objects_below(configured, first["output"]["prefix"]) == published
    outcome(f"OutputExists, no training Job, and {len(published)} objects unchanged")


def objects_below(installation: Installation, uri: str) -> dict[str, tuple[Any, Any]]:
    """Digest and time of every object below a URI."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = installation.cluster.s3.client()
    listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]
    client.close()
    return {entry["Key"]: (entry["ETag"], entry["LastModified"]) for entry in listed}


def evict(run: Run) -> None:
    """As `kubectl drain` does."""
    pod = run.pod()
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": run.namespace}}
    path = f"/api/v1/namespaces/{run.namespace}/pods/{pod}/eviction"
    run.installation.cluster.kubectl("create", f"--raw={path}", "--filename=-", stdin=json.dumps(eviction))


def preempt(run: Run) -> None:
    """A more important pod takes the node's CPU."""
    important = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "important"}}
    cpu = free_millicores(run.installation) + 50
    container: dict[str, Any] = {"name": "sleep", "image": run.installation.operator_image, "imagePullPolicy": "Never"}
    rights = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    work = {"command": ["sleep", "20"], "resources": {"requests": {"cpu": f"{cpu}m"}}, "securityContext": rights}
    context = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    spec: dict[str, Any] = {"priorityClassName": "important", "restartPolicy": "Never", "securityContext": context}
    spec["containers"] = [container | work]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "important", "namespace": run.namespace}}
    run.installation.cluster.apply({**important, "value": 1000}, {**pod, "spec": spec})


def free_millicores(installation: Installation) -> int:
    """What no pod of the node has asked for."""
    [node] = installation.cluster.get("nodes")["items"]
    pods = installation.cluster.get("pods", "--all-namespaces")["items"]
    running = [pod for pod in pods if pod["status"]["phase"] in {"Pending", "Running"}]
    asked = [pod["spec"]["containers"][0]["resources"].get("requests", {}).get("cpu", "0m") for pod in running]
    return millicores(node["status"]["allocatable"]["cpu"]) - sum(map(millicores, asked))


def millicores(quantity: str) -> int:
    return int(quantity[:-1]) if quantity.endswith("m") else int(quantity) * 1000


def kill(run: Run) -> None:
    """End the process, and not the pod."""
    strike(run, signal.SIGKILL)


def freeze(run: Run) -> None:
    """Stop every thread, so that not even the trainer's watchdog notices."""
    strike(run, signal.SIGSTOP)


def strike(run: Run, signal_: signal.Signals) -> None:
    processes = processes_of(f"{run.name}-{run.attempt()}-0")
    assert processes
    send_signal(processes, signal_)


def pause(run: Run) -> None:
    """Suspend the run, check that nothing runs, and resume it."""
    run.change(suspend=True)
    wait_for("suspension", lambda: run.status()["phase"] == "Suspended" and not running_pods(run), 90)
    assert run.status()["checkpoint"]["step"] >= run.step() - 1
    run.change(suspend=False)


INTERRUPTIONS: Final[tuple[tuple[str, Callable[[Run], None]], ...]] = (
    ("SuspendedByUser", pause),
    ("Interrupted", evict),
    ("Preempted", preempt),
    ("Interrupted", kill),
    ("HeartbeatLost", freeze),
)
"""What happens to one run, one after the other, and what it is called."""


@promise(
    fault="a training pod is suspended, drained, preempted, killed and frozen",
    promise="each cause is recorded, and each time exactly one new attempt resumes from the last checkpoint, until "
    "the run is done",
    how="spec.suspend, eviction API, a pod of higher priority, SIGKILL, SIGSTOP, on a real node, to one run "
    "(only the first in `make test`)",
)
def test_interrupted_training_resumes_from_checkpoint(
    configured: Installation, dose: Dose, outcome: Callable[[str], None]
) -> None:
    interruptions = INTERRUPTIONS[: dose(short=1, full=len(INTERRUPTIONS))]
    reasons = [reason for reason, _ in interruptions]
    run = Run(configured, "beset")
    # Enough steps that each attempt is seen to train; it repeats few of them.
    steps = dose(short=STEPS, full=4 * STEPS)
    # Short for the last one only: on a busy machine a step may take as long.
    deadlines = {"heartbeat": f"{dose(short=300, full=10)}s"}
    dataset, training = {"maxSamples": 5 * steps}, {"maxSteps": steps}
    configured.submit(run_manifest(run.name, deadlines=deadlines, dataset=dataset, training=training))
    reached: list[int] = []
    resumed: list[int] = []
    for number, (_, provoke) in enumerate(interruptions, start=1):
        wait_for(f"a report of attempt {number}", partial(run.trains, number), SECONDS)
        run.wait_for_step(reached[-1] + 1 if reached else 2 * INTERVAL)
        resumed += [resumed_after(run, number)] if reached else []
        reached.append(run.step())
        provoke(run)
    status = run.finished()
    resumed.append(resumed_after(run, len(reasons) + 1))
    assert (status["phase"], status["step"]) == ("Succeeded", f"{steps}/{steps}"), status["message"]
    assert run.reasons() == [*reasons, "Published"]
    seen = list(zip(reasons, reached, resumed, strict=True))
    assert all(after >= before - INTERVAL for _, before, after in seen)
    outcome(
        "; ".join(f"{reason} after step {before} or later, resumed after {after}" for reason, before, after in seen)
    )


def resumed_after(run: Run, attempt: int) -> int:
    """Return the step of the checkpoint that an attempt resumed from, according to its log."""
    log = run.kubectl("logs", f"job/{run.name}-{attempt}", "--container=trainer")
    assert "resumed from step" in log
    return int(log.split("resumed from step ")[1].split(",")[0])


@TOO_SMALL
@pytest.mark.full_dose
def test_disk_limit_exceeded_ends_as_evicted(configured: Installation, outcome: Callable[[str], None]) -> None:
    configured.make_namespace(SMALL_DISK)
    limit = {"type": "Container", "default": {"ephemeral-storage": "64Mi"}}
    metadata = {"name": "disk", "namespace": SMALL_DISK}
    limits = {"apiVersion": "v1", "kind": "LimitRange", "metadata": metadata, "spec": {"limits": [limit]}}
    configured.cluster.apply(limits)
    run = Run(configured, "small-disk", SMALL_DISK)
    configured.submit(run_manifest(run.name, SMALL_DISK))
    wait_for("an eviction", lambda: run.status().get("reason") == "Evicted", SECONDS)
    status = run.status()
    run.change(suspend=True)
    assert (status["phase"], [attempt["domain"] for attempt in status["attempts"]]) == ("Scheduling", ["run"])
    assert "raise the limit of ephemeral-storage in the namespace's LimitRange" in status["message"]
    outcome("Evicted, then another attempt")


@pytest.mark.full_dose
@TOO_SMALL
def test_host_oom_retries_with_smaller_micro_batch(configured: Installation, outcome: Callable[[str], None]) -> None:
    run = Run(configured, "small-memory")
    # One step has the memory of all.
    training = {"maxSteps": 1, "globalBatchSize": ROWS, "microBatchSize": ROWS, "packing": True}
    data = {"maxSamples": 400, "evaluation": {"fraction": 0.05}}
    configured.submit(run_manifest(run.name, dataset=data, training=training, resources={"memory": "3Gi"}))
    status = run.finished()
    assert status["phase"] == "Succeeded", status["message"]
    *killed, last = status["attempts"]
    assert {attempt["reason"] for attempt in killed} == {"HostOutOfMemory"}
    rows = [attempt["microBatchSize"] for attempt in status["attempts"]]
    assert rows == [ROWS >> power for power in range(len(rows))]
    assert len(rows) > 1
    assert last["reason"] == "Published"
    run.check_gpu_time()
    assert status["plan"]["microBatchSize"] * status["plan"]["gradientAccumulation"] == ROWS
    outcome(f"HostOutOfMemory, then published with micro-batches of {' > '.join(map(str, rows))} rows")


@pytest.mark.full_dose
@promise(
    fault="the operator is upgraded while a run trains",
    promise="the run is not affected",
    how="`helm upgrade` with other values, which replaces both replicas",
)
def test_operator_upgrade_leaves_training_running(configured: Installation, outcome: Callable[[str], None]) -> None:
    run = Run(configured, "upgraded")
    configured.submit(run_manifest(run.name))
    run.wait_for_step(2)
    configured.configure({"logLevel": "debug"})
    status = run.finished()
    configured.configure({"logLevel": "info"})
    assert (status["phase"], run.reasons()) == ("Succeeded", ["Published"])
    run.check_gpu_time()
    outcome("one attempt, Published")
