"""Log upload: bounded in size and time, and never able to fail or delay a run."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_api.logs.files import LogFile, log_folder
from qlora_api.logs.formatters import Format, handler_for
from qlora_api.logs.redaction import MASK, REDACTOR
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_trainer.__main__ import ProcessContext, exit_with_error, exit_with_message
from qlora_trainer.errors import RunError, StopRequested
from qlora_trainer.observability.log_object import LogObject
from qlora_trainer.observability.log_upload import (
    HEAD_BYTES,
    MAX_FIELD_CHARACTERS,
    TAIL_BYTES,
    BoundedLog,
    LogUploader,
    TeeHandler,
    shorten,
)
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.runtime.termination_message import TerminationMessageWriter
from tests.unit.trainer.processes import ROOT
from tests.unit.trainer.tiny import prepare_config, write_job

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SOON = 10.0
"""Seconds that a thread needs at most to react."""


@dataclass
class FakeLogTarget:
    """A target with a put function of the test."""

    put: Callable[[bytes], object]
    existing: bytes = b""

    def read_existing(self) -> bytes:
        return self.existing


@pytest.fixture
def uploader() -> Iterator[LogUploader]:
    """An uploader attached to one logger that uploads only for a checkpoint and at the end."""
    uploader, logger = LogUploader(interval=3600), logging.getLogger("qlora_trainer")
    level = logger.level
    logger.addHandler(uploader)
    logger.setLevel(logging.INFO)
    yield uploader
    logger.removeHandler(uploader)
    logger.setLevel(level)


def write_log(text: str, **fields: Any) -> None:
    logging.getLogger("qlora_trainer").info(text, extra={"fields": fields})


def messages(raw: bytes) -> list[str]:
    return [json.loads(line)["message"] for line in raw.splitlines()]


def progress_with_checkpoint(step: int) -> Progress:
    checkpoint = Checkpoint(step=step, uri=f"s3://a/{step}", time=NOW) if step else None
    return Progress(phase=Phase.TRAINING, checkpoint=checkpoint, updated_at=NOW)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (LogFile(0), "prepare.jsonl"),
        (LogFile(1, 0, 0), "attempt-1-node-0-rank-0.jsonl"),
        (LogFile(12, 3, 31), "attempt-12-node-3-rank-31.jsonl"),
        (LogFile(2, 1), "attempt-2-node-1.jsonl"),
    ],
)
def test_log_file_name_parses_to_attempt_and_rank(file: LogFile, name: str) -> None:
    assert (file.name, LogFile.parse(name)) == (name, file)


@pytest.mark.parametrize(
    "name", ["attempt-1.jsonl", "attempt-1-node-0-rank-0.jsonl.part", "attempt-x-node-0.jsonl", ""]
)
def test_other_names_are_no_log_files(name: str) -> None:
    assert LogFile.parse(name) is None


def test_log_folder_is_per_qlorajob() -> None:
    assert (log_folder("0a1b"), log_folder("")) == ("logs/0a1b", "logs")


def test_short_log_is_complete() -> None:
    bounded = BoundedLog(first_bytes=8, last_bytes=8)
    for line in ("one", "two", "three"):
        bounded.add(line)
    assert bounded.text() == b"one\ntwo\nthree\n"


def test_long_log_has_head_tail_and_an_omission_line() -> None:
    bounded = BoundedLog(first_bytes=500, last_bytes=500)
    lines = [f'{{"time": "00:{number:04}"}}' for number in range(1000)]
    for line in lines:
        bounded.add(line)
    uploaded = bounded.text().decode().splitlines()
    size = len(lines[0]) + 1
    each = 500 // size
    assert uploaded[:each] == lines[:each]
    assert uploaded[each + 1 :] == lines[-each:]
    gap, omitted = json.loads(uploaded[each]), 1000 - 2 * each
    assert gap["message"].startswith(f"{omitted} lines ({omitted * size:,} bytes) omitted: ")
    assert (each, gap["time"]) == (25, "00:0974"), "the time of the last omitted line"
    assert bounded.count == 1000


def test_bounded_log_has_bounded_memory() -> None:
    bounded = BoundedLog(first_bytes=1000, last_bytes=1000)
    for line in ("x" * 5000, "é" * 600, "short", "\ud800 alone"):
        bounded.add(line)
    text = bounded.text()
    assert len(text) < 1000 + 1000 + 400
    assert text.endswith(b"short\n? alone\n")


def test_long_field_is_shortened_to_head_and_tail() -> None:
    long = "first " + "x" * 10 * MAX_FIELD_CHARACTERS + " last"
    line = shorten(json.dumps({"message": "it failed", "exception": long, "deep": [long], "step": 3}))
    shortened = json.loads(line)
    assert (shortened["message"], shortened["step"]) == ("it failed", 3)
    for name in ("exception", "deep"):
        assert "first" in shortened[name][:10]
        assert "last" in shortened[name][-10:]
        assert "characters omitted" in shortened[name]
        assert len(shortened[name]) < MAX_FIELD_CHARACTERS + 100
    assert shorten('{"message": "short"}') == '{"message": "short"}'


def test_log_is_uploaded_with_a_checkpoint_and_at_the_end(uploader: LogUploader) -> None:
    uploads: list[bytes] = []
    happened = threading.Condition()

    def put(text: bytes) -> None:
        with happened:
            uploads.append(text)
            happened.notify()

    write_log("before the start")
    uploader.start(FakeLogTarget(put))
    with happened:
        for step in (0, 2, 2):
            write_log(f"after step {step}")
            uploader.report(progress_with_checkpoint(step))
        assert happened.wait_for(lambda: uploads, SOON)
    assert messages(uploads[-1])[:3] == ["before the start", "after step 0", "after step 2"]
    write_log("the end")
    uploader.finish()
    assert messages(uploads[-1]) == ["before the start", *(f"after step {n}" for n in (0, 2, 2)), "the end"]
    before = len(uploads)
    uploader.finish()
    assert len(uploads) == before, "no new lines"


def test_requeued_attempt_appends_to_its_log(uploader: LogUploader) -> None:
    uploads: list[bytes] = []
    write_log("again")
    uploader.start(FakeLogTarget(uploads.append, b'{"message": "the first pod"}\n'))
    uploader.report(progress_with_checkpoint(2))
    write_log("the end")
    uploader.finish()
    assert messages(uploads[-1]) == ["the first pod", "again", "the end"]


def test_prepended_log_is_bounded_too() -> None:
    bounded = BoundedLog(first_bytes=10, last_bytes=10)
    for line in ("five", "six"):
        bounded.add(line)
    bounded.prepend(b"one\ntwo\nthree\nfour\n")
    first, second, gap, *last = bounded.text().splitlines()
    assert [first, second, *last] == [b"one", b"two", b"five", b"six"]
    assert json.loads(gap)["message"].startswith("2 lines (11 bytes)")


def test_log_is_uploaded_periodically() -> None:
    uploaded = threading.Event()
    uploader = LogUploader(interval=0.05)
    uploader.start(FakeLogTarget(lambda _: uploaded.set()))
    uploader.handle(logging.LogRecord("a", logging.INFO, "f", 1, "said", (), None))
    assert uploaded.wait(SOON)
    uploader.finish()


def test_failing_log_upload_warns_once(uploader: LogUploader, caplog: pytest.LogCaptureFixture) -> None:
    attempts: list[bytes] = []

    def refuse(text: bytes) -> None:
        attempts.append(text)
        raise RunError(Reason.S3_DENIED, "spec.output.uri: PutObject is refused")

    uploader.start(FakeLogTarget(refuse))
    for step in (1, 2, 3):
        write_log("a step")
        uploader.report(progress_with_checkpoint(step))
        ends = time.monotonic() + SOON
        while len(attempts) < step and time.monotonic() < ends:
            time.sleep(0.01)
    uploader.finish()
    assert len(attempts) >= 3
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["the log was not uploaded: spec.output.uri: PutObject is refused"]


def test_hanging_upload_delays_only_the_exit_and_by_a_bound(
    uploader: LogUploader, caplog: pytest.LogCaptureFixture
) -> None:
    released, entered = threading.Event(), threading.Event()

    def hang(_: bytes) -> None:
        entered.set()
        released.wait()

    uploader.start(FakeLogTarget(hang))
    write_log("a step")
    started = time.monotonic()
    uploader.report(progress_with_checkpoint(1))
    assert entered.wait(SOON)
    for step in range(2, 100):
        write_log("a step")
        uploader.report(progress_with_checkpoint(step))
    assert time.monotonic() - started < 1
    started = time.monotonic()
    uploader.finish(0.3)
    assert 0.3 <= time.monotonic() - started < 2
    released.set()
    assert caplog.messages[-1] == "the end of the log was not uploaded within 0.3 s"


def test_no_secret_is_uploaded(uploader: LogUploader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REDACTOR, "_values", set())
    monkeypatch.setattr(REDACTOR, "_secret_pattern", None)
    REDACTOR.add_secrets(["c4n4ry/of+the/output"])
    uploads: list[bytes] = []
    uploader.start(FakeLogTarget(uploads.append))
    write_log(
        "c4n4ry/of+the/output",
        url="https://u:c4n4ry-of-a-url@s3",
        long=["c4n4ry/of+the/output " * 2000],
        token="c4n4ry",
    )
    uploader.finish()
    assert MASK.encode() in uploads[-1]
    assert b"c4n4ry" not in uploads[-1]


@pytest.fixture
def process(uploader: LogUploader, tmp_path: Path) -> ProcessContext:
    return ProcessContext(TerminationMessageWriter(tmp_path / "message.json"), log_uploader=uploader)


def test_log_ends_with_the_reason_of_a_failure(process: ProcessContext) -> None:
    uploads: list[bytes] = []
    process.log_uploader.start(FakeLogTarget(uploads.append))
    assert exit_with_error(RunError(Reason.LOSS_DIVERGED, "loss 80"), process) == 1
    last = json.loads(uploads[-1].splitlines()[-1])
    assert (last["message"], last["reason"]) == ("the run failed", "LossDiverged")


def test_unwritable_output_does_not_delay_exit(process: ProcessContext) -> None:
    uploads: list[bytes] = []
    process.log_uploader.start(FakeLogTarget(uploads.append))
    exit_with_error(RunError(Reason.S3_DENIED, "spec.output.uri: s3://a/b: PutObject is refused"), process)
    assert uploads == []


def test_done_file_is_written_after_the_log(
    process: ProcessContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher then stops the other workers of its pod."""
    seen: list[list[str]] = []
    process.log_uploader.start(FakeLogTarget(lambda _: seen.append(sorted(path.name for path in tmp_path.iterdir()))))
    assert exit_with_message(TerminationMessage(reason=Reason.PUBLISHED), process, tmp_path / "message.json") == 0
    assert (seen, (tmp_path / "message.json").exists()) == ([[]], True)
    monkeypatch.setenv("RANK", "1")
    other = ProcessContext(TerminationMessageWriter(tmp_path / "1.json"))
    other.log_uploader.start(FakeLogTarget(lambda _: seen.append(sorted(path.name for path in tmp_path.iterdir()))))
    other.log_uploader.handle(logging.LogRecord("a", logging.INFO, "f", 1, "said", (), None))
    assert exit_with_message(None, other, tmp_path / "{rank}.json") == 0
    assert (seen[1], (tmp_path / "1.done").exists()) == (["message.json"], True)


