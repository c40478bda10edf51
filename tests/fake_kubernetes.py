"""Job controller, scheduler, kubelet and queue over the cluster in memory, as slow and unkind as real ones may be.

As kube-controller-manager 1.31 to 1.36 does it: startTime is that of the last resumption, activeDeadlineSeconds counts
from it, no pod is created while another of the Job terminates (podReplacementPolicy: Failed), a pod of a suspended Job
counts as no failure, and a pod whose trainer has ended runs on while a sidecar does.
"""

from datetime import datetime, timedelta
from typing import Any, Final

from qlora_api import names
from qlora_api.reasons import Reason
from qlora_operator.cluster.parse_time import parse_time
from qlora_operator.models import Manifest
from tests.fakes import FakeCluster, wire_time
from tests.make import make_termination_message

GRACE: Final = timedelta(seconds=names.GRACE_SECONDS)
EVENT_PAUSE: Final = timedelta(minutes=1)
"""Between two Events of a Job whose pod is refused."""
_INDEX: Final = "batch.kubernetes.io/job-completion-index"
_TERMINAL: Final = {"Succeeded", "Failed"}


class FakeKubernetes:
    """Acts on the Jobs of one QLoRAJob, at each step as far as time has come."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.nodes = 100
        """Pods that have room at once; one whose sidecar runs on keeps its node."""
        self.refusal = ""
        """Why the API server refuses pods, if it does."""
        self.pods_per_step = 100
        self.pull_time = timedelta(0)
        """From a node to a running container."""
        self.stop_time = timedelta(seconds=5)
        """From SIGTERM to the end."""
        self.sidecar = False
        self.immortal = False
        """Whether no running pod ends when it is deleted: state D, or a dead kubelet."""
        self.ran = timedelta(0)
        """How long a training container ran that was not yet asked to stop."""
        self.ran_while_stopping = timedelta(0)
        self.held = timedelta(0)
        """How long training pods held their nodes, summed over pods."""
        self._released: set[str] = set()

    # What a test or a queue does

    def admit(self, job: str) -> None:
        """Let a queue start a Job; the Job controller notices at the next step."""
        self._job(job)["spec"]["suspend"] = False

    def preempt(self, job: str, message: str) -> None:
        """Let a queue suspend a Job; the Job controller notices at the next step."""
        self._job(job)["spec"]["suspend"] = True
        self.cluster.record_job_event(job, "Stopped", message)

    def end_trainer(self, job: str, code: int, message: str, index: int = 0) -> None:
        """End the trainer in a pod."""
        [pod] = [pod for pod in self.cluster.pods_of(job) if _index(pod) == index and is_running(pod)]
        self._end(pod, code, message)

    def runs(self, job: str) -> bool:
        """Return whether the first pod of a Job runs, and nobody has asked it to stop."""
        pods = self.cluster.pods_of(job) if ("Job", job) in self.cluster.children else []
        return any(_index(pod) == 0 and is_running(pod) and not is_deleting(pod) for pod in pods)

    def step(self, duration: timedelta) -> None:
        """Let time pass, then let each controller act once."""
        running = [pod for pod in self.cluster.pods.values() if is_running(pod) and "-prepare-" not in name_of(pod)]
        if any(not is_deleting(pod) for pod in running):
            self.ran += duration
        elif running:
            self.ran_while_stopping += duration
        training = [pod for pod in self.cluster.pods.values() if "-prepare-" not in name_of(pod)]
        self.held += duration * sum("nodeName" in pod["spec"] and not has_ended(pod) for pod in training)
        self.cluster.pass_time(duration)
        for name in [name for kind, name in self.cluster.children if kind == "Job"]:
            self._control(name)
        for pod in list(self.cluster.pods.values()):
            self._schedule(pod)
            self._run(pod)

    # The Job controller

    def _job(self, name: str) -> Manifest:
        return self.cluster.children["Job", name]

    def _control(self, name: str) -> None:
        job, pods = self._job(name), self.cluster.pods_of(name)
        for pod in pods:
            if is_deleting(pod) and (has_ended(pod) or "nodeName" not in pod["spec"]):
                del self.cluster.pods[name_of(pod)]
        pods = self.cluster.pods_of(name)
        if "deletionTimestamp" in job["metadata"]:
            self._delete(pods)
            if not pods:
                del self.cluster.children["Job", name]
        elif not _condition(job, "Complete") and not _condition(job, "Failed"):
            self._sync(name, job, pods)

    def _sync(self, name: str, job: Manifest, pods: list[Manifest]) -> None:
        if job["spec"].get("suspend"):
            if not _condition(job, "Suspended"):
                job["status"] = {}
                self._set_condition(job, "Suspended")
            self._released |= {pod["metadata"]["uid"] for pod in pods}
            self._delete(pods)
            return
        if "startTime" not in job["status"]:
            job["status"] = {"startTime": wire_time(self.cluster.now)}
        failed = [pod for pod in pods if _phase(pod) == "Failed" and pod["metadata"]["uid"] not in self._released]
        if not _condition(job, "FailureTarget"):
            self._check_failure(job, failed)
        if target := _condition(job, "FailureTarget"):
            self._delete([pod for pod in pods if not has_ended(pod)])
            if all(has_ended(pod) for pod in pods):
                self._set_condition(job, "Failed", target["reason"])
            return
        if sum(_phase(pod) == "Succeeded" for pod in pods) == job["spec"]["completions"]:
            self._set_condition(job, "Complete")
            return
        if not any(is_deleting(pod) and not has_ended(pod) for pod in pods):
            self._create_pods(name, job, {_index(pod) for pod in pods if not is_deleting(pod)})

    def _check_failure(self, job: Manifest, failed: list[Manifest]) -> None:
        deadline, started = job["spec"].get("activeDeadlineSeconds"), parse_time(job["status"]["startTime"])
        assert started
        if failed:
            self._set_condition(job, "FailureTarget", "BackoffLimitExceeded")
        elif deadline is not None and self.cluster.now - started >= timedelta(seconds=deadline):
            self._set_condition(job, "FailureTarget", "DeadlineExceeded")

    def _create_pods(self, name: str, job: Manifest, known: set[int]) -> None:
        missing = sorted(set(range(job["spec"]["completions"])) - known)
        if missing and self.refusal:
            events = self.cluster.job_events.get(job["metadata"]["uid"], [])
            last = parse_time(events[-1]["lastTimestamp"]) if events else None
            if last is None or self.cluster.now - last >= EVENT_PAUSE:
                self.cluster.record_job_event(name, "FailedCreate", f"Error creating: {self.refusal}")
            return
        for index in missing[: self.pods_per_step]:
            pod = self.cluster.make_pod(job, index)
            self.cluster.pods[name_of(pod)] = pod

    def _set_condition(self, job: Manifest, kind: str, reason: str = "") -> None:
        entry = {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": wire_time(self.cluster.now)}
        job["status"].setdefault("conditions", []).append(entry)

    def _delete(self, pods: list[Manifest]) -> None:
        for pod in pods:
            if not is_deleting(pod):
                pod["metadata"] |= {
                    "deletionTimestamp": wire_time(self.cluster.now + GRACE),
                    "deletionGracePeriodSeconds": names.GRACE_SECONDS,
                }

    # The scheduler and the kubelets

    def _schedule(self, pod: Manifest) -> None:
        taken = [other for other in self.cluster.pods.values() if "nodeName" in other["spec"] and not has_ended(other)]
        if "nodeName" in pod["spec"] or is_deleting(pod):
            return
        if len(taken) < self.nodes:
            pod["spec"]["nodeName"] = f"node-{len(taken)}"
            bound = {"type": "PodScheduled", "status": "True", "lastTransitionTime": wire_time(self.cluster.now)}
            pod["status"] = {"phase": "Pending", "conditions": [bound]}
        else:
            why = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available: 1 Insufficient gpu."}
            pod["status"] = {"phase": "Pending", "conditions": [why]}

    def _run(self, pod: Manifest) -> None:
        if "nodeName" not in pod["spec"] or has_ended(pod):
            return
        now = self.cluster.now
        if is_deleting(pod):
            asked = _deletion_end(pod) - GRACE
            if not self.immortal and now - asked >= self.stop_time:
                self._stop(pod)
        elif not _state(pod) and now - _bound_at(pod) >= self.pull_time and self._can_mount(pod):
            self._set_state(pod, "Running", {"running": {"startedAt": wire_time(now)}})

    def _can_mount(self, pod: Manifest) -> bool:
        """Return whether the ConfigMaps of a pod exist; without one its containers are not created."""
        jobs = [job for (kind, _), job in self.cluster.children.items() if kind == "Job"]
        owners = [job for job in jobs if job["metadata"]["uid"] == pod["metadata"]["ownerReferences"][0]["uid"]]
        volumes = owners[0]["spec"]["template"]["spec"]["volumes"] if owners else []
        maps = [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]
        return all(("ConfigMap", name) in self.cluster.children for name in maps)

    def _stop(self, pod: Manifest) -> None:
        if is_running(pod):
            self._end(pod, 143, make_termination_message(Reason.INTERRUPTED, "asked to stop"))
        if self.sidecar and _state(pod):
            sidecar = {"terminated": {"exitCode": 143, "finishedAt": wire_time(self.cluster.now)}}
            pod["status"]["containerStatuses"].append({"name": "sidecar", "state": sidecar})
        pod["status"]["phase"] = "Failed"

    def _end(self, pod: Manifest, code: int, message: str) -> None:
        started = _state(pod)["running"]["startedAt"]
        ended = {"exitCode": code, "message": message, "startedAt": started, "finishedAt": wire_time(self.cluster.now)}
        phase = "Running" if self.sidecar else "Failed" if code else "Succeeded"
        self._set_state(pod, phase, {"terminated": ended})

    @staticmethod
    def _set_state(pod: Manifest, phase: str, state: Manifest) -> None:
        pod["status"] |= {"phase": phase, "containerStatuses": [{"name": names.CONTAINER, "state": state}]}


def name_of(pod: Manifest) -> str:
    return str(pod["metadata"]["name"])


def _index(pod: Manifest) -> int:
    return int(pod["metadata"]["annotations"][_INDEX])


def _phase(pod: Manifest) -> str:
    return str(pod["status"]["phase"])


def has_ended(pod: Manifest) -> bool:
    return _phase(pod) in _TERMINAL


def _state(pod: Manifest) -> dict[str, Any]:
    statuses = pod["status"].get("containerStatuses", ())
    return dict(statuses[0]["state"]) if statuses else {}


def is_running(pod: Manifest) -> bool:
    return "running" in _state(pod)


def is_deleting(pod: Manifest) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def _deletion_end(pod: Manifest) -> datetime:
    return datetime.fromisoformat(pod["metadata"]["deletionTimestamp"])


def _bound_at(pod: Manifest) -> datetime:
    return datetime.fromisoformat(pod["status"]["conditions"][0]["lastTransitionTime"])


def _condition(job: Manifest, kind: str) -> Manifest | None:
    return next((entry for entry in job["status"].get("conditions", ()) if entry["type"] == kind), None)
