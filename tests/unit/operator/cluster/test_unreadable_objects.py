"""Objects that cannot be read: each is skipped alone, with one warning, and all others are read as before."""

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_api.accelerators import NVIDIA
from qlora_api.v1alpha1 import ResourcesSpec
from qlora_operator.cluster.cache import ChildCache
from qlora_operator.cluster.http import Api
from qlora_operator.cluster.interface import PodIdentity
from qlora_operator.cluster.kube_cluster import KubeCluster
from qlora_operator.cluster.parse import parse_observation
from qlora_operator.cluster.tolerant import _warn_once
from qlora_operator.models import RawJob
from qlora_planner.gpu_inventory import read_gpu_inventory
from tests.make import NOW, REF, UID, make_manifest

Json = dict[str, Any]
JOB = RawJob(REF, UID, 1, "1", NOW, deleting=False, spec={}, status={})
BORN = "2026-03-01T12:00:00Z"


def make_child(attempt: int = 1, uid: str = "job-uid", name: str = "", owner: str = UID) -> Json:
    """Return a training Job with everything that is read of it."""
    return {
        "metadata": {
            "name": name or f"{REF.name}-{attempt}", "namespace": REF.namespace, "uid": uid, "resourceVersion": "5",
            "creationTimestamp": BORN,
            "labels": {
                "app.kubernetes.io/managed-by": "qlora-operator", "qlora.dev/job": REF.name,
                "qlora.dev/role": "train", "qlora.dev/attempt": str(attempt),
            },
            "ownerReferences": [{"kind": "QLoRAJob", "name": REF.name, "uid": owner, "controller": True}],
        },
        "spec": {"activeDeadlineSeconds": 60, "suspend": False, "completions": 1},
        "status": {
            "startTime": BORN,
            "conditions": [{
                "type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "m",
                "lastTransitionTime": BORN,
            }],
        },
    }  # fmt: skip


def make_pod(job_uid: str = "job-uid", uid: str = "pod-uid") -> Json:
    """Return an ended pod with everything that is read of it."""
    ended = {"exitCode": 1, "reason": "Error", "message": "m", "startedAt": BORN, "finishedAt": BORN}
    return {
        "metadata": {
            "name": uid, "namespace": REF.namespace, "uid": uid, "resourceVersion": "6", "creationTimestamp": BORN,
            "deletionTimestamp": BORN, "labels": {"qlora.dev/job": REF.name},
            "annotations": {"batch.kubernetes.io/job-completion-index": "0"},
            "ownerReferences": [{"kind": "Job", "name": f"{REF.name}-1", "uid": job_uid, "controller": True}],
        },
        "spec": {"nodeName": "n"},
        "status": {
            "phase": "Failed", "reason": "Evicted", "message": "m",
            "conditions": [
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": BORN},
                {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "m"},
            ],
            "containerStatuses": [{"name": "trainer", "state": {"terminated": ended}}],
        },
    }  # fmt: skip


def make_job_item(name: str = REF.name) -> Json:
    manifest = make_manifest(name)
    metadata = {"uid": f"uid-{name}", "generation": 1, "resourceVersion": "7", "creationTimestamp": BORN}
    return {**manifest, "metadata": {**manifest["metadata"], **metadata}, "status": {"phase": "Training"}}


