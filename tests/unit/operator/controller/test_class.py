"""QLoRAClasses in the life of a run: which one it uses, what a change or a deletion does, and what it waits for."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import Phase
from qlora_api.pod_profile import PodProfile
from qlora_api.reasons import Reason
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.lifecycle import ReconcileContext
from qlora_operator.lifecycle.class_choice import MAX_CLASS_BYTES
from qlora_operator.models import Classes, Manifest, RawClass
from tests.fakes import FakeCluster
from tests.make import INSTALLATION, NOW, PREPARED_MESSAGE, REF, make_manifest, make_termination_message
from tests.unit.operator import life
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_now, reconcile_until_stable, run_to_success

SECOND: Final = names.train_job_name("support-bot", 2)
NVIDIA: Final = {"pods": {"train": {"runtimeClassName": "nvidia"}}}
VOLCANO: Final = {"pods": {"train": {"schedulerName": "volcano"}}}


def make_class(name: str = "team-a", *, default: bool = False, age: int = 1, **spec: Any) -> RawClass:
    """Return a class that is so many hours old."""
    return RawClass(name, 1, NOW - timedelta(hours=age), default, spec)


def submit(*classes: RawClass, **spec: Any) -> FakeCluster:
    """Return a cluster with such classes and a new run."""
    cluster = FakeCluster()
    cluster.classes = Classes(classes)
    cluster.submit(make_manifest(**spec))
    return cluster


def pod_of(cluster: FakeCluster, job: str) -> Manifest:
    return cluster.children["Job", job]["spec"]["template"]["spec"]


def class_of(cluster: FakeCluster, job: str) -> str | None:
    """Return the class in the labels of a Job, which its pods have too."""
    child = cluster.children["Job", job]
    labels = child["metadata"]["labels"].get(names.CLASS_LABEL)
    assert child["spec"]["template"]["metadata"]["labels"].get(names.CLASS_LABEL) == labels
    return labels


async def prepare(cluster: FakeCluster) -> None:
    """Let preparation end, and the first training Job be created."""
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)


async def fail_attempt(cluster: FakeCluster) -> None:
    """Let the first attempt end for a cause that is retried, and the next one begin."""
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.S3_UNAVAILABLE))
    await reconcile_until_stable(cluster)
    for _ in range(10):
        cluster.pass_time(timedelta(minutes=5))
        await reconcile_until_stable(cluster)
        if ("Job", SECOND) in cluster.children:
            return
        for (kind, name), child in list(cluster.children.items()):
            if kind == "Job" and names.PREPARATION_LABEL in child["metadata"]["labels"] and name not in cluster.pods:
                cluster.end_pod(name, 0, PREPARED_MESSAGE)
    raise AssertionError("no second attempt")


async def test_named_class_sets_the_pods_and_is_recorded() -> None:
    cluster = submit(make_class(**NVIDIA), className="team-a")
    await run_to_success(cluster)
    assert (class_of(cluster, PREPARE), class_of(cluster, TRAIN)) == ("team-a", "team-a")
    assert pod_of(cluster, TRAIN)["runtimeClassName"] == "nvidia"
    assert "runtimeClassName" not in pod_of(cluster, PREPARE)
    assert cluster.status["class"] == {"name": "team-a", "generation": 1, "settings": NVIDIA}


async def test_run_without_class_has_no_label_and_no_record() -> None:
    cluster = submit(make_class(**NVIDIA))
    await run_to_success(cluster)
    assert (class_of(cluster, PREPARE), class_of(cluster, TRAIN)) == (None, None)
    assert "class" not in cluster.status


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        pytest.param((make_class("a", default=True),), "a", id="one"),
        pytest.param((make_class("a", default=True), make_class("b", default=True, age=2)), "a", id="newest"),
        pytest.param((make_class("b", default=True), make_class("a", default=True)), "a", id="as-new-by-name"),
        pytest.param(
            (make_class("a", default=True, namespaces={"names": ["other"]}), make_class("b", default=True, age=2)),
            "b",
            id="newest-of-the-namespace",
        ),
        pytest.param((make_class("a", default=True, namespaces={"names": ["other"]}),), None, id="of-others"),
        pytest.param((make_class("a", default=True, namespaces=["ml"]),), None, id="namespaces-unreadable"),
        pytest.param((make_class("a"),), None, id="no-default"),
    ],
)
async def test_run_that_names_no_class_has_the_default_of_its_namespace(
    classes: tuple[RawClass, ...], expected: str | None
) -> None:
    cluster = submit(*classes)
    await prepare(cluster)
    assert (class_of(cluster, PREPARE), class_of(cluster, TRAIN)) == (expected, expected)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        pytest.param(None, "spec.className: QLoRAClass team-a does not exist; create it", id="missing"),
        pytest.param(make_class(namespaces={"names": ["other"]}), "is not for namespace ml; add", id="other-namespace"),
        pytest.param(
            make_class(namespaces={"selector": {"matchLabels": {"team": "b"}}}), "is not for namespace ml", id="labels"
        ),
        pytest.param(make_class(speed="high"), "has spec.speed, which this operator does not know", id="unknown-field"),
        pytest.param(
            make_class(pods={"labels": {"job-name": "x"}}), "is invalid: spec.pods.labels: 'job-name' is", id="reserved"
        ),
        pytest.param(make_class(pods={"train": {"dnsPolicy": 7}}), "spec.pods.train.dnsPolicy", id="type"),
        pytest.param(make_class(pods="none"), "is invalid: spec.pods", id="not-a-mapping"),
        pytest.param(make_class(namespaces=["ml"]), "is invalid: spec.namespaces", id="namespaces"),
        pytest.param(
            make_class(pods={"annotations": {"note": "x" * 30_000, "more": "x" * 30_000, "last": "x" * 30_000}}),
            f"has more than {MAX_CLASS_BYTES // 1024} KiB",
            id="too-large",
        ),
        pytest.param(
            make_class(queue={"required": True}), "spec.queue: QLoRAClass team-a requires a queue", id="queue"
        ),
    ],
)
async def test_run_waits_for_a_class_that_cannot_be_used_and_fails_at_the_startup_deadline(
    found: RawClass | None, words: str
) -> None:
    cluster = submit(*([found] if found else []), className="team-a", deadlines={"startup": "30m"})
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == (Phase.PENDING, Reason.CLASS_NOT_READY)
    assert words in cluster.status["message"]
    assert "(spec.deadlines.startup)" in cluster.status["message"]
    assert cluster.children == {}
    for _ in range(12):
        cluster.pass_time(timedelta(minutes=4))
        await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == (Phase.FAILED, Reason.CLASS_NOT_READY)
    assert words in cluster.status["message"]
    assert cluster.children == {}


async def test_other_runs_start_beside_a_class_that_cannot_be_read() -> None:
    cluster = submit(make_class("broken", speed="high"), make_class(**NVIDIA), className="team-a")
    await prepare(cluster)
    assert class_of(cluster, TRAIN) == "team-a"


async def test_run_starts_when_its_class_appears() -> None:
    cluster = submit(className="team-a")
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=10))
    assert (await reconcile_now(cluster)).requeue_after
    cluster.classes = Classes((make_class(**NVIDIA),))
    await run_to_success(cluster)
    assert cluster.status["phase"] == Phase.SUCCEEDED
    assert class_of(cluster, TRAIN) == "team-a"
    assert cluster.status["preparation"] == {
        "number": 1, "failures": 0, "unexplained": 0, "message": "", "avoidedNodes": [],
    }  # fmt: skip


async def test_wait_for_a_class_does_not_count_the_time_without_an_operator() -> None:
    cluster = submit(className="team-a", deadlines={"startup": "30m"})
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(hours=9))
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.PENDING


async def test_suspended_run_does_not_wait_for_its_class() -> None:
    cluster = submit(className="team-a", suspend=True)
    await reconcile_until_stable(cluster)
    assert cluster.status["reason"] == Reason.SUSPENDED_BY_USER


@pytest.mark.parametrize("labels", [None, {}], ids=["forbidden", "without"])
async def test_selector_needs_the_labels_of_the_namespace(labels: dict[str, str] | None) -> None:
    cluster = submit(make_class(namespaces={"selector": {"matchLabels": {"team": "a"}}}), className="team-a")
    cluster.namespace = labels
    await reconcile_until_stable(cluster)
    assert cluster.status["reason"] == Reason.CLASS_NOT_READY
    assert ("may not read its labels" in cluster.status["message"]) is (labels is None)
    cluster.namespace = {"team": "a"}
    cluster.pass_time(timedelta(minutes=1))
    await prepare(cluster)
    assert class_of(cluster, TRAIN) == "team-a"


@pytest.mark.parametrize("operator", ["DoesNotExist", "NotIn"])
async def test_unknown_labels_match_no_selector(operator: str) -> None:
    requirement = {"key": "restricted", "operator": operator, "values": ["yes"] if operator == "NotIn" else []}
    selector = {"matchExpressions": [requirement]}
    cluster = submit(make_class(namespaces={"selector": selector}), className="team-a")
    cluster.namespace = None
    await reconcile_until_stable(cluster)
    assert cluster.status["reason"] == Reason.CLASS_NOT_READY
    assert "may not read its labels" in cluster.status["message"]


async def test_without_the_right_to_list_classes_only_runs_that_name_one_wait() -> None:
    cluster = submit(className="team-a")
    cluster.classes = Classes(unreadable="the operator has no right; bind it")
    await reconcile_until_stable(cluster)
    assert cluster.status["reason"] == Reason.CLASS_NOT_READY
    assert "cannot be read: the operator has no right; bind it" in cluster.status["message"]
    other = submit()
    other.classes = Classes(unreadable="the operator has no right; bind it")
    await run_to_success(other)
    assert other.status["phase"] == Phase.SUCCEEDED


async def test_changed_class_reaches_the_next_attempt_only() -> None:
    cluster = submit(make_class(**NVIDIA, queue={"name": "gpus"}), className="team-a")
    await prepare(cluster)
    before = dict(cluster.children)
    cluster.classes = Classes((make_class(**VOLCANO, queue={"name": "other"}),))
    await reconcile_until_stable(cluster)
    assert cluster.children == before
    assert cluster.status["class"]["settings"]["queue"] == {"name": "gpus"}
    await fail_attempt(cluster)
    assert pod_of(cluster, SECOND).get("runtimeClassName") is None
    assert pod_of(cluster, SECOND)["schedulerName"] == "volcano"
    assert cluster.status["class"]["settings"] == VOLCANO | {"queue": {"name": "other"}}


@pytest.mark.parametrize(
    "left",
    [
        pytest.param((), id="deleted"),
        pytest.param((make_class(speed="high"),), id="invalid"),
        pytest.param((make_class(**VOLCANO, namespaces={"names": ["other"]}),), id="for-other-namespaces"),
    ],
)
async def test_run_continues_with_its_recorded_class_when_that_cannot_be_used(left: tuple[RawClass, ...]) -> None:
    cluster = submit(make_class(**NVIDIA), className="team-a")
    await prepare(cluster)
    before = dict(cluster.children)
    cluster.classes = Classes(left)
    await reconcile_until_stable(cluster)
    assert cluster.children == before
    await fail_attempt(cluster)
    assert pod_of(cluster, SECOND)["runtimeClassName"] == "nvidia"
    assert class_of(cluster, SECOND) == "team-a"


@pytest.mark.parametrize(
    ("settings", "continues"),
    [
        pytest.param(NVIDIA | {"speed": "high"}, True, id="unknown-field"),
        pytest.param({"pods": {"train": {"runtimeClassName": 7}}}, False, id="other-type"),
    ],
)
async def test_record_of_another_version_is_read_as_far_as_it_goes(settings: dict[str, Any], continues: bool) -> None:
    cluster = submit(make_class(**NVIDIA), className="team-a")
    await reconcile_until_stable(cluster)
    cluster.classes = Classes()
    assert cluster.job
    cluster.job["status"]["class"]["settings"] = settings
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert (("Job", TRAIN) in cluster.children) is continues
    if not continues:
        assert cluster.status["reason"] == Reason.CLASS_NOT_READY
        assert "status.class: the settings of QLoRAClass team-a cannot be read" in cluster.status["message"]
    cluster.classes = Classes((make_class(**NVIDIA),))
    cluster.pass_time(timedelta(minutes=5))
    await reconcile_until_stable(cluster)
    assert pod_of(cluster, TRAIN)["runtimeClassName"] == "nvidia"


async def test_class_that_becomes_the_default_later_is_for_later_runs() -> None:
    cluster = submit()
    await prepare(cluster)
    cluster.classes = Classes((make_class(default=True, **NVIDIA),))
    await fail_attempt(cluster)
    assert class_of(cluster, SECOND) is None


async def test_run_keeps_its_default_class_when_another_becomes_the_default() -> None:
    cluster = submit(make_class(default=True, **NVIDIA))
    await prepare(cluster)
    cluster.classes = Classes((make_class(**NVIDIA), make_class("team-b", default=True, age=0, **VOLCANO)))
    await fail_attempt(cluster)
    assert class_of(cluster, SECOND) == "team-a"


async def test_queue_of_the_class_is_for_runs_without_one() -> None:
    spec = {"queue": {"name": "gpus", "priorityClass": "nightly"}}
    cluster, own = (
        submit(make_class(**spec), className="team-a"),
        submit(make_class(**spec), className="team-a", queue={"name": "mine"}),
    )
    for run in (cluster, own):
        await prepare(run)
    labels, own_labels = (run.children["Job", TRAIN]["metadata"]["labels"] for run in (cluster, own))
    assert (labels[names.QUEUE_LABEL], labels[names.PRIORITY_CLASS_LABEL]) == ("gpus", "nightly")
    assert own_labels[names.QUEUE_LABEL] == "mine"
    assert names.PRIORITY_CLASS_LABEL not in own_labels
    assert cluster.children["Job", TRAIN]["spec"]["suspend"] is True


async def test_run_that_lacks_a_required_queue_starts_once_it_has_one() -> None:
    cluster = submit(make_class(queue={"required": True}), className="team-a")
    await reconcile_until_stable(cluster)
    assert cluster.status["reason"] == Reason.CLASS_NOT_READY
    cluster.change(queue={"name": "gpus"})
    await prepare(cluster)
    assert cluster.children["Job", TRAIN]["metadata"]["labels"][names.QUEUE_LABEL] == "gpus"


async def test_ttl_of_the_class_deletes_the_jobs_of_a_run_without_one() -> None:
    cluster = submit(make_class(ttl="1h"), className="team-a")
    await run_to_success(cluster)
    cluster.pass_time(timedelta(minutes=50))
    await reconcile_until_stable(cluster)
    assert ("Job", TRAIN) in cluster.children
    cluster.pass_time(timedelta(minutes=20))
    await reconcile_until_stable(cluster)
    assert cluster.children == {}


async def test_own_ttl_takes_precedence_over_that_of_the_class() -> None:
    cluster = submit(make_class(ttl="1h"), className="team-a", ttl="9h")
    await run_to_success(cluster)
    cluster.pass_time(timedelta(hours=2))
    await reconcile_until_stable(cluster)
    assert ("Job", TRAIN) in cluster.children


async def test_resources_of_preparation_are_those_of_the_class() -> None:
    resources = {"prepare": {"cpu": "4", "memory": "64Gi", "ephemeralStorage": "500Gi"}}
    cluster = submit(make_class(resources=resources), className="team-a")
    await prepare(cluster)
    [container] = pod_of(cluster, PREPARE)["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "4", "memory": "64Gi", "ephemeral-storage": "500Gi"},
        "limits": {"memory": "64Gi", "ephemeral-storage": "500Gi"},
    }


async def test_class_that_contradicts_the_installation_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pods = PodProfile.model_validate({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["10.0.0.2"]}})
    monkeypatch.setattr(life, "INSTALLATION", replace(INSTALLATION, pods=pods))
    cluster = submit(make_class(pods={"dnsConfig": {"searches": ["example"]}}), className="team-a")
    await reconcile_until_stable(cluster)
    assert cluster.status["reason"] == Reason.CLASS_NOT_READY
    assert "contradicts the chart's pods: dnsPolicy None" in cluster.status["message"]


EXAMPLE: Final = [
    RawClass(found["metadata"]["name"], 1, NOW - timedelta(hours=1), "annotations" in found["metadata"], found["spec"])
    for found in yaml.safe_load_all(Path("examples/class/ten-teams.yaml").read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("team", [known.name for known in EXAMPLE if known.is_default])
async def test_each_of_ten_teams_has_its_class_without_naming_it(team: str) -> None:
    cluster = FakeCluster()
    cluster.classes = Classes(tuple(EXAMPLE))
    cluster.namespace = {"team": team}
    cluster.submit(make_manifest(namespace=team, queue={"name": "own"}))
    context = ReconcileContext(cluster.now)
    await reconcile(JobRef(team, REF.name), cluster, INSTALLATION, context)
    assert class_of(cluster, PREPARE) == team
    assert cluster.children["Job", PREPARE]["spec"]["template"]["metadata"]["labels"]["cost-center"].startswith("10")


@pytest.mark.parametrize("write", range(1, 14))
async def test_crash_after_any_write_of_a_run_with_a_class_same_outcome(write: int) -> None:
    cluster = submit(make_class(**NVIDIA, ttl="9h"), className="team-a")
    cluster.crash_after = lambda count: count == write
    await run_to_success(cluster)
    assert cluster.status["phase"] == Phase.SUCCEEDED
    assert pod_of(cluster, TRAIN)["runtimeClassName"] == "nvidia"
    assert cluster.status["class"]["name"] == "team-a"
