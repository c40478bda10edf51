"""The child cache: versions decide what is newer, complete lists what exists."""

from collections.abc import Mapping
from typing import Any

import pytest

from qlora_api.job_ref import JobRef
from qlora_api.names import Role
from qlora_operator.cluster.cache import ChildCache
from qlora_operator.cluster.http import Api
from qlora_operator.cluster.kube_cluster import KubeCluster
from qlora_operator.models import ChildJob, RawJob
from tests.make import NOW, REF, UID

Json = dict[str, Any]
JOB = RawJob(REF, UID, 1, "1", NOW, deleting=False, spec={}, status={})
OTHER = JobRef("elsewhere", REF.name)


def make_item(uid: str, owner: str, version: int, namespace: str = REF.namespace, **labels: str) -> Json:
    return {
        "metadata": {
            "name": uid, "namespace": namespace, "uid": uid, "resourceVersion": str(version),
            "creationTimestamp": "2026-03-01T12:00:00Z",
            "labels": {"qlora.dev/job": REF.name, **labels},
            "ownerReferences": [{"uid": owner, "controller": True}],
        },
        "spec": {}, "status": {},
    }  # fmt: skip


def raw_job(
    version: int = 1, *conditions: str, uid: str = "job", namespace: str = REF.namespace, attempt: int = 1
) -> Json:
    holds = [{"type": kind, "status": "True"} for kind in conditions]
    item = make_item(uid, UID, version, namespace, **{"qlora.dev/role": "train", "qlora.dev/attempt": str(attempt)})
    item["metadata"]["name"] = f"{REF.name}-{attempt}"
    return item | {"status": {"conditions": holds}}


def raw_pod(version: int = 1, uid: str = "pod", **status: Any) -> Json:
    return make_item(uid, "job", version) | {"status": {"phase": "Pending", **status}}


def only_job(children: ChildCache) -> ChildJob:
    [child] = children.children_of(JOB).jobs
    return child


def test_job_and_pod_events_in_any_order_are_joined() -> None:
    children = ChildCache()
    assert children.pods.update(raw_pod()) == REF
    assert children.children_of(JOB).jobs == ()
    assert children.jobs.update(raw_job()) == REF
    assert (only_job(children).role, [pod.uid for pod in only_job(children).pods]) == (Role.TRAIN, ["pod"])


@pytest.mark.parametrize(
    ("told", "news", "complete"),
    [
        pytest.param([raw_job(1), raw_job(2, "Complete")], REF, True, id="newer"),
        pytest.param([raw_job(1), raw_job(2)], None, False, id="newer, and the same to us"),
        pytest.param([raw_job(2, "Complete"), raw_job(1)], None, True, id="older comes late"),
        pytest.param([raw_job(2, "Complete"), raw_job(2, "Complete")], None, True, id="told twice"),
        pytest.param([raw_job(9), raw_job(10, "Complete")], REF, True, id="versions are numbers"),
    ],
)
def test_older_resource_version_is_ignored(told: list[Json], news: JobRef | None, complete: bool) -> None:
    children = ChildCache()
    assert [children.jobs.update(item) for item in told][-1] == news
    assert only_job(children).complete == complete


def test_children_of_other_job_uid_are_ignored() -> None:
    children = ChildCache()
    children.jobs.update(make_item("old", "uid of a deleted namesake", 1, **{"qlora.dev/role": "train"}))
    assert children.children_of(JOB).jobs == ()


def test_repeated_event_does_not_restore_deleted_object() -> None:
    children = ChildCache()
    children.jobs.update(raw_job(1))
    assert children.jobs.delete(raw_job(2)) == REF
    assert children.jobs.update(raw_job(1)) is None
    assert children.children_of(JOB).jobs == ()


def test_deleted_objects_leave_no_entries() -> None:
    children = ChildCache()
    children.jobs.update(raw_job(1))
    children.jobs.delete(raw_job(2))
    children.jobs.replace("", set(), 3)
    assert (children.jobs._objects, children.jobs._deleted_uids) == ({}, set())


