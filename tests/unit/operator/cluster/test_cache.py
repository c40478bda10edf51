"""What the watches told: versions decide what is newer, and a complete list what is there."""

from collections.abc import Mapping
from typing import Any

import pytest

from qlora_api.job_ref import JobRef
from qlora_api.names import Role
from qlora_operator.cluster.cache import Children
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


def raw_job(version: int = 1, *conditions: str, uid: str = "job", namespace: str = REF.namespace) -> Json:
    holds = [{"type": kind, "status": "True"} for kind in conditions]
    return make_item(uid, UID, version, namespace, **{"qlora.dev/role": "train"}) | {"status": {"conditions": holds}}


def raw_pod(version: int = 1, uid: str = "pod", **status: Any) -> Json:
    return make_item(uid, "job", version) | {"status": {"phase": "Pending", **status}}


def only_job(children: Children) -> ChildJob:
    [child] = children.of(JOB).jobs
    return child


def test_a_job_and_its_pod_are_put_together_in_any_order() -> None:
    children = Children()
    assert children.pods.put(raw_pod()) == REF
    assert children.of(JOB).jobs == ()
    assert children.jobs.put(raw_job()) == REF
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
def test_versions_decide(told: list[Json], news: JobRef | None, complete: bool) -> None:
    children = Children()
    assert [children.jobs.put(item) for item in told][-1] == news
    assert only_job(children).complete == complete


def test_a_namesake_s_children_are_not_ours() -> None:
    children = Children()
    children.jobs.put(make_item("old", "uid of a deleted namesake", 1, **{"qlora.dev/role": "train"}))
    assert children.of(JOB).jobs == ()


def test_what_was_deleted_does_not_come_back_by_an_event_told_again() -> None:
    children = Children()
    children.jobs.put(raw_job(1))
    assert children.jobs.drop(raw_job(2)) == REF
    assert children.jobs.put(raw_job(1)) is None
    assert children.of(JOB).jobs == ()


def test_nothing_is_kept_of_what_is_gone() -> None:
    children = Children()
    children.jobs.put(raw_job(1))
    children.jobs.drop(raw_job(2))
    children.jobs.drop_missing("", set(), 3)
    assert (children.jobs._known, children.jobs._gone) == ({}, set())


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


async def test_a_list_mends_what_events_left_out() -> None:
    children = Children()
    children.jobs.put(raw_job(1))
    children.jobs.put(raw_job(1, uid="deleted"))
    children.jobs.put(raw_job(99, uid="newer than the list"))
    jobs = [raw_job(5, "Complete"), raw_job(6, uid="never told")]
    assert await KubeCluster(PagedApi(jobs, [raw_pod(7)], 10), children).refresh(()) == {REF}
    assert {child.name: child.complete for child in children.of(JOB).jobs} == {
        "job": True, "never told": False, "newer than the list": False,
    }  # fmt: skip
    assert len(next(child for child in children.of(JOB).jobs if child.name == "job").pods) == 1


async def test_a_list_that_tells_nothing_new_makes_no_work() -> None:
    children = Children()
    cluster = KubeCluster(PagedApi([raw_job(1)], [raw_pod(1)], 10), children)
    assert await cluster.refresh(()) == {REF}
    assert await cluster.refresh(()) == set()


async def test_the_list_of_one_namespace_says_nothing_of_another() -> None:
    children = Children()
    children.jobs.put(raw_job(1, namespace=OTHER.namespace))
    children.jobs.put(raw_job(1))
    assert await KubeCluster(PagedApi([], [], 10), children).refresh([REF.namespace]) == {REF}
    assert [sighting.uid for sighting in children.jobs.of(OTHER)] == ["job"]
