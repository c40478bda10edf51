"""What a conflict or a refusal means for a write, by API servers that answer with one."""

from collections.abc import AsyncIterator
from typing import Any, NoReturn

import pytest
from kubernetes.aio import client

from qlora_api import names
from qlora_api.accelerators import NVIDIA
from qlora_api.names import Role
from qlora_operator.cluster.cache import ChildCache
from qlora_operator.cluster.http import Api, ApiError, ConflictError, FailedWebhookError, NotFoundError
from qlora_operator.cluster.interface import (
    AdmissionDeniedError,
    ClusterBusyError,
    InvalidStatusError,
    PodIdentity,
    PodOwner,
)
from qlora_operator.cluster.kube_cluster import KubeCluster, _job_version
from qlora_operator.cluster.parse import parse_job
from qlora_operator.models import ChildJob, RawJob
from qlora_operator.resources import build_deadline
from tests.make import NOW, REF, UID, make_manifest

EVENT = {"apiVersion": "events.k8s.io/v1", "kind": "Event", "reason": "Prepared", "metadata": {"namespace": "ml"}}
DEADLINE = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"namespace": "ml", "name": "bot-1"}}
CONFIG = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": "ml", "name": "bot-1"}}


class ConflictingApi(Api):
    def __init__(self, reason: str) -> None:
        super().__init__(client.Configuration())
        self._reason = reason

    async def request(self, *_: Any, **__: Any) -> NoReturn:
        raise ConflictError(409, self._reason, "409")


@pytest.fixture
async def conflicting(request: pytest.FixtureRequest) -> Any:
    api = ConflictingApi(request.param)
    yield KubeCluster(api, ChildCache())
    await api.close()


@pytest.mark.parametrize("conflicting", ["AlreadyExists"], indirect=True)
async def test_existing_event_is_no_error(conflicting: KubeCluster) -> None:
    assert await conflicting.record_event(EVENT) is None


@pytest.mark.parametrize("conflicting", ["Conflict"], indirect=True)
async def test_event_conflict_is_retried(conflicting: KubeCluster) -> None:
    with pytest.raises(ClusterBusyError):
        await conflicting.record_event(EVENT)


@pytest.mark.parametrize("conflicting", ["Conflict"], indirect=True)
async def test_changed_child_raises_cluster_busy(conflicting: KubeCluster) -> None:
    with pytest.raises(ClusterBusyError):
        await conflicting.patch(DEADLINE)