NODE: Json = {
    "metadata": {
        "name": "n", "uid": "n",
        "labels": {
            "nvidia.com/gpu.product": "NVIDIA-A10", "nvidia.com/gpu.memory": "23028", "nvidia.com/gpu.replicas": "1",
            "nvidia.com/gpu.compute.major": "8", "nvidia.com/gpu.compute.minor": "6",
        },
    },
    "spec": {"taints": [{"key": "team", "value": "b", "effect": "PreferNoSchedule"}]},
    "status": {"allocatable": {"cpu": "8", "nvidia.com/gpu": "1"}},
}  # fmt: skip
REVIEW: Json = {
    "status": {
        "authenticated": True,
        "audiences": ["qlora-operator"],
        "user": {
            "username": "system:serviceaccount:ml:default",
            "extra": {
                "authentication.kubernetes.io/pod-name": ["p"],
                "authentication.kubernetes.io/pod-uid": ["u"],
            },
        },
    }
}


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field and list entry."""
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*prefix, key)
        yield from paths_of(inner, (*prefix, key))


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [
            "debug", "two", "first", "-1", "abc", "9" * 5000, "²", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z",
            "2026-03-01T12:00:00", "+infinity", "\ud800", "1e400Gi",
        ]
    ),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
"""What may stand in any field."""


ON_ANY_MACHINE = settings(suppress_health_check=[HealthCheck.too_slow])


@st.composite
def mutated(draw: st.DrawFn, item: Json) -> Json:
    """Draw an object with up to three fields removed or replaced."""
    changed = copy.deepcopy(item)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(paths_of(changed))
        if not paths:
            break
        *parents, last = draw(st.sampled_from(paths))
        parent = changed
        for key in parents:
            parent = parent[key]
        if draw(st.booleans()):
            del parent[last]
        else:
            parent[last] = draw(ODD_VALUES)
    return changed


class Answers(Api):
    """Answers every list and every read with the same objects."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    async def request(self, method: str, *_: Any, **__: Any) -> Json:
        if method == "POST":
            return dict(self.items[0])
        return {"metadata": {"resourceVersion": "9"}, "items": self.items}


def assert_well_typed(children: Any) -> None:
    """Check what the rest of the operator relies on."""
    for child in children.jobs:
        assert isinstance(child.name, str)
        assert isinstance(child.attempt, int)
        assert child.created_at.tzinfo is not None
        for pod in child.pods:
            assert isinstance(pod.phase, str)
            assert pod.created_at is not None
            assert pod.created_at.tzinfo is not None


@ON_ANY_MACHINE
@given(job=mutated(make_child(2, "odd-job")), pod=mutated(make_pod("odd-job", "odd-pod")))
def test_mutated_children_hide_no_other_child(job: Json, pod: Json) -> None:
    good = parse_observation(JOB, [make_child()], [make_pod()]).jobs
    live = parse_observation(JOB, [job, make_child()], [pod, make_pod()])
    cache = ChildCache()
    for item in (job, make_child()):
        cache.jobs.update(item)
    for item in (pod, make_pod()):
        cache.pods.update(item)
    cached = cache.children_of(JOB)
    assert_well_typed(live)
    assert_well_typed(cached)
    assert good[0] in live.jobs
    assert good[0] in cached.jobs
    cache.jobs.delete(job)
    cache.pods.delete(pod)
    cache.jobs.replace("", {"job-uid"}, 9)
    assert cache.children_of(JOB).jobs == good


@ON_ANY_MACHINE
@given(item=mutated(make_job_item("odd")))
async def test_mutated_qlorajob_hides_no_other_qlorajob(item: Json) -> None:
    api = Answers([item, make_job_item()])
    assert REF in [job.ref for job in await KubeCluster(api, ChildCache()).list_jobs(())]


@ON_ANY_MACHINE
@given(job=mutated(make_child(2, "odd-job")), pod=mutated(make_pod("odd-job", "odd-pod")))
async def test_mutated_children_do_not_end_a_relist(job: Json, pod: Json) -> None:
    cache, api = ChildCache(), Answers([job, pod, make_child(), make_pod()])
    await KubeCluster(api, cache).relist(())
    assert f"{REF.name}-1" in [child.name for child in cache.children_of(JOB).jobs]


