"""The cluster interfaces, implemented with the Kubernetes API."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Collection, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

from qlora_api import names
from qlora_api.accelerators import Accelerator
from qlora_api.job_ref import JobRef
from qlora_api.names import TERMINAL
from qlora_operator.cluster.cache import ChildCache, ObjectCache, uid_of
from qlora_operator.cluster.class_reader import ClassReader
from qlora_operator.cluster.http import MERGE_PATCH, Api, ApiError, ConflictError, FailedWebhookError, NotFoundError
from qlora_operator.cluster.interface import (
    AdmissionDeniedError,
    ClusterBusyError,
    InvalidStatusError,
    JobVersion,
    NameConflictError,
    PodIdentity,
    PodOwner,
)
from qlora_operator.cluster.kueue import Workloads
from qlora_operator.cluster.parse import (
    Child,
    controller_of,
    controller_uid,
    parse_event_message,
    parse_job,
    parse_observation,
    parse_pod_identity,
    parse_pod_owner,
)
from qlora_operator.cluster.parse_node import parse_node
from qlora_operator.cluster.stripped import CONTROLLER_UID_LABEL, build_restoration, find_podless
from qlora_operator.cluster.tolerant import parse_or_skip
from qlora_operator.models import ChildJob, Classes, Manifest, Observation, RawJob, Workload

_log = logging.getLogger(__name__)

ALREADY_EXISTS: Final = "AlreadyExists"
"""Reason of a 409 for an object that exists; with another reason, as of a quota, nothing was created."""
UNPROCESSABLE: Final = 422
"""HTTP status for an invalid object; quotas use another, admission policies and webhooks any, this one too."""
_DENIAL: Final = re.compile(r"denied (the )?request|admission webhook|AdmissionPolicy")
"""What the API server writes where not it but somebody's policy refuses an object."""
_INVALID_BODY: Final = frozenset({400, 413, UNPROCESSABLE})
"""HTTP statuses for a body that will never be accepted: it cannot be parsed, is too large, or does not fit the CRD."""
_PREFIX: Final = {"v1": "/api/v1", "batch/v1": "/apis/batch/v1", "events.k8s.io/v1": "/apis/events.k8s.io/v1"}
_PLURAL: Final = {"ConfigMap": "configmaps", "Service": "services", "Job": "jobs", "Event": "events"}
PAGE_SIZE: Final = 250
"""Objects per page: ten thousand QLoRAJobs at once would be 100 MB of JSON. Three kinds are listed at a time; 5,000 of
each peaked at 196 MiB in pages of 500 and at 162 MiB in pages of 250, at the same speed."""
_MANAGED_BY_SELECTOR: Final = f"{names.MANAGED_BY_LABEL}={names.FIELD_MANAGER}"
_FIELD_MANAGER_QUERY: Final = {"fieldManager": names.FIELD_MANAGER}


def _jobs_path(namespace: str = "") -> str:
    scope = f"namespaces/{namespace}/" if namespace else ""
    return f"/apis/{names.GROUP}/{names.VERSION}/{scope}{names.PLURAL}"


def _collection_path(manifest: Manifest) -> str:
    prefix, plural = _PREFIX[manifest["apiVersion"]], _PLURAL[manifest["kind"]]
    return f"{prefix}/namespaces/{manifest['metadata']['namespace']}/{plural}"


def _object_path(manifest: Manifest) -> str:
    return f"{_collection_path(manifest)}/{manifest['metadata']['name']}"