class ConfigMapThatExists(Api):
    """The ConfigMap is there already, and the change of it meets an error."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(client.Configuration())
        self._error = error

    async def request(self, method: str, *_: Any, **__: Any) -> dict[str, Any]:
        if method == "POST":
            raise ConflictError(409, "AlreadyExists", "409")
        if method == "PATCH":
            raise self._error
        return {"metadata": {"resourceVersion": "7"}}


@pytest.fixture
async def outdated(request: pytest.FixtureRequest) -> AsyncIterator[KubeCluster]:
    api = ConfigMapThatExists(request.param)
    yield KubeCluster(api, ChildCache())
    await api.close()


@pytest.mark.parametrize("outdated", [ApiError(403, "Forbidden", "a policy says no")], indirect=True)
async def test_denied_patch_raises_admission_denied(outdated: KubeCluster) -> None:
    with pytest.raises(AdmissionDeniedError, match="ConfigMap bot-1 was denied: a policy says no"):
        await outdated.ensure(CONFIG)


@pytest.mark.parametrize(
    "outdated", [ConflictError(409, "Conflict", "409"), NotFoundError(404, "NotFound", "404")], indirect=True
)
async def test_child_changed_or_deleted_meanwhile_raises_cluster_busy(outdated: KubeCluster) -> None:
    with pytest.raises(ClusterBusyError):
        await outdated.ensure(CONFIG)


class StoredObjects(Api):
    """Answers with the objects that have a path, and 404 for all others."""

    def __init__(self, objects: dict[str, dict[str, Any]]) -> None:
        super().__init__(client.Configuration())
        self._objects = objects

    async def request(self, _: str, path: str, *__: Any, **___: Any) -> dict[str, Any]:
        if path not in self._objects:
            raise NotFoundError(404, "NotFound", "404")
        return self._objects[path]


POD = PodIdentity("ml", "bot-1-0-abcde", "pod-uid")
POD_PATH = "/api/v1/namespaces/ml/pods/bot-1-0-abcde"
JOB_PATH = "/apis/batch/v1/namespaces/ml/jobs/bot-1"


def make_item(uid: str, *controller: str, label: str = REF.name) -> dict[str, Any]:
    """Return an object; its controller is given by kind, name and uid."""
    owners = [{**dict(zip(("kind", "name", "uid"), controller, strict=True)), "controller": True}] if controller else []
    metadata = {"uid": uid, "creationTimestamp": NOW.isoformat(), "ownerReferences": owners}
    return {"metadata": metadata | ({"labels": {"qlora.dev/job": label}} if label else {})}


OF_JOB = ("Job", "bot-1", "job-uid")
OF_QLORAJOB = ("QLoRAJob", REF.name, UID)


@pytest.mark.parametrize(
    ("pod", "job", "owner"),
    [
        pytest.param(make_item("pod-uid", *OF_JOB), make_item("job-uid", *OF_QLORAJOB), UID, id="of-a-run"),
        pytest.param(make_item("pod-uid"), None, None, id="own-script"),
        pytest.param(make_item("pod-uid", "ReplicaSet", "a", "b"), None, None, id="of-a-deployment"),
        pytest.param(make_item("pod-uid", *OF_JOB), make_item("job-uid"), None, id="of-an-own-job"),
        pytest.param(
            make_item("pod-uid", *OF_JOB), make_item("job-uid", "CronJob", "a", "b"), None, id="of-an-own-cron-job"
        ),
    ],
)
async def test_owner_of_pod_is_the_controller_of_its_job(
    pod: dict[str, Any], job: dict[str, Any] | None, owner: str | None
) -> None:
    api = StoredObjects({POD_PATH: pod} | ({JOB_PATH: job} if job else {}))
    assert await KubeCluster(api, ChildCache()).owner_of_pod(POD) == PodOwner(REF.name, owner, NOW)
    await api.close()


@pytest.mark.parametrize(
    "objects",
    [
        pytest.param({}, id="pod-is-gone"),
        pytest.param({POD_PATH: make_item("next-uid")}, id="another-pod-has-the-name"),
        pytest.param({POD_PATH: make_item("pod-uid", label="")}, id="no-label"),
        pytest.param({POD_PATH: make_item("pod-uid", *OF_JOB)}, id="job-is-gone"),
        pytest.param(
            {POD_PATH: make_item("pod-uid", *OF_JOB), JOB_PATH: make_item("next-uid", *OF_QLORAJOB)},
            id="another-job-has-the-name",
        ),
    ],
)
async def test_pod_without_owner_speaks_for_nobody(objects: dict[str, dict[str, Any]]) -> None:
    api = StoredObjects(objects)
    assert await KubeCluster(api, ChildCache()).owner_of_pod(POD) is None
    await api.close()


async def test_pod_of_a_watch_event_is_cached() -> None:
    cache, api = ChildCache(), StoredObjects({})
    item = make_item("pod-uid", *OF_JOB)
    metadata = {**item["metadata"], "namespace": "ml", "name": "bot-1-0-abcde", "resourceVersion": "1"}
    cache.pods.update({"metadata": metadata, "spec": {}})
    cluster = KubeCluster(api, cache)
    assert cluster.caches_pod(REF, "pod-uid")
    assert not cluster.caches_pod(REF, "other-uid")
    assert not cluster.caches_pod(REF._replace(namespace="other"), "pod-uid")
    await api.close()


async def test_owner_of_a_cached_pod_costs_no_call() -> None:
    cache, api = ChildCache(), StoredObjects({})
    for kind, name, item in (
        (cache.pods, "bot-1-0-abcde", make_item("pod-uid", *OF_JOB)),
        (cache.jobs, "bot-1", make_item("job-uid", *OF_QLORAJOB)),
    ):
        labels = {**item["metadata"]["labels"], names.ROLE_LABEL: "train", names.ATTEMPT_LABEL: "1"}
        versioned = {"namespace": POD.namespace, "name": name, "resourceVersion": "1", "labels": labels}
        kind.update({"metadata": item["metadata"] | versioned, "spec": {}})
    cluster = KubeCluster(api, cache)
    owner = await cluster.owner_of_pod(POD)
    assert owner is not None
    assert (owner.job, owner.job_uid) == (REF.name, UID)
    assert await cluster.owner_of_pod(POD._replace(namespace="other")) is None, "asked live, where it is not"
    await api.close()


class RefusingApi(Api):
    def __init__(self, status: int) -> None:
        super().__init__(client.Configuration())
        self._status = status

    async def request(self, *_: Any, **__: Any) -> NoReturn:
        raise ApiError(self._status, "Any", "status.step: Too long")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidStatusError), (413, InvalidStatusError), (422, InvalidStatusError), (403, ApiError)],
)
async def test_invalid_status_error_differs_from_forbidden(status: int, kind: type[Exception]) -> None:
    metadata = {"uid": UID, "generation": 1, "resourceVersion": "1", "creationTimestamp": NOW.isoformat()}
    manifest = make_manifest()
    job = parse_job({**manifest, "metadata": {**manifest["metadata"], **metadata}})
    api = RefusingApi(status)
    with pytest.raises(kind, match="Too long") as refusal:
        await KubeCluster(api, ChildCache()).write_status(job, {})
    assert type(refusal.value) is kind
    await api.close()


class EventsApi(Api):
    """Answers lists of Events, or refuses them."""

    def __init__(self, events: list[dict[str, Any]] | None) -> None:
        super().__init__(client.Configuration())
        self._events = events
        self.queries: list[Any] = []

    async def request(self, *_: Any, **options: Any) -> dict[str, Any]:
        self.queries.append(options["query"])
        if self._events is None:
            raise ApiError(403, "Forbidden", "cannot list resource events")
        return {"items": self._events}


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([{"reason": "FailedCreate", "message": "Error creating: no", "lastTimestamp": "2026-03-01T12:00:00Z"}], "no"),
        ([], ""),
        (None, ""),
    ],
)
async def test_event_of_a_job_is_found_if_events_may_be_listed(
    events: list[dict[str, Any]] | None, message: str
) -> None:
    api = EventsApi(events)
    assert await KubeCluster(api, ChildCache()).find_event(REF, "job-uid", {"FailedCreate"}, NOW) == message
    assert api.queries[0]["fieldSelector"] == "involvedObject.uid=job-uid"
    await api.close()


CHILD = ChildJob("bot-1", Role.TRAIN, 1, NOW, uid="job-uid")


class RecordingApi(Api):
    """Records the bodies of all requests."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []

    async def request(self, _: str, __: str, body: Any = None, **___: Any) -> dict[str, Any]:
        self.bodies.append(body)
        return {}


