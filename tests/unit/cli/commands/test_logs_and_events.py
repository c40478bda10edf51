"""`qlora logs` and `events` on what a cluster answers."""

import json
from datetime import timedelta
from typing import Any

import pytest

from qlora_cli.cluster.client import NotFoundError, UnreachableError
from qlora_cli.cluster.pods import TrainerPod
from qlora_cli.commands import events, logs
from qlora_cli.podlogs.archived import MissingLogs
from qlora_cli.podlogs.lines import LogPrinter
from tests.make import NOW, REF
from tests.unit.cli.fake_cluster import (
    FAILED,
    SUCCEEDED,
    FakeClusterClient,
    FakeTime,
    PlainConsole,
    make_ended,
    make_event,
    make_pod,
    make_raw,
    make_raws,
    make_training,
    render_to_lines,
)


def printer() -> tuple[PlainConsole, LogPrinter]:
    paper = PlainConsole()
    return paper, LogPrinter(prefix=True, raw=False, console=paper.console)


def test_logs_are_those_of_all_nodes_of_the_latest_attempt(capsys: pytest.CaptureFixture[str]):
    cluster = FakeClusterClient(make_raw(status=make_training(1)))
    cluster.pods_found = [make_pod(2, 1), make_pod(2, 0), make_pod(1), make_pod(0), make_pod(2, 2, started=False)]
    cluster.logs = {"support-bot-2-0-abcde": ["[a] b", "c"], "support-bot-2-1-abcde": ["d"]}
    paper, out = printer()
    assert logs.print_logs(cluster, REF, logs.PodSelection(), {"tailLines": "2"}, out) is None
    assert paper.lines == ["2-0 | [a] b", "2-0 | c", "2-1 | d"]
    assert cluster.queries == [(pod, {"tailLines": "2"}) for pod in cluster.logs]
    assert capsys.readouterr().err == "2-2 has no log yet: its container has not started\n"


def test_json_log_line_is_printed_with_its_rank():
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
    as_it_is = PlainConsole()
    LogPrinter(prefix=False, raw=True, console=as_it_is.console).show(pod, line)
    assert as_it_is.lines == [line]


@pytest.mark.parametrize(
    ("selection", "labels"),
    [
        (logs.PodSelection(attempt=0), ["prepare"]),
        (logs.PodSelection(attempt=1), ["1-0", "1-1"]),
        (logs.PodSelection(node=1), ["2-1"]),
        (logs.PodSelection(attempt=1, node=1), ["1-1"]),
        (logs.PodSelection(attempt=7), []),
    ],
)
def test_pods_are_chosen_by_attempt_and_node(selection: logs.PodSelection, labels: list[str]):
    pods = [TrainerPod(attempt, node, "", True) for attempt, node in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1))]
    assert [pod.label for pod in selection.select(pods, 2)] == labels


def test_followed_logs_go_on_with_the_next_attempt():
    cluster = FakeClusterClient(*make_raws(None, make_training(1), make_training(2), make_training(3), SUCCEEDED))
    cluster.logs = {"support-bot-1-0-abcde": ["one"], "support-bot-2-0-abcde": ["two"]}
    pods = iter([[], [make_pod(1)], [make_pod(1), make_pod(2, started=False)]])
    both = [make_pod(1), make_pod(2)]
    cluster.pods = lambda _: next(pods, both)  # type: ignore[method-assign]
    paper, out = printer()
    assert logs.follow_logs(cluster, REF, logs.PodSelection(), {}, out, FakeTime().clock) is None
    assert paper.lines == ["1-0 | one", "2-0 | two"]
    assert all(query == {"follow": "true"} for _, query in cluster.queries)


