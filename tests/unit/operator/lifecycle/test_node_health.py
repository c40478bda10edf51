"""Which nodes new attempts avoid, for how long, and whom a failure blames."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import pytest

from qlora_api.job_ref import JobRef
from qlora_api.reasons import Domain, Reason
from qlora_api.report import UNEXPLAINED_EXIT
from qlora_api.v1alpha1 import Attempt, Checkpoint
from qlora_api.v1alpha1.status import MAX_AVOIDED_NODES
from qlora_operator.controller.node_failures import NodeFailures
from qlora_operator.lifecycle.node_health import (
    AVOIDANCE,
    avoided_nodes,
    disliked_nodes,
    find_released,
    is_blamed,
    node_failures,
)
from qlora_operator.lifecycle.quarantine import (
    LONGEST_QUARANTINE,
    QUARANTINE,
    NodeFailure,
    NodeStart,
    quarantine_ends,
)
from tests.make import NOW

BLAMED: Final = {
    Reason.ACCELERATOR_MISSING,
    Reason.ACCELERATOR_FAILED,
    Reason.HEARTBEAT_LOST,
    Reason.COLLECTIVE_TIMEOUT,
    Reason.POD_REJECTED,
    Reason.IMAGE_PULL_FAILED,
    Reason.STARTUP_DEADLINE_EXCEEDED,
}

BLAMED_BY_NODE: Final = (Reason.ACCELERATOR_FAILED, Reason.POD_REJECTED, Reason.STARTUP_DEADLINE_EXCEEDED)
"""A reason for each of three nodes."""


def failed(reason: Reason = Reason.ACCELERATOR_FAILED, node: str = "gpu-1", **change: Any) -> Attempt:
    return Attempt.model_validate(
        {"number": 1, "job": "bot-1", "reason": reason, "node": node, "finished_at": NOW, **change}
    )


def failure(
    run: str, node: str = "gpu-1", at: datetime = NOW, reason: Reason = Reason.POD_REJECTED, namespace: str = ""
) -> NodeFailure:
    """A failure of a run in a namespace of its own, unless another one is given."""
    return NodeFailure(JobRef(namespace or f"team-{run}", run), node, at, reason)


def quarantined_nodes(
    failures: Sequence[NodeFailure], now: datetime, starts: Sequence[NodeStart] = (), nodes: int = 8
) -> dict[str, datetime]:
    """The nodes that are quarantined in a cluster where pods started on so many other nodes hours ago."""
    others = [NodeStart(f"node-{number}", now - 3 * QUARANTINE) for number in range(nodes)]
    ends = quarantine_ends(failures, now, [*starts, *others])
    return {node: end for node, end in ends.items() if now < end}


@pytest.mark.parametrize("reason", Reason)
def test_reason_blames_node(reason: Reason) -> None:
    assert is_blamed(failed(reason)) == (reason in BLAMED)


@pytest.mark.parametrize("reason", [Reason.HEARTBEAT_LOST, Reason.COLLECTIVE_TIMEOUT])
def test_hang_is_evidence_but_the_run_may_return_to_its_node(reason: Reason) -> None:
    assert avoided_nodes((failed(reason),), {}, NOW) == {}
    assert disliked_nodes((failed(reason),)) == ("gpu-1",)


def test_attempt_without_node_or_of_another_domain_blames_none() -> None:
    assert not is_blamed(failed(node=""))
    assert not is_blamed(failed(Reason.STARTUP_DEADLINE_EXCEEDED, domain=Domain.RUN))
    assert not is_blamed(failed(Reason.INTERRUPTED, domain=Domain.NODE))


def test_node_of_two_runs_is_quarantined_until_an_hour_after_the_last() -> None:
    failures = [failure("a"), failure("b", at=NOW + timedelta(minutes=20))]
    until = NOW + timedelta(minutes=20) + QUARANTINE
    assert quarantined_nodes(failures, NOW + timedelta(minutes=30)) == {"gpu-1": until}
    assert quarantined_nodes(failures, until - timedelta(seconds=1)) == {"gpu-1": until}
    assert quarantined_nodes(failures, until) == {}
    again = [*failures, failure("b", at=until)]
    assert quarantined_nodes(again, until) == {}, "it is tried again, and one run alone does not bring it back"


@pytest.mark.parametrize(
    "failures",
    [
        pytest.param([failure("a"), failure("a")], id="one-run-twice"),
        pytest.param([failure("a"), failure("b", "gpu-2")], id="two-nodes"),
        pytest.param([failure("a", at=NOW - timedelta(minutes=61)), failure("b")], id="not-within-an-hour"),
        pytest.param([failure(run, f"gpu-{n}") for run in "ab" for n in range(3)], id="runs-that-fail-everywhere"),
        pytest.param([failure(f"{r}{n}", f"gpu-{n}") for r in "ab" for n in range(4)], id="nodes-that-fail-alike"),
        pytest.param([], id="none"),
    ],
)
def test_node_is_not_quarantined(failures: list[NodeFailure]) -> None:
    assert quarantined_nodes(failures, NOW) == {}


def test_three_bad_nodes_are_quarantined_at_once() -> None:
    failures = [failure(f"{run}{node}", f"gpu-{node}") for run in "ab" for node in range(3)]
    other = [failure(run, "gpu-9", reason=Reason.ACCELERATOR_FAILED) for run in "cd"]
    assert list(quarantined_nodes([*failures, *other], NOW)) == ["gpu-0", "gpu-1", "gpu-2", "gpu-9"]


@pytest.mark.parametrize(("healthy", "expected"), [(4, 0), (5, 5), (40, 5)])
def test_nodes_that_fail_alike_are_quarantined_if_most_nodes_start_pods(healthy: int, expected: int) -> None:
    failures = [failure(f"{run}{node}", f"gpu-{node}") for run in "ab" for node in range(5)]
    starts = [NodeStart(f"well-{node}", NOW - timedelta(minutes=30)) for node in range(healthy)]
    assert len(quarantined_nodes(failures, NOW, starts)) == expected
    earlier = [start._replace(at=NOW - 2 * QUARANTINE) for start in starts]
    assert quarantined_nodes(failures, NOW, earlier) == {}, "they may have failed since"


def test_run_that_got_further_elsewhere_is_evidence_whatever_number_of_nodes_failed_it() -> None:
    """Among many bad nodes every run meets several of them."""
    failures = [
        failure(run, f"gpu-{node}", reason=reason) for run in "ab" for node, reason in enumerate(BLAMED_BY_NODE)
    ]
    assert quarantined_nodes(failures, NOW) == {}, "it may be the runs"
    recovered = [failure._replace(recovered=True) for failure in failures]
    assert list(quarantined_nodes(recovered, NOW)) == ["gpu-0", "gpu-1", "gpu-2"]


@pytest.mark.parametrize(
    ("steps", "last", "checkpoint", "expected"),
    [
        pytest.param((None, None), Reason.INTERRUPTED, None, [False], id="no-checkpoint"),
        pytest.param((None, 50), Reason.INTERRUPTED, None, [True], id="checkpoint-of-the-next-attempt"),
        pytest.param((50, 50), Reason.INTERRUPTED, 50, [False], id="no-further-checkpoint"),
        pytest.param((50, 50), None, 60, [True], id="checkpoint-while-it-runs"),
        pytest.param((None, None), Reason.PUBLISHED, None, [True], id="published"),
    ],
)
def test_run_has_recovered_once_it_got_further(
    steps: tuple[int | None, int | None], last: Reason | None, checkpoint: int | None, expected: list[bool]
) -> None:
    first = failed(checkpoint_step=steps[0])
    second = failed(last, "gpu-2", number=2, checkpoint_step=steps[1], domain=Domain.CLUSTER)  # type: ignore[arg-type]
    newest = Checkpoint(step=checkpoint, uri="s3://a/b", time=NOW) if checkpoint else None
    found = node_failures(JobRef("ml", "a"), (first, second), newest)
    assert [failure.recovered for failure in found] == expected


def crash(run: str, node: str = "gpu-1") -> NodeFailure:
    return failure(run, node, reason=Reason.TRAINER_ERROR)._replace(recovered=True)


def test_node_on_which_three_runs_crash_is_quarantined_if_they_train_elsewhere() -> None:
    starts = [NodeStart(f"well-{node}", NOW) for node in range(3)]
    assert list(quarantined_nodes([crash(run) for run in "abc"], NOW, starts)) == ["gpu-1"]
    assert quarantined_nodes([crash(run) for run in "ab"], NOW, starts) == {}
    assert quarantined_nodes([crash(run)._replace(recovered=False) for run in "abc"], NOW, starts) == {}
    assert quarantined_nodes([crash(run) for run in "abc"], NOW, nodes=0) == {}, (
        "no other node shows that the trainer is well"
    )
    everywhere = [crash(f"{run}{node}", f"gpu-{node}") for run in "abc" for node in range(4)]
    assert quarantined_nodes(everywhere, NOW, starts) == {}


def test_error_that_the_trainer_explains_is_no_evidence_of_a_crash() -> None:
    explained = failed(Reason.TRAINER_ERROR, message="KeyError: 'text'")
    unexplained = failed(Reason.TRAINER_ERROR, message=f"pod x exited with code 139 and {UNEXPLAINED_EXIT}")
    assert node_failures(JobRef("ml", "a"), (explained,)) == ()
    assert node_failures(JobRef("ml", "a"), (unexplained,)) != ()
    assert not is_blamed(unexplained), "no metric counts it"


def test_node_that_fails_again_after_its_quarantine_is_not_used_for_twice_as_long() -> None:
    first = [failure("a"), failure("b")]
    until = NOW + QUARANTINE
    relapse = failure("c", at=until + timedelta(minutes=1))
    assert quarantined_nodes([*first, relapse], relapse.at) == {"gpu-1": relapse.at + 2 * QUARANTINE}
    late = failure("c", at=until + QUARANTINE + timedelta(minutes=1))
    assert quarantined_nodes([*first, late], late.at) == {}, "it has been well for as long"
    assert quarantine_ends([*first, late], late.at, [NodeStart("gpu-2", NOW)]) == {"gpu-1": until}
    at, failures = until, list(first)
    for number in range(4):
        failures.append(failure(f"run-{number}", at=at))
        at = quarantined_nodes(failures, at)["gpu-1"]
    assert at - failures[-1].at == LONGEST_QUARANTINE


@pytest.mark.parametrize("reason", [Reason.NODE_LOST, Reason.INTERRUPTED])
def test_run_prefers_other_nodes_to_one_that_went_down(reason: Reason) -> None:
    assert disliked_nodes((failed(reason, domain=Domain.CLUSTER),)) == ("gpu-1",)
    assert avoided_nodes((failed(reason, domain=Domain.CLUSTER),), {}, NOW) == {}


def test_run_avoids_its_node_for_a_while() -> None:
    attempts = (failed(), failed(Reason.TRAINER_ERROR, "gpu-2", number=2))
    assert avoided_nodes(attempts, {}, NOW) == {"gpu-1": NOW + AVOIDANCE}
    assert avoided_nodes(attempts, {}, NOW + AVOIDANCE) == {}
    assert disliked_nodes(attempts) == ("gpu-1", "gpu-2")


def test_quarantine_outlasts_avoidance() -> None:
    until = NOW + timedelta(minutes=50)
    assert avoided_nodes((failed(),), {"gpu-1": until, "gpu-9": until}, NOW) == {"gpu-1": until, "gpu-9": until}


def test_avoided_nodes_are_bounded_and_the_newest() -> None:
    quarantined = {f"gpu-{n:02}": NOW + timedelta(minutes=n + 1) for n in range(40)}
    assert list(avoided_nodes((), quarantined, NOW)) == [f"gpu-{n}" for n in range(40 - MAX_AVOIDED_NODES, 40)]


def test_released_nodes_are_those_no_longer_avoided() -> None:
    attempt = failed(avoided_nodes=("gpu-1", "gpu-2"))
    assert find_released(attempt, {"gpu-2": NOW}) == ("gpu-1",)
    assert find_released(failed(), {}) == ()


def test_store_forgets_old_failures() -> None:
    store = NodeFailures()
    for run in ("a", "b", "d"):
        store.update(JobRef("ml", run), (failed(),))
    store.update(JobRef("ml", "c"), (Attempt(number=1, job="c-1", node="gpu-2", started_at=NOW),))
    assert store.quarantined(NOW) == {"gpu-1": NOW + QUARANTINE}
    store.update(JobRef("ml", "a"), ())
    assert store.quarantined(NOW) == {"gpu-1": NOW + QUARANTINE}, "a QLoRAJob made again does not clear its node"
    assert store.quarantined(NOW + QUARANTINE) == {}
    assert store.quarantined(NOW + 2 * LONGEST_QUARANTINE) == {}
    assert store.quarantined(NOW) == {}


@pytest.mark.parametrize(
    "reason", [Reason.STARTUP_DEADLINE_EXCEEDED, Reason.POD_REJECTED, Reason.IMAGE_PULL_FAILED, Reason.HEARTBEAT_LOST]
)
@pytest.mark.parametrize("runs", [2, 5])
def test_fault_of_one_namespace_does_not_quarantine_nodes_on_which_others_start_pods(reason: Reason, runs: int) -> None:
    failures = [
        failure(f"run-{run}", node, NOW - timedelta(minutes=2 * run), reason, "ml")
        for run in range(runs)
        for node in ("gpu-1", "gpu-2")
    ]
    starts = [NodeStart(node, NOW - timedelta(minutes=30), JobRef("web", node)) for node in ("gpu-1", "gpu-2", "gpu-3")]
    assert quarantined_nodes(failures, NOW, starts) == {}
    if runs == 5:
        assert list(quarantined_nodes(failures, NOW)) == ["gpu-1", "gpu-2"], "without the others it may be the nodes"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({}, [], id="unexplained"),
        pytest.param({"recovered": True}, ["gpu-1"], id="they-got-further-elsewhere"),
        pytest.param({"hardware": True}, ["gpu-1"], id="the-kubelet-reports-the-devices"),
    ],
)
def test_two_runs_of_one_namespace_quarantine_a_node_only_if_more_speaks_against_it(
    change: dict[str, bool], expected: list[str]
) -> None:
    failures = [failure(run, namespace="ml")._replace(**change) for run in "ab"]
    assert list(quarantined_nodes(failures, NOW)) == expected


@pytest.mark.parametrize(
    ("message", "hardware"),
    [
        ("Pod was rejected: Allocate failed due to requested number of devices unavailable for nvidia.com/gpu", True),
        ("StartError: failed to create shim task: nvidia-container-cli: initialization error: driver error", True),
        ('CreateContainerError: failed to reserve container name "trainer"', False),
    ],
)
def test_rejection_for_a_failed_device_is_hardware_evidence(message: str, hardware: bool) -> None:
    rejected, written = failed(Reason.POD_REJECTED, message=message), failed(message=message)
    assert [found.hardware for found in node_failures(JobRef("ml", "a"), (rejected, written))] == [hardware, False]


@pytest.mark.parametrize(
    ("reason", "minutes", "expected"),
    [
        pytest.param(Reason.STARTUP_DEADLINE_EXCEEDED, -5, [], id="one-started-meanwhile"),
        pytest.param(Reason.STARTUP_DEADLINE_EXCEEDED, -15, ["gpu-1"], id="the-node-broke-since"),
        pytest.param(Reason.POD_REJECTED, -5, ["gpu-1"], id="refused-at-once"),
        pytest.param(Reason.POD_REJECTED, 5, [], id="one-started-later"),
        pytest.param(Reason.ACCELERATOR_FAILED, 5, ["gpu-1"], id="a-container-starts-without-its-gpu"),
    ],
)
def test_container_that_starts_on_a_node_refutes_that_it_starts_none(
    reason: Reason, minutes: int, expected: list[str]
) -> None:
    failures = [failure(run, reason=reason) for run in "ab"]
    start = NodeStart("gpu-1", NOW + timedelta(minutes=minutes), JobRef("web", "c"))
    assert list(quarantined_nodes(failures, NOW + timedelta(minutes=10), [start])) == expected


@pytest.mark.parametrize(("nodes", "most"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_at_most_half_of_the_nodes_are_quarantined(nodes: int, most: int) -> None:
    failures = [
        failure(f"{run}{node}", f"gpu-{node}", reason=BLAMED_BY_NODE[node % 3]) for node in range(nodes) for run in "ab"
    ]
    assert len(quarantined_nodes(failures, NOW, nodes=0)) == most


def test_registry_that_is_away_quarantines_no_node_of_a_small_cluster() -> None:
    """Every image that is not on the nodes yet fails there, whoever pulls it."""
    failures = [failure(f"{run}{node}", node, reason=Reason.IMAGE_PULL_FAILED) for run in "abc" for node in ("x", "y")]
    assert quarantined_nodes(failures, NOW, nodes=0) == {}
