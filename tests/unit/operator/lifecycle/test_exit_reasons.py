"""The exit-cause table."""

from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_api.names import Role
from qlora_api.reasons import Domain, Reason
from qlora_operator.lifecycle import classify
from qlora_operator.lifecycle.exit_reasons import NODE_GRACE_PERIOD
from qlora_operator.models import ChildJob, Exit, JobFailure, Stage, Waiting
from tests.make import (
    NOW,
    PREPARED_MESSAGE,
    PUBLISHED_MESSAGE,
    make_child,
    make_exit,
    make_pending_pod,
    make_pod,
    make_termination_message,
)

STARTUP: Final = timedelta(minutes=30)
LONG_AGO: Final = NOW - STARTUP
CUT: Final = make_exit(0, PREPARED_MESSAGE[:300])
FAILED: Final = JobFailure("BackoffLimitExceeded", "Job has reached the specified backoff limit")


def ended_child(end: Exit, **pod: Any) -> ChildJob:
    return make_child(pod=make_pod(phase="Failed", exit=end, **pod), failure=FAILED)


@pytest.mark.parametrize(
    ("child", "reason", "said"),
    [
        pytest.param(ended_child(make_exit(0, PUBLISHED_MESSAGE)), Reason.PUBLISHED, "", id="published"),
        pytest.param(ended_child(make_exit(0, PREPARED_MESSAGE)), Reason.PREPARED, "", id="prepared"),
        pytest.param(
            ended_child(make_exit(3, make_termination_message(Reason.DATASET_INVALID, "row 7"))),
            Reason.DATASET_INVALID,
            "row 7",
            id="termination-message",
        ),
        pytest.param(
            ended_child(make_exit(3, f"log\nlog\n{make_termination_message(Reason.S3_DENIED, 'no')}\n")),
            Reason.S3_DENIED,
            "no",
            id="termination-message-in-log",
        ),
        pytest.param(
            ended_child(make_exit(143, PUBLISHED_MESSAGE)), Reason.PUBLISHED, "", id="stopped-after-the-publication"
        ),
        pytest.param(
            ended_child(make_exit(0, "")),
            Reason.TRAINER_ERROR,
            "exited with code 0 and wrote no termination message",
            id="exit-0-without-message",
        ),
        pytest.param(
            ended_child(make_exit(137, "", "OOMKilled")),
            Reason.HOST_OUT_OF_MEMORY,
            "exceeded its memory limit (spec.resources.memory)",
            id="oom",
        ),
        pytest.param(
            make_child(
                Role.PREPARE, pod=make_pod(phase="Failed", exit=make_exit(137, "", "OOMKilled")), failure=FAILED
            ),
            Reason.HOST_OUT_OF_MEMORY,
            "exceeded its memory limit (4Gi; a QLoRAClass can set resources.prepare.memory)",
            id="oom-of-prepare",
        ),
        pytest.param(
            make_child(
                Role.PREPARE,
                pod=make_pod(phase="Failed", exit=make_exit(137, "", "OOMKilled")),
                failure=FAILED,
                used_class="team-a",
            ),
            Reason.HOST_OUT_OF_MEMORY,
            "exceeded its memory limit (4Gi, or resources.prepare.memory of QLoRAClass team-a)",
            id="oom-of-prepare-with-class",
        ),
        pytest.param(
            make_child(
                Role.PREPARE, pod=None, failure=JobFailure("DeadlineExceeded", "too long"), deadline_exceeded=True
            ),
            Reason.DEADLINE_EXCEEDED,
            "exceeded its deadline of 3600 seconds (fixed for a prepare pod)",
            id="deadline-of-prepare",
        ),
        pytest.param(
            ended_child(
                make_exit(1, make_termination_message(Reason.TRAINER_ERROR, "DataLoader worker is killed"), "OOMKilled")
            ),
            Reason.HOST_OUT_OF_MEMORY,
            "(spec.resources.memory); one of its processes ended with TrainerError: DataLoader worker is killed",
            id="oom-of-a-data-loader",
        ),
        pytest.param(
            ended_child(make_exit(1, make_termination_message(Reason.COLLECTIVE_TIMEOUT, "rank 1"), "OOMKilled")),
            Reason.HOST_OUT_OF_MEMORY,
            "CollectiveTimeout: rank 1",
            id="oom-of-another-process",
        ),
        pytest.param(
            ended_child(make_exit(0, PUBLISHED_MESSAGE, "OOMKilled")), Reason.PUBLISHED, "", id="oom-after-publication"
        ),
        pytest.param(
            make_child(Role.PREPARE, pod=make_pod(phase="Succeeded", exit=CUT, containers=6), complete=True),
            Reason.POD_REJECTED,
            "was cut after 300 bytes: the kubelet keeps 12288 bytes for all containers of a pod, and this one has 6; "
            "let nothing add",
            id="prepared-and-cut",
        ),
        pytest.param(
            ended_child(make_exit(3, make_termination_message(Reason.DATASET_INVALID, "row 7: " + "x" * 900)[:200])),
            Reason.DATASET_INVALID,
            "row 7: xxx",
            id="failed-and-cut",
        ),
        pytest.param(
            ended_child(make_exit(143)), Reason.INTERRUPTED, "stopped by SIGTERM (exit code 143)", id="sigterm"
        ),
        pytest.param(
            ended_child(
                make_exit(1), disruption_message="preempting to accommodate", disruption_reason="PreemptionByScheduler"
            ),
            Reason.PREEMPTED,
            "preempting",
            id="preempted",
        ),
        pytest.param(
            ended_child(
                make_exit(143, make_termination_message(Reason.INTERRUPTED, "asked to stop")),
                disruption_reason="EvictionByEvictionAPI",
            ),
            Reason.INTERRUPTED,
            "EvictionByEvictionAPI",
            id="drained",
        ),
        pytest.param(
            ended_child(
                make_exit(143, make_termination_message(Reason.INTERRUPTED, "stop")),
                disruption_reason="PreemptionByScheduler",
            ),
            Reason.PREEMPTED,
            "node-1",
            id="preempted-with-message",
        ),
        pytest.param(
            ended_child(
                make_exit(1, make_termination_message(Reason.S3_DENIED, "no")),
                disruption_reason="PreemptionByScheduler",
            ),
            Reason.S3_DENIED,
            "no",
            id="failed-before-it-was-preempted",
        ),
        pytest.param(
            ended_child(
                make_exit(137),
                disruption_reason="TerminationByKubelet",
                reason="Evicted",
                message="low on ephemeral-storage",
            ),
            Reason.EVICTED,
            "low on ephemeral-storage",
            id="evicted",
        ),
        pytest.param(
            make_child(pod=make_pod(phase="Failed", reason="Evicted", message="low on memory", started_at=None)),
            Reason.EVICTED,
            "low on memory",
            id="evicted-before-it-ran",
        ),
        pytest.param(
            make_child(pod=make_pod(deleting=True, deletion_timestamp=NOW - NODE_GRACE_PERIOD)),
            Reason.NODE_LOST,
            "node node-1 does not respond",
            id="node-does-not-answer",
        ),
        pytest.param(
            ended_child(make_exit(137), deleting=True),
            Reason.INTERRUPTED,
            "deleted (exit code 137)",
            id="grace-ran-out",
        ),
        pytest.param(
            ended_child(make_exit(137)), Reason.INTERRUPTED, "killed by SIGKILL (exit code 137)", id="killed-by-whom"
        ),
        pytest.param(
            ended_child(make_exit(137, "", "ContainerStatusUnknown")), Reason.NODE_LOST, "node-1", id="node-lost"
        ),
        pytest.param(ended_child(make_exit(255, "", "Unknown")), Reason.NODE_LOST, "node-1", id="node-rebooted"),
        pytest.param(
            ended_child(make_exit(128, "exec format error", "StartError")),
            Reason.POD_REJECTED,
            "exec format",
            id="no-start",
        ),
        pytest.param(
            ended_child(make_exit(1, "Traceback\nValueError: boom\n")),
            Reason.TRAINER_ERROR,
            "ValueError: boom",
            id="crash",
        ),
        pytest.param(
            make_child(pod=make_pending_pod(phase="Failed", reason="OutOfcpu", message="Node has no cpu left")),
            Reason.POD_REJECTED,
            "no cpu left",
            id="kubelet-refuses",
        ),
        pytest.param(
            make_child(pod=None, failure=JobFailure("DeadlineExceeded", "too long"), deadline_exceeded=True),
            Reason.DEADLINE_EXCEEDED,
            "exceeded its deadline (what was left of spec.deadlines.total)",
            id="deadline",
        ),
        pytest.param(
            make_child(pod=make_pod(exit=make_exit(143)), deadline_exceeded=True),
            Reason.DEADLINE_EXCEEDED,
            "exceeded its deadline (what was left of spec.deadlines.total)",
            id="deadline-while-the-pod-ends",
        ),
        pytest.param(
            make_child(
                pod=make_pod(
                    phase="Pending", started_at=None, scheduled_at=LONG_AGO, waiting=Waiting("ImagePullBackOff")
                )
            ),
            Reason.IMAGE_PULL_FAILED,
            "ImagePullBackOff",
            id="image",
        ),
        pytest.param(
            make_child(
                pod=make_pod(
                    phase="Pending",
                    started_at=None,
                    scheduled_at=LONG_AGO,
                    waiting=Waiting("CreateContainerConfigError", "configmap missing"),
                )
            ),
            Reason.STARTUP_DEADLINE_EXCEEDED,
            "configmap missing",
            id="startup",
        ),
    ],
)
def test_exit_maps_to_reason(child: ChildJob, reason: Reason, said: str) -> None:
    state = classify(child, STARTUP, NOW)
    assert (state.stage, state.reason) == (Stage.ENDED, reason)
    assert said in state.message


