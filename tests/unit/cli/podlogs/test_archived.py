"""`qlora logs` of pods that are gone: what the output and the status have of them."""

import json
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Attempt, OutputStatus
from qlora_cli.cluster.client import ClusterError
from qlora_cli.cluster.jobs import ClusterJob
from qlora_cli.podlogs import archived
from qlora_cli.podlogs.archived import MissingLogs
from qlora_cli.podlogs.lines import LogPrinter, parse_line
from tests.make import DIGEST, UID
from tests.unit.cli.fake_cluster import FAILED, PlainConsole, make_ended, make_job


def printer() -> tuple[PlainConsole, LogPrinter]:
    paper = PlainConsole()
    return paper, LogPrinter(prefix=True, raw=False, console=paper.console)


def make_left(folder: Path, *attempts: Attempt) -> ClusterJob:
    """Return a finished run, with its output in a local folder."""
    output = OutputStatus(digest=DIGEST, prefix=f"{folder.as_uri()}/support-bot/{DIGEST}")
    return make_job(FAILED.model_copy(update={"attempts": attempts, "output": output}), output={"uri": folder.as_uri()})


def leave_log(folder: Path, name: str, *lines: tuple[int, str] | str, uid: str = UID) -> None:
    """What a process left there: lines with the second at which they were written, or without."""
    path = folder / "support-bot" / "logs" / uid / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else write_line(*line)}\n" for line in lines))


def write_line(second: int, message: str) -> str:
    return json.dumps({"time": f"2026-03-01T12:00:{second:02}.000Z", "level": "info", "message": message})


WISH = archived.LogQuery(attempt=None, tail=None, timestamps=False, s3_endpoint=None)


def test_logs_of_pods_that_are_gone_are_read_from_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    leave_log(tmp_path, "attempt-1-node-0-rank-0.jsonl", (1, "an earlier attempt"))
    leave_log(tmp_path, "attempt-2-node-0-rank-0.jsonl", (1, "zero"), (5, "zero again"), "text", (9, "the end"))
    leave_log(tmp_path, "attempt-2-node-1-rank-1.jsonl", (2, "[one]"), (6, "one again"))
    leave_log(tmp_path, "attempt-2-node-1.jsonl", (3, "the launcher"))
    leave_log(tmp_path, "attempt-2-node-0-rank-0.jsonl", (1, "of another QLoRAJob"), uid="another")
    job, (paper, out), notes = make_left(tmp_path, make_ended(1), make_ended(2)), printer(), PlainConsole()
    archived.show_archived_logs(job, MissingLogs(2), WISH, out, notes.console)
    assert [line.replace("2026-03-01T12:00:0", "").replace(".000Z info    ", " ") for line in paper.lines] == [
        "2-0 | 1 zero", "2-1 | 2 [one]", "2-1 | 3 the launcher", "2-0 | 5 zero again", "2-0 | text",
        "2-1 | 6 one again", "2-0 | 9 the end",
    ]  # fmt: skip
    assert "".join(notes.lines) == (
        f"the pods of attempt 2 are gone; logs archived in {tmp_path.as_uri()}/support-bot/logs/{UID}/:"
        "attempt 1 on node-1: NodeLost  goneattempt 2 on node-1: NodeLost  gone"
    )
    assert capsys.readouterr().out == "", "what is no log line must not be among them"


def test_lines_from_the_output_are_chosen_as_those_of_pods(tmp_path: Path):
    leave_log(tmp_path, "attempt-1-node-0-rank-0.jsonl", (1, "a"), (2, "b"), (4, "c"))
    leave_log(tmp_path, "attempt-1-node-1-rank-1.jsonl", (3, "d"))
    leave_log(tmp_path, "prepare.jsonl", (0, "checked"))
    job = make_left(tmp_path, make_ended(1))

    def shown(missing: MissingLogs, **query: Any) -> list[str]:
        paper = PlainConsole()
        out = LogPrinter(prefix=True, raw=True, console=paper.console)
        archived.show_archived_logs(
            job, missing, archived.LogQuery(**{**vars(WISH), **query}), out, PlainConsole().console
        )
        return [line.partition('"message": ')[0][:6] + line.partition('"message": ')[2] for line in paper.lines]

    assert shown(MissingLogs(1), tail=1) == ['1-1 | "d"}', '1-0 | "c"}']
    assert shown(MissingLogs(1), tail=0) == []
    assert shown(MissingLogs(1, frozenset({1}))) == ['1-1 | "d"}']
    assert shown(MissingLogs(0)) == ['prepar"checked"}']


def test_logs_are_read_from_s3_with_the_keys_of_this_computer(monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    job = make_job(FAILED.model_copy(update={"attempts": (make_ended(1),)}), output={"uri": "s3://adapters/team-a/"})
    key = f"team-a/support-bot/logs/{UID}/attempt-1-node-0-rank-0.jsonl"
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="adapters")
        client.put_object(Bucket="adapters", Key=key, Body=write_line(1, "from S3").encode())
        paper, out = printer()
        archived.show_archived_logs(job, MissingLogs(1), WISH, out, PlainConsole().console)
    assert paper.lines == ["1-0 | 2026-03-01T12:00:01.000Z info    from S3"]