async def test_deletion_names_the_uid() -> None:
    api = RecordingApi()
    await KubeCluster(api, ChildCache()).delete_job(REF, CHILD)
    assert [body["preconditions"] for body in api.bodies] == [{"uid": "job-uid"}]


@pytest.mark.parametrize("conflicting", ["Conflict"], indirect=True)
async def test_job_whose_name_another_has_now_is_gone(conflicting: KubeCluster) -> None:
    await conflicting.delete_job(REF, CHILD)


def test_patch_of_the_deadline_names_the_uid() -> None:
    assert build_deadline(REF, CHILD, 60)["metadata"] == {"namespace": "ml", "name": "bot-1", "uid": "job-uid"}


class ListedChildren(Api):
    """Lists ConfigMaps and Services in two pages, and records what is deleted."""

    def __init__(self, *items: dict[str, Any]) -> None:
        super().__init__(client.Configuration())
        self._items = items
        self.selectors: set[str] = set()
        self.deleted: list[tuple[str, dict[str, Any]]] = []

    async def request(self, method: str, path: str, body: Any = None, query: Any = None, **_: Any) -> dict[str, Any]:
        if method == "DELETE":
            self.deleted.append((path, body["preconditions"]))
            return {}
        self.selectors.add(query["labelSelector"])
        if "continue" in query:
            return {"metadata": {}, "items": self._items[1:]}
        return {"metadata": {"continue": "more"}, "items": self._items[:1]}