@ON_ANY_MACHINE
@given(node=mutated(NODE))
async def test_mutated_node_hides_no_other_node(node: Json) -> None:
    api = Answers([node, NODE])
    nodes = await KubeCluster(api, ChildCache()).find_gpu_nodes(NVIDIA)
    products = [pool.product for pool in read_gpu_inventory(nodes or (), ResourcesSpec())]
    assert "NVIDIA-A10" in products
    assert "NVIDIA-A10" in [pool.product for pool in read_gpu_inventory([node, NODE], ResourcesSpec())]


@ON_ANY_MACHINE
@given(review=mutated(REVIEW))
async def test_mutated_token_review_is_refused_or_a_pod(review: Json) -> None:
    api = Answers([review])
    identity = await KubeCluster(api, ChildCache()).review_token("t")
    assert identity is None or all(isinstance(part, str) for part in identity)


async def test_token_review_names_the_pod() -> None:
    api = Answers([REVIEW])
    assert await KubeCluster(api, ChildCache()).review_token("t") == PodIdentity("ml", "p", "u")


def labeled(**labels: str) -> Json:
    item = make_child(2, f"odd {labels}")
    item["metadata"]["labels"] |= {f"qlora.dev/{key}": value for key, value in labels.items()}
    return item


@pytest.mark.parametrize("item", [labeled(role="debug"), labeled(attempt="two"), labeled(attempt="9" * 5000)])
def test_unreadable_version_is_reported_once(item: Json, caplog: pytest.LogCaptureFixture) -> None:
    _warn_once.cache_clear()
    cache = ChildCache()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            cache.jobs.update(item)
            parse_observation(JOB, [item], [])
    [record] = caplog.records
    assert "cannot be read, and is ignored" in record.getMessage()
    assert len(record.getMessage()) < 1000
    item["metadata"]["resourceVersion"] = "99"
    cache.jobs.update(item)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(make_child(owner="another uid"), id="of-another-qlorajob"),
        pytest.param(make_child(1, "copy", name="support-bot-debug"), id="copy-with-another-name"),
        pytest.param(make_child(1, "copy", name="support-bot-01"), id="number-spelled-otherwise"),
        pytest.param({**make_child(), "metadata": {**make_child()["metadata"], "ownerReferences": []}}, id="no-owner"),
        pytest.param(
            {
                **make_child(),
                "metadata": {
                    **make_child()["metadata"],
                    "ownerReferences": [{"kind": "QLoRAJob", "name": REF.name, "uid": UID}],
                },
            },
            id="owner-is-no-controller",
        ),
    ],
)
def test_job_with_our_labels_is_no_child(item: Json) -> None:
    cache = ChildCache()
    cache.jobs.update(item)
    assert cache.children_of(JOB).jobs == ()
    assert parse_observation(JOB, [item], []).jobs == ()


@pytest.mark.parametrize(
    ("labels", "allocatable"),
    [
        pytest.param({"nvidia.com/gpu.memory": "abc"}, {"nvidia.com/gpu": "1"}, id="memory-is-text"),
        pytest.param({"nvidia.com/gpu.memory": "-5"}, {"nvidia.com/gpu": "1"}, id="memory-is-negative"),
        pytest.param({"nvidia.com/gpu.memory": "9" * 60}, {"nvidia.com/gpu": "1"}, id="memory-is-absurd"),
        pytest.param({"nvidia.com/gpu.memory": "23028"}, {"nvidia.com/gpu": "-1"}, id="count-is-negative"),
        pytest.param({"nvidia.com/gpu.memory": "23028"}, {"nvidia.com/gpu": "one"}, id="count-is-text"),
        pytest.param({"nvidia.com/gpu.memory": "23028"}, {}, id="nothing-allocatable"),
    ],
)
def test_node_with_odd_labels_is_left_out(labels: Json, allocatable: Json) -> None:
    node = {"metadata": {"name": "odd", "labels": labels}, "spec": {}, "status": {"allocatable": allocatable}}
    assert [pool.nodes for pool in read_gpu_inventory([node, NODE, {}], ResourcesSpec())] == [1]