@pytest.mark.parametrize(
    ("child", "stage", "reason"),
    [
        pytest.param(make_child(pod=None), Stage.WAITING, Reason.SCHEDULING, id="no-pod-yet"),
        pytest.param(make_child(Role.PREPARE, pod=None), Stage.WAITING, Reason.PREPARING, id="no-prepare-pod-yet"),
        pytest.param(
            make_child(pod=None, created_at=LONG_AGO), Stage.WAITING, Reason.SCHEDULING, id="pod-is-never-created"
        ),
        pytest.param(
            make_child(pod=None, created_at=LONG_AGO, event_message="exceeded quota: gpus"),
            Stage.WAITING,
            Reason.POD_REJECTED,
            id="pod-is-refused",
        ),
        pytest.param(make_child(pod=make_pending_pod()), Stage.WAITING, Reason.SCHEDULING, id="pending"),
        pytest.param(
            make_child(pod=make_pending_pod(unschedulable="0/3 nodes are available"), created_at=LONG_AGO),
            Stage.WAITING,
            Reason.UNSCHEDULABLE,
            id="unschedulable-is-no-failure",
        ),
        pytest.param(
            make_child(pod=make_pod(phase="Pending", started_at=None, waiting=Waiting("ErrImagePull"))),
            Stage.WAITING,
            Reason.IMAGE_PULL_FAILED,
            id="image-may-still-come",
        ),
        pytest.param(make_child(), Stage.RUNNING, Reason.TRAINING, id="running"),
        pytest.param(make_child(pod=None, suspended=True), Stage.WAITING, Reason.QUEUED, id="queued"),
        pytest.param(
            make_child(pod=make_pod(phase="Failed", exit=make_exit(143)), suspended=True),
            Stage.WAITING,
            Reason.QUEUED,
            id="taken-back-by-its-queue",
        ),
        pytest.param(
            make_child(pod=make_pod(deleting=True, deletion_timestamp=NOW)),
            Stage.RUNNING,
            Reason.TRAINING,
            id="still-ending",
        ),
        pytest.param(make_child(pod=None, failure=FAILED), Stage.LOST, Reason.POD_LOST, id="failed-and-gone"),
        pytest.param(make_child(pod=None, complete=True), Stage.LOST, Reason.POD_LOST, id="complete-and-gone"),
    ],
)
def test_running_pod_maps_to_state(child: ChildJob, stage: Stage, reason: Reason) -> None:
    state = classify(child, STARTUP, NOW)
    assert (state.stage, state.reason) == (stage, reason)