def make_child(name: str, owner_uid: str) -> dict[str, Any]:
    item = make_item(f"{name}-uid", "QLoRAJob", REF.name, owner_uid)
    return {"metadata": {**item["metadata"], "name": name}}


async def test_configuration_of_other_owners_is_not_deleted() -> None:
    """One with the same name was deleted before, or somebody has copied the label."""
    foreign = {"metadata": {"name": "copy", "uid": "copy-uid", "labels": {"qlora.dev/job": REF.name}}}
    api = ListedChildren(make_child("bot-1", UID), make_child("bot-2", "former"), foreign, make_child("bot-3", UID))
    await KubeCluster(api, ChildCache()).delete_configuration(raw_job())
    await api.close()
    assert api.deleted == [
        (f"/api/v1/namespaces/ml/{plural}/{name}", {"uid": f"{name}-uid"})
        for plural in ("configmaps", "services")
        for name in ("bot-1", "bot-3")
    ]
    assert api.selectors == {f"app.kubernetes.io/managed-by=qlora-operator,qlora.dev/job={REF.name}"}


async def test_qlorajob_is_deleted_only_as_it_was_read() -> None:
    api = ListedChildren()
    await KubeCluster(api, ChildCache()).delete_qlorajob(raw_job())
    await api.close()
    path = f"/apis/qlora.dev/v1alpha1/namespaces/ml/qlorajobs/{REF.name}"
    assert api.deleted == [(path, {"uid": UID, "resourceVersion": "7"})]


@pytest.mark.parametrize("conflicting", ["Conflict"], indirect=True)
async def test_qlorajob_that_changed_is_not_deleted(conflicting: KubeCluster) -> None:
    with pytest.raises(ClusterBusyError):
        await conflicting.delete_qlorajob(raw_job())


@pytest.mark.parametrize(
    ("annotation", "retry", "settled"),
    [
        (None, None, True),
        ("a", None, False),
        ("a", {"request": "a", "pending": False}, True),
        ("a", {"request": "a", "pending": True}, False),
        ("b", {"request": "a", "pending": False}, False),
        (None, {"request": "a", "pending": False}, True),
    ],
)
def test_finished_job_with_open_retry_request_is_not_fully_reconciled(
    annotation: str | None, retry: dict[str, Any] | None, settled: bool
) -> None:
    made = make_manifest()
    metadata = {"uid": UID, "generation": 1, "resourceVersion": "7", "creationTimestamp": NOW.isoformat()}
    annotations = {"annotations": {"qlora.dev/retry-requested-at": annotation}} if annotation else {}
    status = {"phase": "Failed", "observedGeneration": 1} | ({"retry": retry} if retry else {})
    item = {**made, "metadata": {**made["metadata"], **metadata, **annotations}, "status": status}
    assert _job_version(item).fully_reconciled is settled


def raw_job() -> RawJob:
    made = make_manifest()
    metadata = {"uid": UID, "generation": 1, "resourceVersion": "7", "creationTimestamp": NOW.isoformat()}
    return parse_job({**made, "metadata": {**made["metadata"], **metadata}})


POLICY = 'jobs.batch "bot-1" is forbidden: ValidatingAdmissionPolicy "freeze" with binding "all" denied request: frozen'
WEBHOOK = 'admission webhook "validate.example" denied the request: no'
SHAPE = 'Job.batch "bot-1" is invalid: spec.template.spec.containers[0].image: Required value'