@pytest.mark.parametrize(
    ("pods", "selection", "missing"),
    [
        pytest.param([], logs.PodSelection(), MissingLogs(2), id="the-latest-that-ran"),
        pytest.param([make_pod(0)], logs.PodSelection(), MissingLogs(2), id="the-preparation-is-still-there"),
        pytest.param([make_pod(2)], logs.PodSelection(attempt=1), MissingLogs(1), id="an-earlier-one"),
        pytest.param([make_pod(2)], logs.PodSelection(node=1), MissingLogs(2, frozenset({1})), id="a-node"),
        pytest.param([], logs.PodSelection(attempt=0), MissingLogs(0), id="the-preparation"),
        pytest.param([make_pod(2), make_pod(3)], logs.PodSelection(), None, id="all-is-there"),
    ],
)
def test_logs_without_pods_are_read_from_output(pods: Any, selection: logs.PodSelection, missing: MissingLogs | None):
    cluster = FakeClusterClient(make_raw(status=FAILED.model_copy(update={"attempts": (make_ended(1), make_ended(2))})))
    cluster.pods_found, cluster.logs = pods, {pod["metadata"]["name"]: [] for pod in pods}
    assert logs.print_logs(cluster, REF, selection, {}, printer()[1]) == missing
    assert logs.follow_logs(cluster, REF, selection, {}, printer()[1], FakeTime().clock) == missing


def test_log_of_pod_on_lost_node_is_missing(capsys: pytest.CaptureFixture[str]):
    cluster = FakeClusterClient(make_raw(status=make_training(1)))
    cluster.pods_found = [make_pod(1, 0), make_pod(1, 1)]

    def log(_: str, pod: str, __: Any) -> Any:
        if pod == "support-bot-1-1-abcde":
            raise UnreachableError("the API server is busy (503): dial tcp: no route to host")
        yield "zero"

    cluster.log = log  # type: ignore[method-assign]
    paper, out = printer()
    assert logs.print_logs(cluster, REF, logs.PodSelection(), {}, out) == MissingLogs(1, frozenset({1}))
    assert paper.lines == ["1-0 | zero"]
    assert (
        capsys.readouterr().err
        == "cannot read the log of 1-1: the API server is busy (503): dial tcp: no route to host\n"
    )


@pytest.mark.parametrize(
    ("subject", "ours"),
    [
        ("QLoRAJob a", True), ("QLoRAJob a-1", False), ("Job a-1", True), ("Job a-prepare", True), ("Job a-1-1", False),
        ("Pod a-1-0-x2v4z", True), ("Pod a-prepare-0-x2v4z", True), ("Pod a-1-1-0-x2v4z", False), ("Job a-0", False),
        ("Job a-prep2", True), ("Pod a-prep31-0-x2v4z", True), ("Job a-prep", False), ("Job a-prepare-2", False),
        ("Pod b-1-0-x2v4z", False), ("Workload job-a-1-0f3b2", True), ("Service a-1", False),
    ],
)  # fmt: skip
def test_events_are_selected_by_child_names(subject: str, ours: bool):
    kind, name = subject.split()
    assert events.belongs_to_job({"kind": kind, "name": name}, "a") is ours


def test_events_come_in_the_order_of_what_happened_last():
    cluster = FakeClusterClient(make_raw())
    again = {"series": {"lastObservedTime": "2026-03-01T12:30:00.5Z", "count": 3}}
    cluster.events_found = [
        make_event("Pod support-bot-1-0-abcde", 1, "Pulling", **again),
        make_event("QLoRAJob support-bot", 5),
        make_event("QLoRAJob other", 6),
        make_event("Job support-bot-1", 2, "SuccessfulCreate", eventTime=None, lastTimestamp="2026-03-01T12:02:00Z"),
    ]
    found = events.find_events(cluster, REF)
    assert [event.reason for event in found] == ["SuccessfulCreate", "Training", "Pulling"]
    assert render_to_lines(events.tabulate(found[:1], NOW + timedelta(minutes=3))) == [
        "AGE     TYPE     OBJECT              REASON             MESSAGE",
        "1m00s   Normal   Job support-bot-1   SuccessfulCreate   it happened",
    ]


def test_followed_events_are_printed_once(capsys: pytest.CaptureFixture[str]):
    cluster = FakeClusterClient(*make_raws(None, None, SUCCEEDED))
    cluster.events_found = [make_event("QLoRAJob support-bot", 5)]
    events.follow_events(cluster, REF, PlainConsole().console, FakeTime().clock)
    assert capsys.readouterr().out == "12:05:00  Normal   QLoRAJob support-bot  Training  it happened\n"


def test_unknown_run_is_an_error_and_not_empty_output():
    with pytest.raises(NotFoundError):
        logs.print_logs(FakeClusterClient(NotFoundError("absent")), REF, logs.PodSelection(), {}, printer()[1])