def test_sigterm_during_the_final_upload_is_ignored(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from types import SimpleNamespace
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_trainer.__main__ import COMMANDS, main

def train(options, process):
    put = lambda text: os.kill(os.getpid(), signal.SIGTERM)
    process.log_uploader.start(SimpleNamespace(read_existing=bytes, put=put))
    return TerminationMessage(reason=Reason.PUBLISHED)

COMMANDS["train"] = train
sys.exit(main(["train", "--work", sys.argv[1], "--termination-message", sys.argv[1] + "/message.json"]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    message = TerminationMessage.model_validate_json((tmp_path / "message.json").read_text())
    assert message.reason == Reason.PUBLISHED


class SigtermHandler(logging.Handler):
    """Sends SIGTERM to the process while it handles a line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            self.handleError(record)  # as logging's own handlers treat all exceptions


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("a", logging.INFO, "f", 1, text, (), None)


def test_sigterm_within_a_log_line_is_delayed(stop: StopFlag) -> None:
    uploader = LogUploader()
    lines, uploads = TeeHandler(SigtermHandler(), uploader, stop), list[bytes]()
    with pytest.raises(StopRequested):
        lines.handle(record("said"))
    lines.handle(record("the end"))
    uploader.start(FakeLogTarget(uploads.append))
    uploader.finish()
    assert messages(uploads[-1]) == ["said", "the end"]


def test_log_line_of_another_thread_does_not_delay_sigterm(stop: StopFlag) -> None:
    entered, released = threading.Event(), threading.Event()

    class SlowHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 (logging's signature)
            entered.set()
            assert released.wait(SOON)

    thread = threading.Thread(target=TeeHandler(SlowHandler(), LogUploader(), stop).handle, args=(record("said"),))
    thread.start()
    try:
        assert entered.wait(SOON)
        with pytest.raises(StopRequested):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        released.set()
        thread.join()


def test_uploaded_lines_of_many_threads_match_standard_output() -> None:
    written, uploader, uploads = io.StringIO(), LogUploader(), list[bytes]()
    lines = TeeHandler(handler_for(Format.JSON, written), uploader, StopFlag())

    def log_lines(name: int) -> None:
        for number in range(300):
            lines.handle(record(f"{name} says {number}"))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=log_lines, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    uploader.start(FakeLogTarget(uploads.append))
    uploader.finish()
    assert uploads[-1].decode() == written.getvalue()


def test_prepare_log_is_uploaded_to_the_output(tmp_path: Path) -> None:
    spec = write_job(tmp_path, dataset={"uri": f"file://{tmp_path}/absent.jsonl"})
    config = prepare_config(spec).model_copy(update={"uid": "0a1b"})
    (tmp_path / "config.json").write_text(config.model_dump_json(by_alias=True))
    message = tmp_path / "message.json"
    options = {"config": tmp_path / "config.json", "work": tmp_path / "work", "termination-message": message}
    command = [
        sys.executable,
        "-m",
        "qlora_trainer",
        "prepare",
        *(f"--{name}={path}" for name, path in options.items()),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    uploaded = tmp_path / "output" / "colours" / "logs" / "0a1b" / "prepare.jsonl"
    assert uploaded.read_text() == done.stdout
    assert json.loads(uploaded.read_text().splitlines()[-1])["reason"] == "DatasetNotFound"
    log_object = LogObject(config, LogFile(0))
    assert (log_object.read_existing(), LogObject(config, LogFile(1)).read_existing()) == (done.stdout.encode(), b"")
    with uploaded.open("ab") as file:
        file.truncate(2 * (HEAD_BYTES + TAIL_BYTES) + 1)
    assert log_object.read_existing() == b"", "larger than any log of the trainer"