class KubeCluster:
    """The cluster behind one API client."""

    def __init__(self, api: Api, children: ChildCache) -> None:
        self._api = api
        self._cache = children
        self._workloads = Workloads(api)
        self._classes = ClassReader(api)

    async def read_job(self, ref: JobRef) -> RawJob | None:
        """Return a QLoRAJob, or None if it is gone or cannot be read."""
        try:
            item = await self._api.request("GET", f"{_jobs_path(ref.namespace)}/{ref.name}")
        except NotFoundError:
            return None
        return parse_or_skip(names.KIND, parse_job, item)

    async def check_api_served(self, namespaces: Collection[str]) -> None:
        """List one QLoRAJob; NotFoundError means that the CRD is not served yet."""
        for namespace in namespaces or ("",):
            await self._api.request("GET", _jobs_path(namespace), query={"limit": "1"})

    async def list_jobs(self, namespaces: Collection[str]) -> list[JobVersion]:
        """Return every QLoRAJob of the namespaces, or of the cluster if none is given."""
        return [
            version
            for namespace in namespaces or ("",)
            async for page in self._pages(_jobs_path(namespace))
            for item in page["items"]
            if (version := parse_or_skip(names.KIND, _job_version, item))
        ]

    async def relist(self, namespaces: Collection[str]) -> set[JobRef]:
        """List all children into the cache, and return the QLoRAJobs whose cached children were stale."""
        changed: set[JobRef] = set()
        for namespace in namespaces or ("",):
            scope = f"namespaces/{namespace}/" if namespace else ""
            changed |= await self._relist(self._cache.jobs, f"/apis/batch/v1/{scope}jobs", namespace)
            changed |= await self._relist(self._cache.pods, f"/api/v1/{scope}pods", namespace)
        return changed

    async def _relist(self, cache: ObjectCache[Child], path: str, namespace: str) -> set[JobRef]:
        """Replace the cache of one kind with a complete list, except for newer objects."""
        listed: set[str] = set()
        changed: set[JobRef] = set()
        version = 0
        async for page in self._pages(path, {"labelSelector": _MANAGED_BY_SELECTOR}):
            if not version:
                version = int(page["metadata"]["resourceVersion"])
                cache.begin_list(namespace, version)
            listed |= {uid_of(item) for item in page["items"]}
            changed |= {ref for item in page["items"] if (ref := cache.update(item))}
        return changed | cache.replace(namespace, listed, version)

    async def _pages(self, path: str, query: Mapping[str, str] | None = None) -> AsyncIterator[dict[str, Any]]:
        """Yield the pages of a complete list, all at one resourceVersion."""
        token = ""
        while True:
            paging = {"limit": str(PAGE_SIZE)} | ({"continue": token} if token else {})
            page = await self._api.request("GET", path, query={**(query or {}), **paging})
            yield {**page, "items": page.get("items") or ()}
            token = page["metadata"].get("continue", "")
            if not token:
                return

    def children_from_cache(self, job: RawJob) -> Observation:
        """Return its children from the cache: without an API call, and possibly stale."""
        return self._cache.children_of(job)

    async def list_children(self, job: RawJob) -> Observation:
        """List its children live, matched by uid."""
        selector = {"labelSelector": f"{names.JOB_LABEL}={job.ref.name}"}
        jobs, pods = await asyncio.gather(
            self._api.request("GET", f"/apis/batch/v1/namespaces/{job.ref.namespace}/jobs", query=selector),
            self._api.request("GET", f"/api/v1/namespaces/{job.ref.namespace}/pods", query=selector),
        )
        unlabelled = [pod for uid in find_podless(jobs, pods) for pod in await self._pods_of_job(job.ref, uid)]
        return parse_observation(job, jobs.get("items") or (), [*(pods.get("items") or ()), *unlabelled])

    async def _pods_of_job(self, ref: JobRef, uid: str) -> list[dict[str, Any]]:
        """List the pods of a Job by the label of the Job controller, without which it would replace them."""
        selector = {"labelSelector": f"{CONTROLLER_UID_LABEL}={uid}"}
        page = await self._api.request("GET", f"/api/v1/namespaces/{ref.namespace}/pods", query=selector)
        return list(page.get("items") or ())

    async def find_gpu_nodes(self, accelerator: Accelerator) -> tuple[Manifest, ...] | None:
        """Return the nodes whose labels describe such GPUs; None if the operator may not list nodes."""
        # resourceVersion 0: the API server answers from its cache.
        query = {"labelSelector": accelerator.memory_label, "resourceVersion": "0"}
        try:
            answer = await self._api.request("GET", "/api/v1/nodes", query=query)
        except ApiError as error:
            _log.warning("cannot list nodes, so runs are not sized: %s", error)
            return None
        nodes = (parse_or_skip("Node", parse_node, item) for item in answer.get("items") or ())
        return tuple(filter(None, nodes))

    async def list_classes(self, age: timedelta) -> Classes:
        """Return the QLoRAClasses from a list that is not old, and younger than a run of this age."""
        return await self._classes.list_classes(age)

    async def namespace_labels(self, namespace: str, age: timedelta) -> Mapping[str, str] | None:
        """Return the labels of a namespace, with the same promise; None if the operator may not read it."""
        return await self._classes.namespace_labels(namespace, age)

    async def find_event(self, ref: JobRef, uid: str, reasons: Collection[str], since: datetime) -> str:
        """Return the message of the newest Event on a child with such a reason; empty if none can be found."""
        query = {"fieldSelector": f"involvedObject.uid={uid}", "limit": str(PAGE_SIZE)}
        try:
            page = await self._api.request("GET", f"/api/v1/namespaces/{ref.namespace}/events", query=query)
        except ApiError as error:
            _log.warning("cannot list Events, so the status does not say why a Job has no pod: %s", error)
            return ""
        return parse_event_message(page["items"], reasons, since)

    async def find_workload(self, ref: JobRef, uid: str) -> Workload | None:
        """Return what Kueue says of a child Job in a queue; None if the operator may not read that."""
        return await self._workloads.find(ref.namespace, uid)

    async def ensure(self, child: Manifest) -> bool:
        """Create a child, or update the ConfigMap if it exists; an object of another owner is never adopted."""
        try:
            return await self._create(child)
        except (ApiError, FailedWebhookError) as error:
            message = f"{child['kind']} {child['metadata']['name']} was denied: {error}"
            raise AdmissionDeniedError(message, permanent=_is_invalid(error)) from error

    async def _create(self, child: Manifest) -> bool:
        try:
            await self._api.request("POST", _collection_path(child), child, query=_FIELD_MANAGER_QUERY)
        except ConflictError:
            await self._resolve_conflict(child)
            return False
        return True

    async def _resolve_conflict(self, child: Manifest) -> None:
        """Update the object that has the child's name if it is ours, or raise NameConflictError."""
        try:
            existing = await self._api.request("GET", _object_path(child))
        except NotFoundError as error:
            raise ClusterBusyError(f"{child['metadata']['name']} was deleted meanwhile") from error
        controller = parse_or_skip(child["kind"], controller_uid, existing)
        if controller != controller_uid(child) or "deletionTimestamp" in existing["metadata"]:
            raise _name_conflict(child, existing)
        if child["kind"] == "ConfigMap":
            version = {"resourceVersion": existing["metadata"]["resourceVersion"]}
            await self.patch({**child, "metadata": {**child["metadata"], **version}})

    async def read_config_map(self, ref: JobRef, name: str) -> Manifest | None:
        """Return a ConfigMap, whoever made it; None if there is none."""
        try:
            return await self._api.request("GET", f"/api/v1/namespaces/{ref.namespace}/configmaps/{name}")
        except NotFoundError:
            return None

    async def restore_job(self, job: Manifest, run_created_at: datetime) -> bool:
        """Give a Job the labels and the owner reference again that somebody removed; return whether any were."""
        try:
            existing = await self._api.request("GET", _object_path(job))
        except NotFoundError:
            return False
        restore = partial(build_restoration, job=job, run_created_at=run_created_at)
        restoration = parse_or_skip("Job", restore, existing)
        if restoration is None:
            return False
        await self.patch(restoration)
        return True

    async def patch(self, child: Manifest) -> None:
        """Merge some fields into a child that exists."""
        try:
            await self._api.request(
                "PATCH", _object_path(child), child, query=_FIELD_MANAGER_QUERY, content_type=MERGE_PATCH
            )
        except (ConflictError, NotFoundError) as error:
            raise ClusterBusyError(f"{child['metadata']['name']} has changed since it was read") from error
        except (ApiError, FailedWebhookError) as error:
            message = f"the change of {child['kind']} {child['metadata']['name']} was denied: {error}"
            raise AdmissionDeniedError(message, permanent=_is_invalid(error)) from error

    async def delete_job(self, ref: JobRef, child: ChildJob) -> None:
        """Delete a child Job after its pods (foreground); no error if it is gone, or another Job has its name now."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": child.uid},
        }
        try:
            await self._api.request("DELETE", f"/apis/batch/v1/namespaces/{ref.namespace}/jobs/{child.name}", body)
        except (ConflictError, NotFoundError):
            return
        except (ApiError, FailedWebhookError) as error:
            message = f"the deletion of Job {child.name} was denied: {error}"
            raise AdmissionDeniedError(message, permanent=False) from error

    async def delete_configuration(self, job: RawJob) -> None:
        """Delete the ConfigMaps and Services that a QLoRAJob owns; no error if there are none."""
        selector = {"labelSelector": f"{_MANAGED_BY_SELECTOR},{names.JOB_LABEL}={job.ref.name}"}
        for plural in ("configmaps", "services"):
            path = f"/api/v1/namespaces/{job.ref.namespace}/{plural}"
            async for page in self._pages(path, selector):
                for item in page["items"]:
                    if controller_uid(item) == job.uid:
                        await self._delete(f"{path}/{item['metadata']['name']}", {"uid": item["metadata"]["uid"]})

    async def delete_qlorajob(self, job: RawJob) -> None:
        """Delete a QLoRAJob, and with it its children; no error if it is gone."""
        version = {"uid": job.uid, "resourceVersion": job.resource_version}
        await self._delete(f"{_jobs_path(job.ref.namespace)}/{job.ref.name}", version)

    async def _delete(self, path: str, preconditions: dict[str, str]) -> None:
        """Delete an object if it is still the one that was read."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions}
        try:
            await self._api.request("DELETE", path, {**body, "propagationPolicy": "Background"})
        except NotFoundError:
            return
        except ConflictError as error:
            raise ClusterBusyError(f"{path.rpartition('/')[2]} has changed since it was read") from error

    async def write_status(self, job: RawJob, status: Manifest) -> str:
        """Replace the status, and return the new resourceVersion; ClusterBusyError if the QLoRAJob has changed."""
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {
                "namespace": job.ref.namespace,
                "name": job.ref.name,
                "uid": job.uid,
                "resourceVersion": job.resource_version,
            },
            "spec": job.spec,
            "status": status,
        }
        path = f"{_jobs_path(job.ref.namespace)}/{job.ref.name}/status"
        try:
            answer = await self._api.request("PUT", path, body, query=_FIELD_MANAGER_QUERY)
        except (ConflictError, NotFoundError) as error:
            raise ClusterBusyError(f"{job.ref} has changed since it was read") from error
        except ApiError as error:
            if error.status in _INVALID_BODY:
                raise InvalidStatusError(str(error)) from error
            raise
        return str(answer["metadata"]["resourceVersion"])

    async def record_event(self, event: Manifest) -> None:
        """Create a Kubernetes Event; a repeat is a no-op, and a rejection is only logged."""
        try:
            await self._api.request("POST", _collection_path(event), event)
        except ConflictError as error:
            if error.reason != ALREADY_EXISTS:
                raise ClusterBusyError(f"Event {event['reason']} was not created: {error}") from error
        except (ApiError, FailedWebhookError) as error:
            _log.warning("Event %s was rejected: %s", event["reason"], error)

    async def review_token(self, token: str) -> PodIdentity | None:
        """Return the pod that a token is bound to; None if it is invalid, or for another audience."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [names.TOKEN_AUDIENCE]},
        }
        answer = await self._api.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body)
        return parse_or_skip("TokenReview", parse_pod_identity, answer)

    def caches_pod(self, ref: JobRef, uid: str) -> bool:
        """Return whether the cache has a pod of the QLoRAJob with this uid; without an API call, and possibly late."""
        return any(pod.uid == uid for pod in self._cache.pods.by_job(ref))

    async def owner_of_pod(self, pod: PodIdentity) -> PodOwner | None:
        """Return which QLoRAJob a pod belongs to; None if the pod is gone, its Job is, or it has no such label.

        The API server accepts a token only while its pod exists, so the pod of the cache is enough.
        """
        if cached := self._cache.owner_of_pod(pod.namespace, pod.uid):
            return cached
        item = await self._get_by_uid(f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}", pod.uid)
        controller = parse_or_skip("Pod", controller_of, item) if item else None
        if item is None or controller is None or controller.get("kind") != "Job":
            return parse_or_skip("Pod", partial(parse_pod_owner, controller=None), item) if item else None
        path = f"/apis/batch/v1/namespaces/{pod.namespace}/jobs/{controller.get('name')}"
        job = await self._get_by_uid(path, controller.get("uid"))
        if job is None:
            return None
        owner = parse_or_skip("Job", controller_of, job)
        return parse_or_skip("Pod", partial(parse_pod_owner, controller=owner), item)

    async def _get_by_uid(self, path: str, uid: str | None) -> dict[str, Any] | None:
        """Return an object; None if it is gone, or another one has its name."""
        try:
            item = await self._api.request("GET", path)
        except NotFoundError:
            return None
        return item if uid and uid_of(item) == uid else None


def _is_invalid(error: Exception) -> bool:
    """Return whether the API server refuses the object itself, so that trying again does not help.

    A policy may be lifted; a ValidatingAdmissionPolicy without a reason refuses with the same status as the API server.
    """
    refused = isinstance(error, ApiError) and error.status == UNPROCESSABLE
    return refused and _DENIAL.search(str(error)) is None


def _job_version(item: dict[str, Any]) -> JobVersion:
    job = parse_job(item)
    finished = job.status.get("phase") in TERMINAL and job.status.get("observedGeneration") == job.generation
    retry = job.status.get("retry") or {}
    settled = not retry.get("pending") and job.retry_request in {None, retry.get("request")}
    fully_reconciled = finished and settled
    return JobVersion(job.ref, job.resource_version, fully_reconciled)


def _name_conflict(child: Manifest, existing: dict[str, Any]) -> NameConflictError:
    """Return the error for a name that is taken; the garbage collector will delete children of an earlier QLoRAJob."""
    owner = child["metadata"]["ownerReferences"][0]
    references = existing["metadata"].get("ownerReferences") or ()
    same_name = any((other.get("kind"), other.get("name")) == (names.KIND, owner["name"]) for other in references)
    child_name = f"{child['kind']} {child['metadata']['name']}"
    if same_name or "deletionTimestamp" in existing["metadata"]:
        return NameConflictError(f"{child_name} of an earlier QLoRAJob is still being deleted", being_deleted=True)
    return NameConflictError(
        f"metadata.name: {child_name} already exists and is not owned by this QLoRAJob; "
        "delete it or choose another name",
        being_deleted=False,
    )