def test_log_that_somebody_made_huge_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archived, "MAX_LOG_BYTES", 1000)
    leave_log(tmp_path, "attempt-1-node-0-rank-0.jsonl", "x" * 2000)
    with pytest.raises(
        ClusterError,
        match=r"attempt-1-node-0-rank-0\.jsonl is left out: it has more than 1,000 bytes; download it",
    ):
        archived.show_archived_logs(
            make_left(tmp_path, make_ended(1)), MissingLogs(1), WISH, printer()[1], PlainConsole().console
        )


def test_log_that_somebody_made_huge_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archived, "MAX_LOG_BYTES", 1000)
    leave_log(tmp_path, "attempt-1-node-0-rank-0.jsonl", "x" * 2000)
    leave_log(tmp_path, "attempt-1-node-1-rank-1.jsonl", (1, "a step"))
    job, (paper, out), notes = make_left(tmp_path, make_ended(1)), printer(), PlainConsole()
    archived.show_archived_logs(job, MissingLogs(1), WISH, out, notes.console)
    assert [line.partition("info")[2].strip() for line in paper.lines] == ["a step"]
    assert "attempt-1-node-0-rank-0.jsonl is left out: it has more than 1,000 bytes; download it" in "".join(
        notes.lines
    )


def test_logs_beyond_the_limit_of_an_attempt_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archived, "MAX_LOGS_BYTES", 100)
    leave_log(tmp_path, "attempt-1-node-0-rank-0.jsonl", (1, "a step"))
    leave_log(tmp_path, "attempt-1-node-1-rank-1.jsonl", (1, "another step"))
    job, (paper, out), notes = make_left(tmp_path, make_ended(1)), printer(), PlainConsole()
    archived.show_archived_logs(job, MissingLogs(1), WISH, out, notes.console)
    assert [line.partition("info")[2].strip() for line in paper.lines] == ["a step"]
    assert "rank-1.jsonl is left out: it has more than 100 bytes with the logs before it" in "".join(notes.lines)


def test_long_line_of_an_archived_log_is_not_parsed():
    line = '{"message": "a step", "time": "2026-03-01T12:00:01Z", "x": [' + "[]," * 400_000 + "1]}"
    [shown] = archived.parse_log(archived.LogFile(1, 0), line.encode())
    assert (shown.time, parse_line(line)) == ("", (None, line))


def test_archived_line_shows_its_rank(tmp_path: Path):
    raw = json.dumps({"time": "2026-03-01T12:00:01Z", "level": "info", "message": "a step", "rank": 3})
    leave_log(tmp_path, "attempt-1-node-1-rank-3.jsonl", raw)
    paper, out = printer()
    archived.show_archived_logs(make_left(tmp_path, make_ended(1)), MissingLogs(1), WISH, out, PlainConsole().console)
    assert paper.lines == ["1-1/3 | 2026-03-01T12:00:01Z info    a step"]


def test_no_archived_logs_prints_termination_messages_and_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    job = make_left(tmp_path, make_ended(1, Reason.LOSS_DIVERGED, "loss 80"))
    with pytest.raises(ClusterError) as caught:
        archived.show_archived_logs(job, MissingLogs(1), WISH, printer()[1], PlainConsole().console)
    assert capsys.readouterr().out == "attempt 1 on node-1: LossDiverged  loss 80\n"
    assert str(caught.value) == (
        "no log of attempt 1 of support-bot: its pods are gone (deleted, removed after spec.ttl, or lost with their "
        f"node), and {tmp_path.as_uri()}/support-bot/logs/{UID}/ has no archived log: it was deleted, or the process "
        "exited before its first upload; a log collector of the cluster may have it"
    )


def test_unreadable_output_error_has_fix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qlora_cli.local.output_store.find_spec", lambda _: None)
    job = make_job(FAILED.model_copy(update={"attempts": (make_ended(1),)}), output={"uri": "s3://adapters"})
    with pytest.raises(ClusterError, match=r"of support-bot: its pods are gone .* and boto3 is not installed; run pip"):
        archived.show_archived_logs(job, MissingLogs(1), WISH, printer()[1], PlainConsole().console)


def test_attempt_never_started_reads_no_output():
    with pytest.raises(ClusterError, match="support-bot is Failed and has no pods of attempt 3: DatasetEmpty it is"):
        archived.show_archived_logs(make_job(FAILED), MissingLogs(3), WISH, printer()[1], PlainConsole().console)
    with pytest.raises(ClusterError, match="support-bot is Pending and has no pods of preparation: no operator"):
        archived.show_archived_logs(make_job(), MissingLogs(0), WISH, printer()[1], PlainConsole().console)


def test_stack_dumps_are_read_from_output(tmp_path: Path):
    hangs = tmp_path / "support-bot" / DIGEST / "hangs"
    hangs.mkdir(parents=True)
    for name in ("attempt-1-rank-0.txt", "attempt-2-rank-0.txt"):
        (hangs / name).write_text(f"File {name}\n")
    leave_log(tmp_path, "attempt-2-node-0-rank-0.jsonl", (1, "zero"))
    job, notes = make_left(tmp_path, make_ended(2, Reason.HEARTBEAT_LOST, "the stacks are in …")), PlainConsole()
    query = archived.LogQuery(**{**vars(WISH), "attempt": 2})
    archived.show_archived_logs(job, MissingLogs(2), query, printer()[1], notes.console)
    assert notes.lines[-3:] == [
        f"{tmp_path.as_uri()}/support-bot/{DIGEST}/hangs/attempt-2-rank-0.txt", "File attempt-2-rank-0.txt", "",
    ]  # fmt: skip
