"""Caches of children and QLoRAJobs, filled by the watches: free of API calls, and possibly stale.

A cached view may only confirm what the status says already. Before acting, list the children live
(docs/decisions/0010-late-views.md).
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final, Generic

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_operator.cluster.interface import PodOwner
from qlora_operator.cluster.parse import (
    CachedObject,
    Child,
    Json,
    assemble_observation,
    labels_of,
    parse_cached_job,
    parse_cached_pod,
    parse_job,
)
from qlora_operator.cluster.tolerant import parse_or_skip
from qlora_operator.models import ChildJob, Observation, Pod, RawJob


class ObjectCache(Generic[Child]):
    """The newest known version of every object of one kind, indexed by the QLoRAJob in its label."""

    def __init__(self, kind: str, parse: Callable[[Json], CachedObject[Child] | None]) -> None:
        self._kind = kind
        self._parse: Callable[[Json], CachedObject[Child] | None] = parse
        self._objects: defaultdict[JobRef, dict[str, CachedObject[Child]]] = defaultdict(dict)
        self._refs: dict[str, JobRef] = {}
        self._deleted_uids: set[str] = set()
        self._list_versions: dict[str, int] = {}
        """resourceVersion of the last complete list, by namespace."""

    def by_job(self, ref: JobRef) -> Iterable[CachedObject[Child]]:
        """Return the cached objects of a QLoRAJob."""
        return self._objects[ref].values() if ref in self._objects else ()

    def find(self, uid: str) -> tuple[JobRef, CachedObject[Child]] | None:
        """Return an object with the QLoRAJob in its label."""
        ref = self._refs.get(uid)
        return (ref, self._objects[ref][uid]) if ref is not None else None

    def update(self, item: Json) -> JobRef | None:
        """Store an object; return its QLoRAJob if the value changed, None for an older version or a deleted object.

        One that can no longer be read, or no longer names its QLoRAJob, is removed as if it were deleted.
        """
        parsed = parse_or_skip(self._kind, self._parse_with_ref, item)
        if parsed is None:
            return self._remove(uid_of(item))
        ref, cached = parsed
        if cached.uid in self._deleted_uids:
            return None
        former = self._refs.get(cached.uid, ref)
        known = self._objects[former].get(cached.uid) if former in self._objects else None
        if known is not None and known.version >= cached.version:
            return None
        if former != ref:
            self._remove(cached.uid)
        self._objects[ref][cached.uid] = cached
        self._refs[cached.uid] = ref
        return former if known is None or former != ref or known.value != cached.value else None

    def _parse_with_ref(self, item: Json) -> tuple[JobRef, CachedObject[Child]] | None:
        ref, cached = _job_ref_of(item), self._parse(item)
        return (ref, cached) if ref is not None and cached is not None else None

    def delete(self, item: Json) -> JobRef | None:
        """Remove a deleted object; return its QLoRAJob."""
        ref, uid = parse_or_skip(self._kind, _job_ref_of, item), uid_of(item)
        if ref is not None and uid:
            self._deleted_uids.add(uid)
        return self._remove(uid) or ref

    def begin_list(self, namespace: str, version: int) -> None:
        """Take the objects of a list that begins for newer ones if it is older than the last: etcd was restored."""
        restored = version < self._list_versions.get(namespace, 0)
        self._list_versions[namespace] = version
        for ref, objects in self._objects.items() if restored else ():
            if namespace in {"", ref.namespace}:
                objects.update({uid: cached._replace(version=0) for uid, cached in objects.items()})

    def replace(self, namespace: str, listed: set[str], version: int) -> set[JobRef]:
        """Remove objects that a complete list does not contain, unless they are newer; return their QLoRAJobs.

        Args:
            namespace: The namespace that was listed; empty for all.
            listed: The uids in the list.
            version: The resourceVersion of the list.

        """
        gone = [
            (ref, uid)
            for ref, objects in self._objects.items()
            for uid, cached in objects.items()
            if namespace in {"", ref.namespace} and uid not in listed and cached.version <= version
        ]
        self._deleted_uids.clear()
        for _, uid in gone:
            self._remove(uid)
        return {ref for ref, _ in gone}

    def _remove(self, uid: str) -> JobRef | None:
        """Remove an object; return the QLoRAJob that it was cached for."""
        ref = self._refs.pop(uid, None)
        if ref is not None:
            del self._objects[ref][uid]
            if not self._objects[ref]:
                del self._objects[ref]
        return ref


class ChildCache:
    """Jobs and pods of every QLoRAJob, from the watches and the last complete lists."""

    def __init__(self) -> None:
        self.jobs: ObjectCache[ChildJob] = ObjectCache("Job", parse_cached_job)
        self.pods: ObjectCache[Pod] = ObjectCache("Pod", parse_cached_pod)

    def children_of(self, job: RawJob) -> Observation:
        """Return the cached children of this QLoRAJob, matched by uid."""
        return assemble_observation(job, self.jobs.by_job(job.ref), self.pods.by_job(job.ref))

    def owner_of_pod(self, namespace: str, uid: str) -> PodOwner | None:
        """Return which QLoRAJob a cached pod and its cached Job belong to; None if one of them is not cached."""
        pod = self.pods.find(uid)
        job = self.jobs.find(pod[1].owner_uid) if pod else None
        if pod is None or job is None or pod[0].namespace != namespace or pod[1].value.created_at is None:
            return None
        return PodOwner(pod[0].name, job[1].owner_uid, pod[1].value.created_at)


def _job_ref_of(item: Json) -> JobRef | None:
    """Return the QLoRAJob that an object's label names; the uid of its owner reference is checked later."""
    name = labels_of(item).get(names.JOB_LABEL)
    return JobRef(str(item["metadata"]["namespace"]), str(name)) if name else None


def uid_of(item: Json) -> str:
    """Return the uid of an object; empty if it has none."""
    return parse_or_skip("Object", lambda item: str(item["metadata"]["uid"]), item) or ""


COMPRESSION_LEVEL: Final = 1
"""zlib level: a finished QLoRAJob of 8 kB compresses to 2 kB; ten thousand parsed ones would take 150 MB."""


class JobCache:
    """QLoRAJobs from watch events, each held until its reconcile pops it."""

    def __init__(self) -> None:
        self._jobs: dict[JobRef, bytes] = {}

    def on_update(self, ref: JobRef, item: Json) -> None:
        """Store the newest copy of a QLoRAJob."""
        metadata = {name: value for name, value in item["metadata"].items() if name != "managedFields"}
        self._jobs[ref] = zlib.compress(json.dumps({**item, "metadata": metadata}).encode(), COMPRESSION_LEVEL)

    def pop(self, ref: JobRef) -> RawJob | None:
        """Remove and return the copy; a retry must read the QLoRAJob live instead."""
        return read_copy(self.take(ref))

    def take(self, ref: JobRef) -> bytes | None:
        """Remove and return the copy, to be read with `read_copy`."""
        return self._jobs.pop(ref, None)

    def put_back(self, ref: JobRef, copy: bytes) -> None:
        """Return a copy that was taken for nothing, unless a newer one has arrived."""
        self._jobs.setdefault(ref, copy)

    def forget(self, ref: JobRef) -> None:
        """Drop the copy of a QLoRAJob."""
        self._jobs.pop(ref, None)


def read_copy(copy: bytes | None) -> RawJob | None:
    """Parse a copy of a QLoRAJob; None if there is none."""
    return parse_or_skip(names.KIND, parse_job, json.loads(zlib.decompress(copy))) if copy else None