def test_startup_ends_at_deadline() -> None:
    child = make_child(pod=make_pod(phase="Pending", started_at=None))
    assert classify(child, STARTUP, NOW).requeue_at == NOW + timedelta(minutes=25)


def test_publication_whose_details_were_cut_is_looked_for() -> None:
    state = classify(ended_child(make_exit(0, PUBLISHED_MESSAGE[:60])), STARTUP, NOW)
    assert (state.stage, state.reason) == (Stage.LOST, Reason.POD_LOST)
    assert "was cut after 60 bytes" in state.message


OWN_DISK_LIMITS: Final = (
    "Pod ephemeral local storage usage exceeds the total limit of containers 64Mi. ",
    'Container trainer exceeded its local ephemeral storage limit "64Mi". ',
)


@pytest.mark.parametrize("message", OWN_DISK_LIMITS)
@pytest.mark.parametrize("started", [True, False])
def test_pod_that_exceeds_its_own_disk_limit_blames_no_node(message: str, started: bool) -> None:
    evicted = {"reason": "Evicted", "message": message, "disruption_reason": "TerminationByKubelet"}
    pod = make_pod(phase="Failed", exit=make_exit(137) if started else None, **evicted)
    training, prepare = (classify(make_child(role, pod=pod), STARTUP, NOW) for role in (Role.TRAIN, Role.PREPARE))
    assert (training.reason, training.domain) == (prepare.reason, prepare.domain) == (Reason.EVICTED, Domain.RUN)
    assert training.message.endswith(
        "raise the limit of ephemeral-storage in the namespace's LimitRange, or in the policy that sets it"
    )
    assert "raise resources.prepare.ephemeralStorage of a QLoRAClass" in prepare.message


def test_pod_that_fills_a_volume_names_what_its_limit_follows_from() -> None:
    evicted = {"reason": "Evicted", "message": 'Usage of EmptyDir volume "work" exceeds the limit "64Gi". '}
    state = classify(make_child(pod=make_pod(phase="Failed", exit=make_exit(137), **evicted)), STARTUP, NOW)
    assert state.domain is Domain.RUN
    assert "lower spec.dataset.maxSamples" in state.message
