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
from qlora_operator.cluster.parse import Child, Json, Sighting, assemble, parse_job, sight_job, sight_pod
from qlora_operator.models import ChildJob, Observation, Pod, RawJob


class Shelf(Generic[Child]):
    """The newest that is known of every object of one kind, by the QLoRAJob of its label."""

    def __init__(self, sight: Callable[[Json], Sighting[Child] | None]) -> None:
        self._sight: Callable[[Json], Sighting[Child] | None] = sight
        self._known: defaultdict[JobRef, dict[str, Sighting[Child]]] = defaultdict(dict)
        self._gone: set[str] = set()

    def of(self, ref: JobRef) -> Iterable[Sighting[Child]]:
        """Return what is known for a QLoRAJob."""
        return self._known[ref].values() if ref in self._known else ()

    def put(self, item: Json) -> JobRef | None:
        """Remember an object, and say whose it is if that told something new; what is older or gone tells nothing."""
        ref, sighting = _job_of(item), self._sight(item)
        if ref is None or sighting is None or sighting.uid in self._gone:
            return None
        known = self._known[ref].get(sighting.uid)
        if known is not None and known.version >= sighting.version:
            return None
        self._known[ref][sighting.uid] = sighting
        return ref if known is None or known.what != sighting.what else None

    def drop(self, item: Json) -> JobRef | None:
        """Forget an object that was deleted, and say whose it was."""
        ref, uid = _job_of(item), item["metadata"]["uid"]
        if ref is not None:
            self._gone.add(uid)
            self._remove(ref, uid)
        return ref

    def drop_missing(self, namespace: str, listed: set[str], version: int) -> set[JobRef]:
        """Forget what a complete list of a namespace, or of all, lacks; what is newer than the list may well exist."""
        gone = [
            (ref, uid)
            for ref, sightings in self._known.items()
            for uid, sighting in sightings.items()
            if namespace in {"", ref.namespace} and uid not in listed and sighting.version <= version
        ]
        self._gone.clear()
        for ref, uid in gone:
            self._remove(ref, uid)
        return {ref for ref, _ in gone}

    def _remove(self, ref: JobRef, uid: str) -> None:
        if ref in self._known:
            self._known[ref].pop(uid, None)
            if not self._known[ref]:
                del self._known[ref]


class Children:
    """The Jobs and pods of every QLoRAJob, as the watches and the last complete lists told of them."""

    def __init__(self) -> None:
        self.jobs: Shelf[ChildJob] = Shelf(sight_job)
        self.pods: Shelf[Pod] = Shelf(sight_pod)

    def of(self, job: RawJob) -> Observation:
        """Return the children that belong to exactly this QLoRAJob, as far as is known."""
        return assemble(job, self.jobs.of(job.ref), self.pods.of(job.ref))


def _job_of(item: Json) -> JobRef | None:
    """Return whose child an object says to be; its owner reference is compared with the QLoRAJob's uid later."""
    metadata = item["metadata"]
    name = metadata.get("labels", {}).get(names.JOB_LABEL)
    return JobRef(metadata["namespace"], name) if name else None


FASTEST: Final = 1
"""zlib's level: a finished QLoRAJob of 8 kB takes 2 kB; ten thousand parsed ones would be 150 MB."""


class Told:
    """What the watch told, until somebody takes it."""

    def __init__(self) -> None:
        self._told: dict[JobRef, bytes] = {}

    def saw(self, ref: JobRef, item: Json) -> None:
        """Remember a QLoRAJob in place of what was told before."""
        metadata = {name: value for name, value in item["metadata"].items() if name != "managedFields"}
        self._told[ref] = zlib.compress(json.dumps({**item, "metadata": metadata}).encode(), FASTEST)

    def take(self, ref: JobRef) -> RawJob | None:
        """Return it once: whoever comes back has something newer to read."""
        text = self._told.pop(ref, None)
        return parse_job(json.loads(zlib.decompress(text))) if text else None

    def forget(self, ref: JobRef) -> None:
        """Drop what was told of a QLoRAJob."""
        self._told.pop(ref, None)
