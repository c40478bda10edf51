"""What the watches have told of children: it costs the API server nothing, and it may be late.

An answer from here may only confirm what is on record already. Whoever wants to act looks at the API server first
(docs/decisions/0010-late-views.md).
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final, Generic

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_operator.cluster.parse import (
    CachedObject,
    Child,
    Json,
    assemble_observation,
    parse_cached_job,
    parse_cached_pod,
    parse_job,
)
from qlora_operator.models import ChildJob, Observation, Pod, RawJob


class ObjectCache(Generic[Child]):
    """The newest that is known of every object of one kind, by the QLoRAJob of its label."""

    def __init__(self, parse: Callable[[Json], CachedObject[Child] | None]) -> None:
        self._parse: Callable[[Json], CachedObject[Child] | None] = parse
        self._objects: defaultdict[JobRef, dict[str, CachedObject[Child]]] = defaultdict(dict)
        self._deleted_uids: set[str] = set()

    def by_job(self, ref: JobRef) -> Iterable[CachedObject[Child]]:
        """Return what is known for a QLoRAJob."""
        return self._objects[ref].values() if ref in self._objects else ()

    def update(self, item: Json) -> JobRef | None:
        """Remember an object, and say whose it is if that told something new; what is older or gone tells nothing."""
        ref, sighting = _job_ref_of(item), self._parse(item)
        if ref is None or sighting is None or sighting.uid in self._deleted_uids:
            return None
        known = self._objects[ref].get(sighting.uid)
        if known is not None and known.version >= sighting.version:
            return None
        self._objects[ref][sighting.uid] = sighting
        return ref if known is None or known.value != sighting.value else None

    def delete(self, item: Json) -> JobRef | None:
        """Forget an object that was deleted, and say whose it was."""
        ref, uid = _job_ref_of(item), item["metadata"]["uid"]
        if ref is not None:
            self._deleted_uids.add(uid)
            self._remove(ref, uid)
        return ref

    def replace(self, namespace: str, listed: set[str], version: int) -> set[JobRef]:
        """Forget what a complete list of a namespace, or of all, lacks; what is newer than the list may well exist."""
        gone = [
            (ref, uid)
            for ref, sightings in self._objects.items()
            for uid, sighting in sightings.items()
            if namespace in {"", ref.namespace} and uid not in listed and sighting.version <= version
        ]
        self._deleted_uids.clear()
        for ref, uid in gone:
            self._remove(ref, uid)
        return {ref for ref, _ in gone}

    def _remove(self, ref: JobRef, uid: str) -> None:
        if ref in self._objects:
            self._objects[ref].pop(uid, None)
            if not self._objects[ref]:
                del self._objects[ref]


class ChildCache:
    """The Jobs and pods of every QLoRAJob, as the watches and the last complete lists told of them."""

    def __init__(self) -> None:
        self.jobs: ObjectCache[ChildJob] = ObjectCache(parse_cached_job)
        self.pods: ObjectCache[Pod] = ObjectCache(parse_cached_pod)

    def children_of(self, job: RawJob) -> Observation:
        """Return the children that belong to exactly this QLoRAJob, as far as is known."""
        return assemble_observation(job, self.jobs.by_job(job.ref), self.pods.by_job(job.ref))


def _job_ref_of(item: Json) -> JobRef | None:
    """Return whose child an object says to be; its owner reference is compared with the QLoRAJob's uid later."""
    metadata = item["metadata"]
    name = metadata.get("labels", {}).get(names.JOB_LABEL)
    return JobRef(metadata["namespace"], name) if name else None


COMPRESSION_LEVEL: Final = 1
"""zlib's level: a finished QLoRAJob of 8 kB takes 2 kB; ten thousand parsed ones would be 150 MB."""


class JobCache:
    """What the watch told, until somebody takes it."""

    def __init__(self) -> None:
        self._jobs: dict[JobRef, bytes] = {}

    def on_update(self, ref: JobRef, item: Json) -> None:
        """Remember a QLoRAJob in place of what was told before."""
        metadata = {name: value for name, value in item["metadata"].items() if name != "managedFields"}
        self._jobs[ref] = zlib.compress(json.dumps({**item, "metadata": metadata}).encode(), COMPRESSION_LEVEL)

    def pop(self, ref: JobRef) -> RawJob | None:
        """Return it once: whoever comes back has something newer to read."""
        text = self._jobs.pop(ref, None)
        return parse_job(json.loads(zlib.decompress(text))) if text else None

    def forget(self, ref: JobRef) -> None:
        """Drop what was told of a QLoRAJob."""
        self._jobs.pop(ref, None)
