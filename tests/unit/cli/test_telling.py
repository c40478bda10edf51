"""`qlora logs` and `events` on what a cluster answers."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from qlora_api.names import Reason
from qlora_api.v1alpha1 import Attempt, OutputStatus
from qlora_cli import events, logs, remains
from qlora_cli.cluster import NotFoundError
from qlora_cli.pods import TrainerPod
from tests.make import DIGEST, NOW, REF
from tests.unit.cli.fake_cluster import (
    FAILED,
    SUCCEEDED,
    FakeCluster,
    FakeTime,
    Paper,
    make_event,
    make_job,
    make_pod,
    make_raw,
    make_training,
    printed,
    raws,
)


def printer() -> tuple[Paper, logs.Printer]:
    paper = Paper()
    return paper, logs.Printer(prefix=True, raw=False, console=paper.console)


def test_logs_are_those_of_all_nodes_of_the_latest_attempt(capsys: pytest.CaptureFixture[str]):
    cluster = FakeCluster(make_raw(status=make_training(1)))
    cluster.pods_found = [make_pod(2, 1), make_pod(2, 0), make_pod(1), make_pod(0), make_pod(2, 2, started=False)]
    cluster.logs = {"support-bot-2-0-abcde": ["[a] b", "c"], "support-bot-2-1-abcde": ["d"]}
    paper, out = printer()
    assert logs.print_logs(cluster, REF, logs.Choice(), {"tailLines": "2"}, out)
    assert paper.lines == ["2-0 | [a] b", "2-0 | c", "2-1 | d"]
    assert cluster.queries == [(pod, {"tailLines": "2"}) for pod in cluster.logs]
    assert capsys.readouterr().err == "2-2 has written nothing yet: its container has not started\n"


def test_a_line_of_json_is_told_with_the_process_that_wrote_it():
    line = json.dumps(
        {
            "time": "2026-03-01T12:00:07Z", "level": "info", "logger": "x", "message": "progress", "job": "support-bot",
            "rank": 3, "step": 7, "loss": 2.5,
        }
    )  # fmt: skip
    pod = TrainerPod(1, 0, "support-bot-1-0-abcde", True)
    paper, out = printer()
    for each in (line, '{"no": "message"}', "Traceback [most recent]"):
        out.show(pod, each)
    assert paper.lines == [
        "1-0/3 | 2026-03-01T12:00:07Z info    progress  step=7 loss=2.5",
        '1-0 | {"no": "message"}',
        "1-0 | Traceback [most recent]",
    ]
    as_it_is = Paper()
    logs.Printer(prefix=False, raw=True, console=as_it_is.console).show(pod, line)
    assert as_it_is.lines == [line]


@pytest.mark.parametrize(
    ("choice", "labels"),
    [
        (logs.Choice(attempt=0), ["prepare"]),
        (logs.Choice(attempt=1), ["1-0", "1-1"]),
        (logs.Choice(node=1), ["2-1"]),
        (logs.Choice(attempt=1, node=1), ["1-1"]),
        (logs.Choice(attempt=7), []),
    ],
)
def test_pods_are_chosen_by_attempt_and_node(choice: logs.Choice, labels: list[str]):
    pods = [TrainerPod(attempt, node, "", True) for attempt, node in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1))]
    assert [pod.label for pod in choice.of(pods, 2)] == labels


def test_followed_logs_go_on_with_the_next_attempt():
    cluster = FakeCluster(*raws(None, make_training(1), make_training(2), make_training(3), SUCCEEDED))
    cluster.logs = {"support-bot-1-0-abcde": ["one"], "support-bot-2-0-abcde": ["two"]}
    pods = iter([[], [make_pod(1)], [make_pod(1), make_pod(2, started=False)]])
    both = [make_pod(1), make_pod(2)]
    cluster.pods = lambda _: next(pods, both)  # type: ignore[method-assign]
    paper, out = printer()
    assert logs.follow_logs(cluster, REF, logs.Choice(), {}, out, FakeTime().clock)
    assert paper.lines == ["1-0 | one", "2-0 | two"]
    assert all(query == {"follow": "true"} for _, query in cluster.queries)


def test_when_the_pods_are_gone_the_last_words_remain(capsys: pytest.CaptureFixture[str]):
    attempt = Attempt(number=1, job="support-bot-1", reason=Reason.LOSS_DIVERGED, message="loss 80", node="node-1")
    paper = Paper()
    remains.show_remains(make_job(change_status(FAILED, attempts=(attempt,))), None, None, paper.console)
    assert paper.lines[0].startswith("the pods of support-bot are gone, and their logs with them: spec.ttl removes")
    assert capsys.readouterr().out == "attempt 1 on node-1: LossDiverged  loss 80\n"


def test_stacks_of_a_hang_are_read_from_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "hangs").mkdir()
    for name in ("attempt-1-rank-0.txt", "attempt-2-rank-0.txt"):
        (tmp_path / "hangs" / name).write_text(f"File {name}\n")
    attempt = Attempt(number=2, job="support-bot-2", reason=Reason.HEARTBEAT_LOST, message="the stacks are in …")
    output = OutputStatus(digest=DIGEST, prefix=tmp_path.as_uri())
    job = make_job(change_status(FAILED, attempts=(attempt,), output=output))
    remains.show_remains(job, 2, None, Paper().console)
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{tmp_path.as_uri()}/hangs/attempt-2-rank-0.txt", "File attempt-2-rank-0.txt", "",
    ]  # fmt: skip


def change_status(found: Any, **facts: Any) -> Any:
    return found.model_copy(update=facts)


@pytest.mark.parametrize(
    ("subject", "ours"),
    [
        ("QLoRAJob a", True), ("QLoRAJob a-1", False), ("Job a-1", True), ("Job a-prepare", True), ("Job a-1-1", False),
        ("Pod a-1-0-x2v4z", True), ("Pod a-prepare-0-x2v4z", True), ("Pod a-1-1-0-x2v4z", False), ("Job a-0", False),
        ("Pod b-1-0-x2v4z", False), ("Workload job-a-1-0f3b2", True), ("Service a-1", False),
    ],
)  # fmt: skip
def test_events_are_told_by_the_names_of_children(subject: str, ours: bool):
    kind, name = subject.split()
    assert events.concerns({"kind": kind, "name": name}, "a") is ours


def test_events_come_in_the_order_of_what_happened_last():
    cluster = FakeCluster(make_raw())
    again = {"series": {"lastObservedTime": "2026-03-01T12:30:00.5Z", "count": 3}}
    cluster.events_found = [
        make_event("Pod support-bot-1-0-abcde", 1, "Pulling", **again),
        make_event("QLoRAJob support-bot", 5),
        make_event("QLoRAJob other", 6),
        make_event("Job support-bot-1", 2, "SuccessfulCreate", eventTime=None, lastTimestamp="2026-03-01T12:02:00Z"),
    ]
    found = events.find_events(cluster, REF)
    assert [event.reason for event in found] == ["SuccessfulCreate", "Training", "Pulling"]
    assert printed(events.tabulate(found[:1], NOW + timedelta(minutes=3))) == [
        "AGE     TYPE     OBJECT              REASON             MESSAGE",
        "1m00s   Normal   Job support-bot-1   SuccessfulCreate   it happened",
    ]


def test_followed_events_are_told_once(capsys: pytest.CaptureFixture[str]):
    cluster = FakeCluster(*raws(None, None, SUCCEEDED))
    cluster.events_found = [make_event("QLoRAJob support-bot", 5)]
    events.follow_events(cluster, REF, Paper().console, FakeTime().clock)
    assert capsys.readouterr().out == "12:05:00  Normal   QLoRAJob support-bot  Training  it happened\n"


def test_a_missing_run_is_an_error_and_no_empty_answer():
    with pytest.raises(NotFoundError):
        logs.print_logs(FakeCluster(NotFoundError("absent")), REF, logs.Choice(), {}, printer()[1])