class DenyingApi(Api):
    """Refuses everything with one error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(client.Configuration())
        self._error = error

    async def request(self, *_: Any, **__: Any) -> dict[str, Any]:
        raise self._error


@pytest.mark.parametrize(
    ("message", "permanent"),
    [
        pytest.param(f"422 Invalid: {POLICY}", False, id="policy"),
        pytest.param(f"422 : {WEBHOOK}", False, id="webhook"),
        pytest.param(f"422 Invalid: {SHAPE}", True, id="object"),
    ],
)
async def test_only_the_api_server_itself_refuses_for_good(message: str, permanent: bool) -> None:
    api = DenyingApi(ApiError(422, "Invalid", message))
    with pytest.raises(AdmissionDeniedError) as denied:
        await KubeCluster(api, ChildCache()).ensure(CONFIG)
    assert denied.value.permanent == permanent
    await api.close()


REFUSALS = [
    pytest.param(ApiError(403, "Forbidden", f"403 Forbidden: {POLICY}"), id="policy"),
    pytest.param(FailedWebhookError('500 : failed calling webhook "validate.example": refused'), id="webhook"),
]


@pytest.mark.parametrize("error", REFUSALS)
async def test_event_that_is_refused_stops_nothing(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    api = DenyingApi(error)
    event = {"apiVersion": "events.k8s.io/v1", "kind": "Event", "reason": "Training", "metadata": {"namespace": "ml"}}
    await KubeCluster(api, ChildCache()).record_event(event)
    assert "Event Training was rejected" in caplog.text
    await api.close()


@pytest.mark.parametrize("error", REFUSALS)
async def test_refused_deletion_names_the_job_and_who_refuses(error: Exception) -> None:
    api = DenyingApi(error)
    with pytest.raises(AdmissionDeniedError, match=r"deletion of Job bot-1 was denied: .*(freeze|validate.example)"):
        await KubeCluster(api, ChildCache()).delete_job(REF, CHILD)
    await api.close()


class ListedJobs(Api):
    """Lists a Job whose status counts a pod, and pods by selector."""

    def __init__(self, active: int, pods: dict[str, list[dict[str, Any]]]) -> None:
        super().__init__(client.Configuration())
        self._pods = pods
        self._job = make_train_job(active)
        self.selectors: list[str] = []

    async def request(self, _: str, path: str, *__: Any, query: Any = None, **___: Any) -> dict[str, Any]:
        self.selectors.append(query["labelSelector"])
        if path.endswith("/jobs"):
            return {"items": [self._job]}
        return {"items": self._pods.get(query["labelSelector"], [])}


def make_train_job(active: int) -> dict[str, Any]:
    labels = {"qlora.dev/job": REF.name, "qlora.dev/role": "train", "qlora.dev/attempt": "1"}
    owner = {"kind": "QLoRAJob", "name": REF.name, "uid": UID, "controller": True}
    metadata = {"name": f"{REF.name}-1", "namespace": "ml", "uid": "job-uid", "creationTimestamp": NOW.isoformat()}
    return {
        "metadata": {**metadata, "labels": labels, "ownerReferences": [owner]},
        "spec": {},
        "status": {"active": active, "startTime": NOW.isoformat()},
    }


RUN = RawJob(REF, UID, 1, "1", NOW, deleting=False, spec={}, status={})
BY_LABEL = f"qlora.dev/job={REF.name}"
BY_CONTROLLER = "batch.kubernetes.io/controller-uid=job-uid"


@pytest.mark.parametrize(
    ("active", "selector", "looked_up"),
    [(1, BY_CONTROLLER, True), (1, BY_LABEL, False), (0, BY_CONTROLLER, False)],
    ids=["label removed", "labelled", "no pod"],
)
async def test_pod_whose_label_somebody_removed_is_found_by_its_job(
    active: int, selector: str, looked_up: bool
) -> None:
    pod = make_item("pod-uid", *OF_JOB) | {"spec": {}, "status": {"phase": "Running"}}
    pod["metadata"] |= {"name": "bot-1-0-abcde", "namespace": "ml"}
    api = ListedJobs(active, {selector: [pod]})
    children = await KubeCluster(api, ChildCache()).list_children(RUN)
    assert (BY_CONTROLLER in api.selectors) == looked_up
    [job] = children.jobs
    assert [found.name for found in job.pods] == (["bot-1-0-abcde"] if looked_up or selector == BY_LABEL else [])
    await api.close()


async def test_nodes_that_may_not_be_listed_are_unknown_not_none() -> None:
    assert await KubeCluster(EventsApi(None), ChildCache()).find_gpu_nodes(NVIDIA) is None
