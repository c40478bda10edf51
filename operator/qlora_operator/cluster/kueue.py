"""Reads the Workloads of Kueue, in the newest version of its API that is known and served."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

from qlora_api import names
from qlora_operator.cluster.http import Api, ApiError, NotFoundError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.cluster.parse import Json, conditions_of
from qlora_operator.cluster.parse_time import parse_time
from qlora_operator.cluster.tolerant import check_types, parse_or_skip
from qlora_operator.models import Workload

_log = logging.getLogger(__name__)

VERSIONS: Final = ("v1beta2", "v1beta1")
"""Versions of kueue.x-k8s.io that are tested, the preferred one first: Kueue 0.15 and later, and older ones."""
MAX_CHECKS: Final = 5
"""Admission checks that a status lists at most."""
READY: Final = "Ready"
"""State of an admission check that has passed."""
NO_KUEUE: Final = Workload(kueue_served=False)


class Workloads:
    """The Workloads of one API server; which version it serves is discovered at the first use."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._version = ""
        self._refused = ""

    async def find(self, namespace: str, job_uid: str) -> Workload | None:
        """Return the Workload of a Job; None if that is unknown: without the right, or with a broken Kueue."""
        try:
            self._version = self._version or await self._discover()
            path = f"/apis/{names.KUEUE_GROUP}/{self._version}/namespaces/{namespace}/workloads"
            query = {"labelSelector": f"{names.KUEUE_JOB_LABEL}={job_uid}"}
            items = (await self._api.request("GET", path, query=query)).get("items") or ()
        except NotFoundError:
            self._version = ""
            return NO_KUEUE
        except (ApiError, ClusterBusyError) as error:  # a conversion webhook that does not answer is a 500
            if str(error) != self._refused:
                _log.warning("cannot list Workloads, so the status does not say what a queue waits for: %s", error)
            self._refused = str(error)
            return None
        return choose_workload(items)

    async def _discover(self) -> str:
        """Return the version to use: a known one, or else the one that the API server prefers."""
        group = await self._api.request("GET", f"/apis/{names.KUEUE_GROUP}")
        served = {str(entry.get("version")) for entry in group.get("versions") or ()}
        preferred = (group.get("preferredVersion") or {}).get("version")
        return next((version for version in VERSIONS if version in served), str(preferred or VERSIONS[-1]))


def choose_workload(items: Iterable[Json]) -> Workload:
    """Return the newest Workload of a Job; one without a name if there is none that can be read."""
    newest_first = sorted(items, key=_created_at, reverse=True)
    read = (parse_or_skip("Workload", parse_workload, item) for item in newest_first)
    return next(filter(None, read), Workload())


def _created_at(item: Json) -> str:
    return str(item.get("metadata", {}).get("creationTimestamp", ""))


def parse_workload(item: Json) -> Workload:
    """Parse a Workload of v1beta1 or v1beta2, which have these fields in common."""
    spec, status = item.get("spec") or {}, item.get("status") or {}
    held, missing = conditions_of(item, "True"), conditions_of(item, "False")
    requeue_state = status.get("requeueState") or {}
    return check_types(
        Workload(
            name=item["metadata"]["name"],
            queue=spec.get("queueName") or "",
            active=spec.get("active") is not False,
            admitted="Admitted" in held,
            quota_reserved="QuotaReserved" in held,
            pending=_current_message(item, missing.get("QuotaReserved", {})),
            evicted=held.get("Evicted", {}).get("message", ""),
            checks=tuple(_describe_check(check) for check in _unready(status))[:MAX_CHECKS],
            requeue_at=parse_time(requeue_state.get("requeueAt")),
        )
    )


def _current_message(item: Json, condition: Json) -> str:
    """Return the message of a condition; empty if it is older than the spec, as after a change of the queue."""
    generation = item["metadata"].get("generation", 0)
    return str(condition.get("message", "")) if condition.get("observedGeneration", generation) >= generation else ""


def _unready(status: Json) -> list[Mapping[str, Any]]:
    return [check for check in status.get("admissionChecks") or () if check.get("state") != READY]


def _describe_check(check: Json) -> str:
    state, message = check.get("state") or "Pending", check.get("message") or ""
    return f"{check['name']} ({state}{': ' if message else ''}{message})"