class PagedApi(Api):
    """Answers lists in pages of one object."""

    def __init__(self, jobs: list[Json], pods: list[Json], version: int) -> None:
        self.lists = {"jobs": jobs, "pods": pods}
        self.version = version

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "",
    ) -> Json:
        assert (method, body, content_type) == ("GET", None, "")
        assert query is not None
        assert query["labelSelector"] == "app.kubernetes.io/managed-by=qlora-operator"
        items = self.lists[path.rpartition("/")[2]]
        start = int(query.get("continue", 0))
        more = {"continue": str(start + 1)} if start + 1 < len(items) else {}
        return {"metadata": {"resourceVersion": str(self.version), **more}, "items": items[start : start + 1]}


async def test_relist_repairs_missed_events() -> None:
    children = ChildCache()
    children.jobs.update(raw_job(1))
    children.jobs.update(raw_job(1, uid="deleted", attempt=2))
    children.jobs.update(raw_job(99, uid="newer than the list", attempt=4))
    jobs = [raw_job(5, "Complete"), raw_job(6, uid="never told", attempt=3)]
    assert await KubeCluster(PagedApi(jobs, [raw_pod(7)], 10), children).relist(()) == {REF}
    assert {child.uid: child.complete for child in children.children_of(JOB).jobs} == {
        "job": True, "never told": False, "newer than the list": False,
    }  # fmt: skip
    assert len(next(child for child in children.children_of(JOB).jobs if child.uid == "job").pods) == 1


async def test_unchanged_relist_enqueues_nothing() -> None:
    children = ChildCache()
    cluster = KubeCluster(PagedApi([raw_job(1)], [raw_pod(1)], 10), children)
    assert await cluster.relist(()) == {REF}
    assert await cluster.relist(()) == set()


async def test_relist_of_one_namespace_keeps_others() -> None:
    children = ChildCache()
    children.jobs.update(raw_job(1, uid="elsewhere", namespace=OTHER.namespace))
    children.jobs.update(raw_job(1))
    assert await KubeCluster(PagedApi([], [], 10), children).relist([REF.namespace]) == {REF}
    assert [sighting.uid for sighting in children.jobs.by_job(OTHER)] == ["elsewhere"]


def test_child_that_becomes_unreadable_is_removed_and_enqueues_its_job() -> None:
    children = ChildCache()
    children.jobs.update(raw_job(1))
    changed = raw_job(2)
    changed["metadata"]["labels"]["qlora.dev/role"] = "debug"
    assert children.jobs.update(changed) == REF
    assert children.children_of(JOB).jobs == ()


def test_child_whose_job_label_changes_leaves_no_copy() -> None:
    children = ChildCache()
    children.jobs.update(raw_job(1))
    changed = raw_job(2)
    changed["metadata"]["labels"]["qlora.dev/job"] = "other"
    assert children.jobs.update(changed) == REF
    assert children.children_of(JOB).jobs == ()
    children.jobs.delete(changed)
    assert (children.jobs._objects, children.jobs._refs) == ({}, {})


async def test_list_after_restore_of_etcd_replaces_newer_versions() -> None:
    children = ChildCache()
    await KubeCluster(PagedApi([raw_job(90)], [raw_pod(95), raw_pod(96, "gone")], 100), children).relist(())
    children.pods.update(raw_pod(120, phase="Running"))
    restored = [raw_pod(70, phase="Succeeded"), raw_pod(71, "new")]
    assert await KubeCluster(PagedApi([raw_job(80, "Complete")], restored, 85), children).relist(()) == {REF}
    assert only_job(children).complete
    assert {pod.uid: pod.phase for pod in (*only_job(children).pods, *only_job(children).replaced_pods)} == {
        "pod": "Succeeded", "new": "Pending",
    }  # fmt: skip
    children.pods.update(raw_pod(86, phase="Failed"))
    assert "Failed" in {pod.phase for pod in (*only_job(children).pods, *only_job(children).replaced_pods)}
