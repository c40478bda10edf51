"""An in-memory cluster that behaves like an API server towards the operator; tests play the kubelet."""

import asyncio
import copy
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from functools import partial
from itertools import count
from typing import Any

from qlora_api import names
from qlora_api.accelerators import Accelerator
from qlora_api.job_ref import JobRef
from qlora_api.v1alpha1 import Toleration
from qlora_operator.cluster.interface import (
    AdmissionDeniedError,
    ClusterBusyError,
    InvalidStatusError,
    NameConflictError,
    PodIdentity,
    PodOwner,
)
from qlora_operator.cluster.parse import controller_uid, parse_event_message, parse_job, parse_observation
from qlora_operator.cluster.stripped import build_restoration
from qlora_operator.cluster.tolerant import parse_or_skip
from qlora_operator.models import ChildJob, Classes, Manifest, Observation, RawJob, Workload
from tests.make import NOW, UID

Write = tuple[str, str]
"""Verb and name of a write."""


class CrashError(Exception):
    """The operator dies here."""


class FakeCluster:
    """One QLoRAJob, its children, its Events."""

    def __init__(self) -> None:
        self.now: datetime = NOW
        self.reports_since: datetime = NOW
        self.quarantined_nodes: dict[str, datetime] = {}
        self.others_reported_at: tuple[datetime, ...] | None = None
        """When other running QLoRAJobs last reported; None: one does all the time."""
        self.refused_at: datetime | None = None
        """When the progress endpoint last refused a token that names the pod."""
        self.clock_skew = timedelta(0)
        """How far the operator's clock is ahead of the API server's."""
        self.node_clock_skew = timedelta(0)
        """How far the nodes' clocks are ahead of it."""
        self.job: Manifest | None = None
        self.children: dict[tuple[str, str], Manifest] = {}
        self.pods: dict[str, Manifest] = {}
        self.events: dict[str, Manifest] = {}
        self.writes: list[Write] = []
        self.created: list[str] = []
        self.nodes: list[Manifest] = []
        self.classes = Classes()
        self.namespace: dict[str, str] | None = {}
        """Labels of the namespace; None: the operator may not read it."""
        self.may_list_nodes = True
        self.node_lists = 0
        self.child_lists = 0
        self.event_lists = 0
        self.job_reads = 0
        self.workload_lists = 0
        self.config_reads = 0
        self.workloads: dict[str, Workload] = {}
        """What a queue says of a Job, by its name; the operator may not read what is not here."""
        self.job_events: dict[str, list[Manifest]] = {}
        """Events of Kubernetes and of the queue, by the uid of the Job."""
        self._cached: tuple[list[Manifest], list[Manifest]] | None = None
        self.foreground_deletion = False
        """Whether a Job that is deleted stays while its pod ends."""
        self.admission_error: AdmissionDeniedError | None = None
        self.patch_error: AdmissionDeniedError | None = None
        """Why a change of labels is refused, if it is."""
        self.placement: tuple[Mapping[str, str], tuple[Toleration, ...]] = ({}, ())
        """Node labels and tolerations that the installation gives to training pods."""
        self.update_error: AdmissionDeniedError | None = None
        """Why every change of a child is refused, if it is: a policy, or a webhook that does not answer."""
        self.deletion_error: AdmissionDeniedError | None = None
        """Why the deletion of a Job is refused, if it is."""
        self.invalid_status: Callable[[Manifest], str | None] = lambda _: None
        """Why a status is refused, if it is."""
        self.crash_after: Callable[[int], bool] = lambda _: False
        self._versions = count(1)
        self._uids = count(1)

    # What a user does

    def submit(self, manifest: Manifest) -> None:
        """Create the QLoRAJob."""
        self.job = {**copy.deepcopy(manifest), "status": {"observedGeneration": -1}}
        self.job["metadata"] |= self._new_metadata() | {"generation": 1, "resourceVersion": self._version()}

    def change(self, **spec: Any) -> None:
        """Edit the spec."""
        assert self.job
        self.job["spec"] |= spec
        self.job["metadata"]["generation"] += 1
        self.job["metadata"]["resourceVersion"] = self._version()

    def annotate(self, key: str, value: str) -> None:
        """Set an annotation, which is no new generation."""
        assert self.job
        self.job["metadata"].setdefault("annotations", {})[key] = value
        self.job["metadata"]["resourceVersion"] = self._version()

    def remove(self, name: str) -> None:
        """Delete a Job and its pods."""
        job = self.children.pop(("Job", name), None)
        for key in [key for key, pod in self.pods.items() if job and controller_uid(pod) == job["metadata"]["uid"]]:
            del self.pods[key]

    @property
    def status(self) -> dict[str, Any]:
        """The status."""
        assert self.job
        return dict(self.job["status"])

    def condition(self, kind: str) -> str:
        """The status of a condition."""
        return next(str(entry["status"]) for entry in self.status["conditions"] if entry["type"] == kind)

    # What a kubelet does

    def set_pod(self, job: str, phase: str, state: Manifest, **status: Any) -> None:
        """Set the state of a Job's pod, making it if needed."""
        owner = self.children["Job", job]
        pod = self.pods.setdefault(job, self.make_pod(owner))
        container = {"name": names.CONTAINER, "state": state}
        conditions = pod.get("status", {}).get("conditions", ())
        known = [entry for entry in conditions if (entry["type"], entry["status"]) == ("PodScheduled", "True")]
        [scheduled] = known or [{"type": "PodScheduled", "status": "True", "lastTransitionTime": wire_time(self.now)}]
        pod["spec"]["nodeName"] = "node-1"
        pod["status"] = {"phase": phase, "containerStatuses": [container], "conditions": [scheduled], **status}

    def start_pod(self, job: str) -> None:
        """Start the container."""
        self.set_pod(job, "Running", {"running": {"startedAt": self._node_time()}})

    def delete_pod(self, job: str, grace: timedelta, disruption_reason: str) -> None:
        """Delete a pod without its kubelet's reaction."""
        pod = self.pods[job]
        pod["metadata"] |= {
            "deletionTimestamp": wire_time(self.now + grace), "deletionGracePeriodSeconds": int(grace.total_seconds()),
        }  # fmt: skip
        pod["status"]["conditions"].append({"type": "DisruptionTarget", "status": "True", "reason": disruption_reason})

    def end_pod(self, job: str, code: int, message: str, *, keep_start: bool = False) -> None:
        """End the container and its Job; keep_start keeps the start time of the container."""
        started = self._started(job) if keep_start else self._node_time()
        ended = {"exitCode": code, "message": message, "startedAt": started, "finishedAt": self._node_time()}
        self.set_pod(job, "Failed" if code else "Succeeded", {"terminated": ended})
        self.finish_job(job, "Failed" if code else "Complete")

    def _node_time(self) -> str:
        return wire_time(self.now + self.node_clock_skew)

    def _started(self, job: str) -> str:
        return str(self.pods[job]["status"]["containerStatuses"][0]["state"]["running"]["startedAt"])

    def finish_job(self, job: str, kind: str, reason: str = "BackoffLimitExceeded") -> None:
        """Set the final condition of a Job, as its controller does."""
        condition = {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": wire_time(self.now)}
        self.children["Job", job]["status"] = self.children["Job", job].get("status", {}) | {"conditions": [condition]}

    # What the Job controller and a queue do

    def _start_job(self, job: Manifest) -> None:
        """Write the time from which Kubernetes counts activeDeadlineSeconds, unless the Job is suspended."""
        job["status"] = {} if job["spec"].get("suspend") else {"startTime": wire_time(self.now)}

    def suspend_job(self, name: str, message: str, grace: timedelta = timedelta(seconds=60)) -> None:
        """Suspend a Job as Kueue does when it preempts one; its pods get their grace period."""
        job = self.children["Job", name]
        job["spec"]["suspend"] = True
        suspended = {"type": "Suspended", "status": "True", "lastTransitionTime": wire_time(self.now)}
        job["status"] = {"conditions": [suspended]}
        for pod in self.pods_of(name):
            pod["metadata"].setdefault("deletionTimestamp", wire_time(self.now + grace))
            pod["metadata"].setdefault("deletionGracePeriodSeconds", int(grace.total_seconds()))
        self.record_job_event(name, "Stopped", message)

    def resume_job(self, name: str) -> None:
        """Admit a Job; Kubernetes counts its deadline anew."""
        job = self.children["Job", name]
        job["spec"]["suspend"] = False
        self._start_job(job)

    def record_job_event(self, name: str, reason: str, message: str) -> None:
        """Record an Event on a Job."""
        event = {"reason": reason, "message": message, "lastTimestamp": wire_time(self.now), "metadata": {}}
        self.job_events.setdefault(self.children["Job", name]["metadata"]["uid"], []).append(event)

    def pods_of(self, name: str) -> list[Manifest]:
        """Return the pods of a Job."""
        uid = self.children["Job", name]["metadata"]["uid"]
        return [pod for pod in self.pods.values() if controller_uid(pod) == uid]

    # What the watches do

    def pause_watches(self, *, lose_all: bool = False) -> None:
        """Freeze the cached children; lose_all empties the cache."""
        self._cached = ([], []) if lose_all else copy.deepcopy(self._live_children())

    def resume_watches(self) -> None:
        """Let the cached children follow the live ones again."""
        self._cached = None

    # The Cluster interface

    async def read_job(self, ref: JobRef) -> RawJob | None:
        self.job_reads += 1
        if self.job is None or self.job["metadata"]["name"] != ref.name:
            return None
        return parse_job(copy.deepcopy(self.job))

    def children_from_cache(self, job: RawJob) -> Observation:
        jobs, pods = self._cached or self._live_children()
        watched = [item for item in jobs if names.MANAGED_BY_LABEL in item["metadata"]["labels"]]
        return parse_observation(job, watched, pods)

    async def list_children(self, job: RawJob) -> Observation:
        self.child_lists += 1
        return parse_observation(job, *self._live_children())

    def _live_children(self) -> tuple[list[Manifest], list[Manifest]]:
        """Return what a label selector finds; pods of tests have no labels."""
        name = self.job["metadata"]["name"] if self.job else ""
        jobs = [child for (kind, _), child in self.children.items() if kind == "Job"]
        labelled = [job for job in jobs if job["metadata"].get("labels", {}).get(names.JOB_LABEL) == name]
        return labelled, list(self.pods.values())

    async def find_event(self, ref: JobRef, uid: str, reasons: Collection[str], since: datetime) -> str:  # noqa: ARG002
        self.event_lists += 1
        return parse_event_message(self.job_events.get(uid, ()), reasons, since)

    async def find_workload(self, ref: JobRef, uid: str) -> Workload | None:  # noqa: ARG002
        self.workload_lists += 1
        names_by_uid = {child["metadata"]["uid"]: name for (_, name), child in self.children.items()}
        return self.workloads.get(names_by_uid.get(uid, ""))

    async def find_gpu_nodes(self, accelerator: Accelerator) -> tuple[Manifest, ...] | None:
        self.node_lists += 1
        if not self.may_list_nodes:
            return None
        labelled = (node for node in self.nodes if accelerator.memory_label in node["metadata"].get("labels", {}))
        return tuple(copy.deepcopy(node) for node in labelled)

    async def list_classes(self, age: timedelta) -> Classes:  # noqa: ARG002
        return self.classes

    async def namespace_labels(self, namespace: str, age: timedelta) -> Mapping[str, str] | None:  # noqa: ARG002
        return self.namespace

    async def ensure(self, child: Manifest) -> bool:
        key = (child["kind"], child["metadata"]["name"])
        if self.admission_error is not None:
            raise self.admission_error
        existing = self.children.get(key)
        if existing is not None and controller_uid(existing) != controller_uid(child):
            former = any(owner["kind"] == names.KIND for owner in existing["metadata"].get("ownerReferences", ()))
            raise NameConflictError(f"{key[1]} is taken", being_deleted=former)
        if existing is None:
            self.created.append(key[1])
            self.children[key] = copy.deepcopy(child)
            self.children[key]["metadata"] |= self._new_metadata()
            if key[0] == "Job":
                self._start_job(self.children[key])
        elif key[0] == "ConfigMap":
            existing["data"] = copy.deepcopy(child["data"])
        self._wrote("ensure", f"{key[0]}/{key[1]}")
        return existing is None

    async def read_config_map(self, ref: JobRef, name: str) -> Manifest | None:  # noqa: ARG002 (as in the interface)
        self.config_reads += 1
        return copy.deepcopy(self.children.get(("ConfigMap", name)))

    async def restore_job(self, job: Manifest, run_created_at: datetime) -> bool:
        existing = self.children.get(("Job", job["metadata"]["name"]))
        restore = partial(build_restoration, job=job, run_created_at=run_created_at)
        restoration = parse_or_skip("Job", restore, existing) if existing else None
        if restoration is not None:
            await self.patch(restoration)
        return restoration is not None

    async def patch(self, child: Manifest) -> None:
        existing = self.children[child["kind"], child["metadata"]["name"]]
        if self.update_error is not None:
            raise self.update_error
        if self.patch_error is not None and child["metadata"].get("labels"):
            raise self.patch_error
        if "spec" in existing:
            existing["spec"] = merge(existing["spec"], child.get("spec", {}))
        if "data" in existing:
            existing["data"] |= child.get("data", {})
        metadata = child["metadata"]
        existing["metadata"]["labels"] = existing["metadata"].get("labels", {}) | metadata.get("labels", {})
        existing["metadata"] |= {name: metadata[name] for name in ("ownerReferences",) if name in metadata}
        self._wrote("patch", child["metadata"]["name"])

    async def delete_job(self, ref: JobRef, child: ChildJob) -> None:  # noqa: ARG002 (the interface's signature)
        name = child.name
        if self.children.get(("Job", name), {}).get("metadata", {}).get("uid") != child.uid:
            return
        if self.deletion_error is not None:
            raise self.deletion_error
        if self.foreground_deletion:
            self.children["Job", name]["metadata"]["deletionTimestamp"] = wire_time(self.now)
        else:
            self.remove(name)
        self._wrote("delete", name)

    async def delete_configuration(self, job: RawJob) -> None:
        for kind, name in list(self.children):
            if kind in {"ConfigMap", "Service"} and controller_uid(self.children[kind, name]) == job.uid:
                del self.children[kind, name]
                self._wrote("delete", f"{kind}/{name}")

    async def delete_qlorajob(self, job: RawJob) -> None:
        assert self.job
        if self.job["metadata"]["resourceVersion"] != job.resource_version:
            raise ClusterBusyError("conflict")
        self.job = None
        self._wrote("delete", f"QLoRAJob/{job.ref.name}")

    async def write_status(self, job: RawJob, status: Manifest) -> str:
        assert self.job
        if self.job["metadata"]["resourceVersion"] != job.resource_version:
            raise ClusterBusyError("conflict")
        if (why := self.invalid_status(status)) is not None:
            raise InvalidStatusError(why)
        self.job["status"] = copy.deepcopy(status)
        self.job["metadata"]["resourceVersion"] = self._version()
        self._wrote("status", status["phase"])
        return str(self.job["metadata"]["resourceVersion"])

    async def record_event(self, event: Manifest) -> None:
        self.events.setdefault(event["metadata"]["name"], event)
        self._wrote("event", event["reason"])

    def _wrote(self, verb: str, name: str) -> None:
        self.writes.append((verb, name))
        if self.crash_after(len(self.writes)):
            raise CrashError(f"after write {len(self.writes)}: {verb} {name}")

    def _version(self) -> str:
        return str(next(self._versions))

    def _new_metadata(self) -> Manifest:
        metadata = {"uid": f"uid-{next(self._uids)}", "creationTimestamp": wire_time(self.now)}
        return metadata | {"resourceVersion": self._version()}

    def make_pod(self, job: Manifest, index: int = 0) -> Manifest:
        """Return a new pod of a Job."""
        name = job["metadata"]["name"]
        owner = {"kind": "Job", "name": name, "uid": job["metadata"]["uid"], "controller": True}
        new = self._new_metadata()
        metadata = {
            "name": f"{name}-{index}-{new['uid']}",
            "ownerReferences": [owner],
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            **new,
        }
        return {"metadata": metadata, "spec": {}, "status": {"phase": "Pending"}}

    def pass_time(self, duration: timedelta) -> None:
        """Move the clock."""
        self.now += duration


class FakeTokenReviewer:
    """Tokens and the pods that they are bound to; counts the reviews, and those in flight at once."""

    def __init__(self, tokens: dict[str, PodIdentity], owners: dict[PodIdentity, PodOwner]) -> None:
        self.tokens = tokens
        self.owners = owners
        self.job_uids = {JobRef("ml", "support-bot"): UID}
        """The QLoRAJobs that exist."""
        self.cached_pods: set[str] = set()
        self.reviews = 0
        self.max_in_flight = 0
        self.asked = asyncio.Event()
        self.answering = asyncio.Event()
        """Cleared while the API server does not answer."""
        self.answering.set()
        self._in_flight = 0

    async def review_token(self, token: str) -> PodIdentity | None:
        self.reviews += 1
        self.asked.set()
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            await self.answering.wait()
        finally:
            self._in_flight -= 1
        return self.tokens.get(token)

    def caches_pod(self, ref: JobRef, uid: str) -> bool:  # noqa: ARG002 (the interface's signature)
        return uid in self.cached_pods

    async def owner_of_pod(self, pod: PodIdentity) -> PodOwner | None:
        return self.owners.get(pod)

    async def read_job(self, ref: JobRef) -> RawJob | None:
        if ref not in self.job_uids:
            return None
        return RawJob(ref, self.job_uids[ref], 1, "1", NOW, deleting=False, spec={}, status={})


def merge(target: Manifest, patch: Manifest) -> Manifest:
    """Apply a merge patch (RFC 7386): null removes a field."""
    merged = {
        name: merge(target.get(name) or {}, value) if isinstance(value, dict) else value
        for name, value in patch.items()
    }
    return {name: value for name, value in (target | merged).items() if value is not None}


def wire_time(moment: datetime) -> str:
    """Format a time as the API server does."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
