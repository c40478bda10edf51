"""The Events of transitions: their words, and that each transition has one."""

from datetime import timedelta
from typing import Final

import pytest

from qlora_api.names import Phase
from qlora_api.reasons import REASONS, Reason
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.resources import Owner, build_event
from qlora_operator.resources.event import EVENT_ACTIONS, MAX_NOTE_BYTES, event_type
from tests.fakes import FakeCluster
from tests.make import NOW, PREPARED_MESSAGE, PUBLISHED_MESSAGE, REF, UID, make_manifest, make_termination_message
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_until_stable, run_to_success

OWNER: Final = Owner(REF, UID)


def make_status(phase: Phase = Phase.TRAINING, reason: Reason = Reason.TRAINING, message: str = "") -> QLoRAJobStatus:
    return QLoRAJobStatus(phase=phase, reason=reason, message=message)


def events_of(cluster: FakeCluster) -> list[tuple[str, str, str]]:
    """What the Events of a QLoRAJob say, in their order."""
    return [(event["action"], event["reason"], event["type"]) for event in cluster.events.values()]


def test_event_has_all_fields() -> None:
    event = build_event(OWNER, "17", make_status(message="pod x runs on node y"), NOW)
    name = event["metadata"].pop("name")
    assert name.startswith(f"{REF.name}.")
    assert event == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": REF.namespace},
        "eventTime": NOW.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": "qlora.dev/qlora-operator",
        "reportingInstance": "qlora-operator",
        "action": "Train",
        "reason": "Training",
        "type": "Normal",
        "note": "pod x runs on node y",
        "regarding": {
            "apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "name": REF.name, "namespace": REF.namespace,
            "uid": UID,
        },
    }  # fmt: skip


def test_event_name_depends_on_transition_only() -> None:
    names = [
        build_event(OWNER, version, make_status(reason=reason), NOW + timedelta(seconds=seconds))["metadata"]["name"]
        for version, reason, seconds in [
            ("17", Reason.TRAINING, 0), ("17", Reason.TRAINING, 9), ("18", Reason.TRAINING, 9),
            ("17", Reason.EVALUATING, 9),
        ]
    ]  # fmt: skip
    assert names[0] == names[1]
    assert len(set(names)) == 3


@pytest.mark.parametrize("message", ["x" * 5000, "ü" * 2000, "🦙" * 1000])
def test_long_message_is_cut_between_characters(message: str) -> None:
    note = build_event(OWNER, "1", make_status(message=message), NOW)["note"]
    assert MAX_NOTE_BYTES - 4 < len(note.encode()) <= MAX_NOTE_BYTES
    assert message.startswith(note)


def test_long_message_is_cut_between_escapes() -> None:
    for shift in range(5):
        note = build_event(OWNER, "1", make_status(message="x" * shift + "\x1b" * 2000), NOW)["note"]
        assert note.endswith("\\x1b")


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_has_a_valid_event_action(phase: Phase) -> None:
    assert 0 < len(EVENT_ACTIONS[phase]) <= 128


@pytest.mark.parametrize("reason", Reason)
def test_event_type_is_warning_unless_reason_is_normal(reason: Reason) -> None:
    # Nothing is asked of anybody where the remedy says so, and what is done is no warning.
    nothing_to_do = REASONS[reason].remedy == "Nothing to do." or reason in {
        Reason.PUBLISHED, Reason.ALREADY_PUBLISHED, Reason.SUSPENDED_BY_USER
    }  # fmt: skip
    assert event_type(reason) == ("Normal" if nothing_to_do else "Warning")


async def test_events_of_successful_run() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    await run_to_success(cluster)
    assert events_of(cluster) == [
        ("Prepare", "Preparing", "Normal"),
        ("Schedule", "Prepared", "Normal"),
        ("Schedule", "Scheduling", "Normal"),
        ("Train", "Training", "Normal"),
        ("Succeed", "Published", "Normal"),
    ]


async def test_events_of_interrupted_and_suspended_run() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    for attempt in (1, 2):
        cluster.start_pod(TRAIN.replace("-1", f"-{attempt}"))
        await reconcile_until_stable(cluster)
        cluster.end_pod(TRAIN.replace("-1", f"-{attempt}"), 1, make_termination_message(Reason.INTERRUPTED))
        await reconcile_until_stable(cluster)
        cluster.pass_time(timedelta(seconds=10))
        await reconcile_until_stable(cluster)
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    cluster.change(suspend=False)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN.replace("-1", "-4"))
    await reconcile_until_stable(cluster)
    cluster.end_pod(TRAIN.replace("-1", "-4"), 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    interrupted = [("Train", "Training", "Normal"), ("Schedule", "Interrupted", "Warning")]
    assert events_of(cluster)[2:] == [
        ("Schedule", "Scheduling", "Normal"), *interrupted,
        ("Schedule", "Scheduling", "Normal"), *interrupted,
        ("Schedule", "Scheduling", "Normal"),
        ("Suspend", "SuspendedByUser", "Normal"),
        ("Schedule", "Scheduling", "Normal"),
        ("Train", "Training", "Normal"),
        ("Succeed", "Published", "Normal"),
    ]  # fmt: skip
